"""A small world to train in: a feature store with random values, tiny configs, a plain torch loop to compare with, and
observers that kill or spoil a rank at a given point.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from lidit.config import LIDiTConfig
from lidit.diffusion import loss_per_sample
from lidit.model import LIDiT
from tests.support.features import Writer
from trainer.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    MetricsConfig,
    ModelConfig,
    OptimizerConfig,
    PhaseConfig,
    TrainConfig,
    ZeroConfig,
)
from trainer.data.loader import Batches, BatchSlice
from trainer.data.tables import Tables
from trainer.engine.optimizer import build_optimizer
from trainer.monitor.metrics import read_lines
from trainer.storage import Storage

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"depth": 2, "width": 32, "heads": 2}
ENVIRONMENT = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_raylet_start_wait_time_s": "180"}


def make_store(
    folder: Path, rows: Sequence[int] = (20, 10, 30, 1, 29), model: str | None = None, **options: Any
) -> str:
    """A store of random latents and embeddings for encoders `one` and `two`: a fragment for each number of rows.

    `model`: what the encoders' fingerprints say, instead of their names.
    """

    class Named(Writer):
        def fingerprint(self, name: str) -> str:
            return super().fingerprint(name if model is None else model)

    writer = Named(str(folder), **options)
    for count in rows:
        writer.fragment(["64x64" if row % 3 else "48x80" for row in range(count)])
    return str(folder)


def make_config(store: str, storage: Path | str, name: str = "run", **changes: Any) -> TrainConfig:
    """Two CPU workers, ZeRO-3, fp32, 8 samples a step, everything written down at every step."""
    values: dict[str, Any] = {
        "name": name,
        "store": store,
        "storage": str(storage),
        "model": ModelConfig("tiny", changes=SHAPE),
        "phases": (PhaseConfig(steps=10, global_batch_size=8, resolution=64),),
        "data": DataConfig(encoders=("one", "two"), holdout=0.1, pad_multiple=4, read_threads=1),
        # eps: a bias before a GroupNorm has no gradient but rounding, which a small eps would make steps of.
        "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=3, eps=1e-5),
        "ema": EMAConfig(decay=0.9),
        "zero": ZeroConfig(stage=3),
        "precision": "fp32",
        "microbatch_size": 4,
        "num_workers": 2,
        "use_gpu": False,
        "max_failures": 1,
        "checkpoint": CheckpointConfig(every_steps=4),
        "metrics": MetricsConfig(every_steps=1, tensorboard=False),
        **changes,
    }
    return TrainConfig(**values)


def steps(config: TrainConfig, number: int) -> TrainConfig:
    """The same run with that many steps."""
    return dataclasses.replace(config, phases=(dataclasses.replace(config.phases[0], steps=number),))


def lines(config: TrainConfig, kind: str = "train") -> dict[int, dict[str, Any]]:
    """step -> line of the run's metrics; fails where a step is written twice."""
    found = read_lines(Path(config.storage, config.name, "metrics.jsonl"), kind)
    by_step = {line["step"]: line for line in found}
    assert len(by_step) == len(found), [line["step"] for line in found]
    return by_step


def losses(config: TrainConfig) -> list[float]:
    """Of steps 1, 2, 3 ...; fails where one is missing."""
    by_step = lines(config)
    assert sorted(by_step) == list(range(1, len(by_step) + 1))
    return [by_step[step]["loss"] for step in sorted(by_step)]


def checkpoints(config: TrainConfig) -> list[int]:
    """Steps that have a checkpoint with a manifest."""
    folder = Path(
        config.storage, config.name, "checkpoints"
    )  # a run removes old ones: no walk through what may go away
    return sorted(int(path.parent.name[5:]) for path in folder.glob("step_*/manifest.json"))


