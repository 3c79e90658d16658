"""The DeepSpeed engine of a run: the model (sharded from the start at stage 3), its optimizer, and DeepSpeed around them."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from typing import Any

import torch

from lidit.config import LIDiTConfig
from lidit.model import LIDiT
from trainer.config import TrainConfig
from trainer.engine.optimizer import build_optimizer
from trainer.engine.ranks import Ranks
from trainer.engine.zero import deepspeed_config

NO_DYNAMO = "TORCHDYNAMO_DISABLE"  # read by torch.compile when it is called


def prepare_process(use_gpu: bool | None, cpus: float) -> None:
    """Sets up a worker process before DeepSpeed is imported; calling it again is harmless."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed.*")
    if use_gpu:
        return
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(max(1, int(cpus)))


def build_engine(config: TrainConfig, model_config: LIDiTConfig, ranks: Ranks, universal: bool = False) -> Any:
    """Builds model, optimizer and engine, with the same initial weights on every rank and for every number of ranks.

    Args:
        universal: a checkpoint of another world size will be loaded (see universal.py).
    """
    deepspeed = _import_deepspeed(ranks.device)
    settings = deepspeed_config(
        config.zero,
        model_config,
        config.run_phases,
        ranks.world_size,
        precision=config.precision,
        grad_clip=config.optimizer.grad_clip,
        on_gpu=config.use_gpu is not False,
    )
    if universal:
        settings["checkpoint"] = {"load_universal": True}
    torch.manual_seed(config.seed)
    sharded = config.zero.stage == 3
    with deepspeed.zero.Init(config_dict_or_path=settings) if sharded else contextlib.nullcontext():
        model = LIDiT(model_config)
    model.set_checkpointing(config.model.checkpointing)
    if config.model.compile == "pointwise":
        model.compile_regions()
    elif config.model.compile == "blocks":
        model.compile_blocks()
    optimizer = build_optimizer(model, config.optimizer)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    # No recovery script beside the shards: a failed write of it would raise on one rank while the others wait.
    engine._copy_recovery_script = lambda save_path: None
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Sets the learning rate of the next optimizer step, in all groups."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def _import_deepspeed(device: torch.device) -> Any:
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at the first run, 44 s; gloo does as well for a few processes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False)
    return deepspeed


def _import_muon() -> None:
    """Imports DeepSpeed's Muon with torch.compile disabled.

    DeepSpeed imports it anyway, to see whether an optimizer is one; its decorators would import a compiler that nobody uses,
    seconds in every process."""
    before = os.environ.get(NO_DYNAMO)
    os.environ[NO_DYNAMO] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        if before is None:
            del os.environ[NO_DYNAMO]
        else:
            os.environ[NO_DYNAMO] = before
