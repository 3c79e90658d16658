"""DeepSpeed's checkpoints: converted for another number of ranks, and never unpickled without a list of what may be in them.

`python -m trainer.checkpoints.universal INPUT OUTPUT` turns the shards in INPUT into DeepSpeed's universal form, one file per
parameter and state, which any number of ranks can load. DeepSpeed reads pickles with `weights_only=False`; here torch is told
to refuse all but tensors and the few classes that DeepSpeed itself writes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.manifest import Damaged
from trainer.storage import is_relative

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch's own switch: `weights_only=True` whatever the caller says
EXPERTS = ("ds_autoep_layers", "autoep_layers")  # DeepSpeed's mixtures of experts, with names of their own for files
WORKERS = 4  # processes of a conversion, where there are as many cores


@contextlib.contextmanager
def restricted_unpickling() -> Iterator[None]:
    """Restricts `torch.load` to tensors, plain values, and what DeepSpeed's own checkpoints are made of; nothing else."""
    before = os.environ.get(FORCE)
    os.environ[FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_known_classes()):
            yield
    finally:
        if before is None:
            del os.environ[FORCE]
        else:
            os.environ[FORCE] = before


def check_names(source: Path) -> None:
    """Checks the names in DeepSpeed's shards before its converter makes file paths of them.

    Raises:
        Damaged: one is none, so that a file could be written anywhere; names the shard.
    """
    with restricted_unpickling():
        for path in sorted(source.glob("*.pt")):
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            if (strange := _strange_key(content)) is not None:
                raise Damaged(f"{path.name}: has the name {strange!r}, which no parameter and no state has")


def convert(source: Path, target: Path) -> None:
    """Converts shards to DeepSpeed's universal format, in a subprocess: the converter forks, and this process may hold a GPU.

    Raises:
        RuntimeError: it failed; the message is the converter's last line.
    """
    command = [sys.executable, "-m", "trainer.checkpoints.universal", str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"the checkpoint {source} could not be converted for another number of ranks: {lines[-1]}")


def client_state(step: int) -> dict[str, Any]:
    """Builds the client state without which DeepSpeed does not convert a checkpoint (stages 1 and 2)."""
    from deepspeed.checkpoint import constants

    version = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    return {"iteration": step, constants.UNIVERSAL_CHECKPOINT_INFO: version}


def separate_step_counts(engine: Any) -> None:
    """After loading a universal checkpoint: gives every buffer of the optimizer a count of its own, on its own device.

    At stage 3 DeepSpeed (0.19.8) hands one tensor to all of them, and AdamW adds one to it for each: with n buffers the
    count runs n times too fast, and the bias correction is wrong. Users saw it as a jump of the loss after resuming.
    """
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    for param, state in base.state.items():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].detach().clone().to(param.device)


def _strange_key(content: Any) -> str | None:
    """Returns the first key, at any depth, that is no valid file name or names experts' files; the engine's settings, which
    nothing is made of, left out."""
    if isinstance(content, Mapping):
        for key, value in content.items():
            if isinstance(key, str) and not (is_relative(key) and "/" not in key and key not in EXPERTS):
                return key
            if key != "ds_config" and (strange := _strange_key(value)) is not None:
                return strange
    elif isinstance(content, (list, tuple)):
        return next((strange for item in content if (strange := _strange_key(item)) is not None), None)
    return None


def _known_classes() -> list[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def _main() -> None:
    from deepspeed.checkpoint import ds_to_universal

    source, target = sys.argv[1:]
    workers = max(1, min(WORKERS, len(os.sched_getaffinity(0)) - 1))
    options = argparse.Namespace(
        input_folder=source,
        output_folder=target,
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    torch.set_num_threads(1)
    with restricted_unpickling():
        ds_to_universal.main(options)


if __name__ == "__main__":
    _main()