# -- a plain loop -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Reference:
    """What a training without DeepSpeed, Ray and ranks gives."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    average: dict[str, torch.Tensor]


def reference(
    config: TrainConfig, spoil: Callable[[int, LIDiT], bool] = lambda step, model: False, dtype: Any = torch.float32
) -> Reference:
    """Trains on the whole batch at once. `spoil(step, model)`: true where the step's gradient is to be forgotten."""
    torch.set_num_threads(1)
    tables = Tables(config.run_phases, config.data, {})
    table = tables.phase(0)
    torch.manual_seed(config.seed)
    model = LIDiT(tables.model_config(config.model)).to(dtype)
    optimizer = build_optimizer(model, config.optimizer)
    average = {name: value.detach().clone() for name, value in model.named_parameters()}
    made = Reference([], [], {}, average)
    phase = config.phases[0]
    batches = Batches(table, config.data, config.seed, BatchSlice(phase.global_batch_size), range(phase.steps))
    with batches:
        for step, batch in enumerate(batches):
            noisy = table.objective.add_noise(batch.latents, batch.noise, batch.timestep)
            prediction = model(noisy, batch.timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds)
            loss = loss_per_sample(table.objective, prediction, batch.latents, batch.noise, batch.timestep).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip or 1e9)
            made.losses.append(float(loss.detach()))
            made.norms.append(float(norm))
            if spoil(step, model):
                continue
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.learning_rate_at(step, config.total_steps)
            optimizer.step()
            decay = config.ema.decay_at(step)
            for name, value in model.named_parameters():
                average[name].mul_(decay).add_(value.detach(), alpha=1 - decay)
    made.weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    return made


def model_of(config: TrainConfig) -> LIDiTConfig:
    """The model's shape."""
    return Tables(config.run_phases, config.data, {}).model_config(config.model)


# -- ranks without Ray ------------------------------------------------------------------------------------------------


def run_ranks(world_size: int, act: str, *arguments: Any) -> list[Any]:
    """Runs a function of this module, by name, in so many processes that form a process group; what each returned.

    The processes stay for the next call: importing torch and DeepSpeed takes longer than most of what tests do with them.
    """
    if world_size not in _groups:
        _groups[world_size] = RankGroup(world_size)
    try:
        return _groups[world_size].run(act, arguments)
    except BaseException:
        _groups.pop(world_size).close()
        raise


def close_ranks() -> None:
    """Ends all of those processes."""
    while _groups:
        _groups.popitem()[1].close()


class RankGroup:
    """Processes that form a gloo process group and wait for something to do."""

    def __init__(self, world_size: int):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
        self.processes, self.pipes = [], []
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # until `close`
        for rank in range(world_size):
            own = {**common, "RANK": rank, "LOCAL_RANK": rank, "DS_ACCELERATOR": "cpu"}
            environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
            mine, its = Pipe()
            command, inherited = [sys.executable, "-m", "tests.support.training", str(its.fileno())], (its.fileno(),)
            process = subprocess.Popen(
                command, pass_fds=inherited, stdout=self.errors, stderr=self.errors, env=environment, cwd=ROOT
            )
            its.close()
            self.processes.append(process)
            self.pipes.append(mine)

    def run(self, act: str, arguments: tuple[Any, ...], seconds: float = 600) -> list[Any]:
        """What every rank returned; fails if one raises, dies, or takes too long."""
        for pipe in self.pipes:
            pipe.send((act, arguments))
        returned: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while len(returned) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in returned]
            ready = wait(waiting, timeout=deadline - time.monotonic())
            assert ready, f"{act}: not done after {seconds:.0f} s\n{self._said()}"
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    fine, returned[rank] = pipe.recv()
                except EOFError:
                    raise AssertionError(f"{act}: rank {rank} died\n{self._said()}") from None
                assert fine, f"{act}: rank {rank} raised\n{returned[rank]}"
        return [returned[rank] for rank in range(len(self.pipes))]

    def close(self) -> None:
        """Ends the processes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for pipe in self.pipes:
            pipe.close()
        self.errors.close()

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-6000:]


_groups: dict[int, RankGroup] = {}


def _rank_main(pipe: Any) -> None:
    """One process of a `RankGroup`: does what it is told until the other end is closed."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    while True:
        try:
            act, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, globals()[act](*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


# -- what a rank of `run_ranks` may do --------------------------------------------------------------------------------


def train_all(configs: Sequence[TrainConfig], observe: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """Trains one run after the other in the same processes; what each of them returned."""
    from trainer.worker import train_worker

    settings = ({"config": config.to_dict(), "versions": {}, "observe": observe} for config in configs)
    return [train_worker(setting) for setting in settings]


def train_while_others_write(config: TrainConfig) -> dict[str, Any]:
    """Trains; after the third step somebody appends rows, compacts the table and removes all versions that no tag keeps."""
    import datetime

    import lance

    from trainer.worker import train_worker

    tables = Tables(config.run_phases, config.data, {})
    tables.pin(Storage(f"{config.storage}/{config.name}"), {})
    seen = {"step": 0}

    def observe(part: str) -> None:
        seen["step"] += part == "step"
        if part == "step" and seen["step"] == 3:
            uri = f"{config.store}/samples.lance"
            rows = lance.dataset(uri).to_table(limit=7)
            lance.write_dataset(rows, uri, mode="append")
            lance.dataset(uri).optimize.compact_files()
            lance.dataset(uri).cleanup_old_versions(
                datetime.timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
            )

    return train_worker({"config": config.to_dict(), "versions": tables.versions, "observe": observe})


def train_all_spoilt(
    configs: Sequence[TrainConfig], how: str, rank: int, spoilt_steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Trains one run after the other, each with a loss or gradient that is not finite on one rank at some steps."""
    return [train_spoilt(config, how, rank, spoilt_steps) for config in configs]


def train_spoilt(config: TrainConfig, how: str, rank: int, spoilt_steps: Sequence[int]) -> dict[str, Any]:
    """Trains with a loss (`nan`) or gradient (`inf`) that is not finite, on one rank at some steps."""
    from trainer import loop
    from trainer.worker import train_worker

    honest, counted = loop.loss_per_sample, {"calls": 0}

    def spoil(objective: Any, prediction: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        accumulate = config.run_phases[0].split(torch.distributed.get_world_size())[1]
        step = counted["calls"] // accumulate
        counted["calls"] += 1
        if step not in spoilt_steps or torch.distributed.get_rank() != rank:
            return honest(objective, prediction, *rest)
        if how == "nan":
            return honest(objective, prediction, *rest) * torch.nan
        return honest(objective, _InfiniteGradient.apply(prediction), *rest)

    loop.loss_per_sample = spoil
    try:
        return train_worker({"config": config.to_dict(), "versions": {}, "observe": None})
    finally:
        loop.loss_per_sample = honest


class _InfiniteGradient(torch.autograd.Function):
    """Itself forward; backward one element of the gradient is infinite."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone()
        gradient.view(-1)[0] = torch.inf
        return gradient


# -- observers: what happens to a rank, and when ----------------------------------------------------------------------


@dataclasses.dataclass
class At:
    """Calls `act` in one rank when a part begins for the n-th time; once, however often the ranks are started again."""

    part: str
    times: int
    rank: int
    marker: str
    """A file that says it has happened."""
    seen: int = 0

    def __call__(self, part: str) -> None:
        if part != self.part or int(os.environ["RANK"]) != self.rank:
            return
        self.seen += 1
        if self.seen == self.times and not os.path.exists(self.marker):
            Path(self.marker).touch()
            self.act()

    def act(self) -> None:
        """Kill -9."""
        os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass
class InOrder:
    """Several of them, one after the other: the next one counts once the one before has happened."""

    all: list[At]

    def __call__(self, part: str) -> None:
        for at in self.all:
            if not os.path.exists(at.marker):
                at(part)
                return


class Terminate(At):
    """SIGTERM instead, as a node sends it before it goes."""

    def act(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _rank_main(Connection(int(sys.argv[1])))
