"""What a step of the whole trainer costs beside a plain torch loop on tensors in memory, and how long it waits for data.

    make demo; python tests/benchmarks/train_step.py --store store

One rank, the demo's recipe and table. **Trainer**: what a worker of `lidit train` runs: loader, DeepSpeed engine, the ranks'
sums, EMA, metrics, TensorBoard; without validation and checkpoints, which are rare. **Plain**: model, fused AdamW, clipping;
the very same batches, made before; nothing else, no EMA. **Engine**: that plain loop with DeepSpeed's engine as model and
optimizer, so that what DeepSpeed costs can be told from what is ours. All take the same steps and must have the same losses.
They take turns in one process, `repeats` times; figures are medians over all steps but the first two of a turn.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import socket
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
import report

from lidit.diffusion import loss_per_sample
from lidit.model import LIDiT
from trainer.config import CheckpointConfig, TrainConfig, ValidationConfig, ZeroConfig
from trainer.data.assemble import Batch
from trainer.data.loader import Batches, BatchSlice
from trainer.data.tables import Tables
from trainer.engine.engine import build_engine, prepare_process, set_learning_rate
from trainer.engine.optimizer import build_optimizer
from trainer.engine.ranks import Ranks
from trainer.monitor.metrics import read_lines
from trainer.recipes import scenes
from trainer.worker import train

WARM = 2  # steps of a turn that do not count
OVERHEAD, WAIT = 0.05, 0.02  # at most


def main() -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--store", default="store", help="the demo's store (store)")
    parser.add_argument("--steps", type=int, default=20, help="of a turn (20)")
    parser.add_argument("--stages", type=int, nargs="+", default=[3, 0], help="ZeRO stages (3 0)")
    args = parser.parse_args()
    made = report.Report("A step of the trainer, one rank, demo recipe")
    join_alone()
    rows, lines = [], []
    for stage in args.stages:
        row, words = compare(args, stage)
        rows.append(row)
        lines += words
    header = [
        "ZeRO",
        "trainer s/step",
        "engine s/step",
        "plain s/step",
        "trainer / plain",
        "trainer / engine",
        "data wait",
    ]
    made.table("; ".join(lines), header, rows)
    made.record(args.record)


def join_alone() -> None:
    """A process group of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(free.getsockname()[1])
    torch.distributed.init_process_group("gloo")


def compare(args: Namespace, stage: int) -> tuple[list[str], list[str]]:
    """All three in turns, at one stage: a row of the table, and what it says about the targets."""
    times: dict[str, list[float]] = {"trainer": [], "engine": [], "plain": []}
    waits, apart = [], 0.0
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            config = recipe(args, stage, folder)
            prepare_process(config.use_gpu, config.cpus_per_worker)
            lines, seconds = run_trainer(config)
            times["trainer"] += seconds
            waits += [line["data_wait"] for line in lines[WARM:]]
            for name in ("engine", "plain"):
                gc.collect()
                losses, seconds = run_bare(config, with_engine=name == "engine")
                times[name] += seconds
                apart = max(apart, max(abs(line["loss"] - loss) for line, loss in zip(lines, losses)))
    trainer, engine, plain = (statistics.median(values) for values in times.values())
    overhead, own, wait = trainer / plain - 1, trainer / engine - 1, statistics.mean(waits)
    seconds_each = [f"{value:.3f}" for value in (trainer, engine, plain)]
    row = [str(stage), *seconds_each, f"{overhead:+.1%}", f"{own:+.1%}", f"{wait:.2%}"]
    words = [
        f"stage {stage}: over the plain loop {report.verdict(overhead, OVERHEAD, at_least=False, form='{:.1%}')}",
        f"over the bare engine {own:.1%}",
        f"data wait {report.verdict(wait, WAIT, at_least=False, form='{:.1%}')}",
        f"losses at most {apart:.1e} apart",
    ]
    return row, words


def recipe(args: Namespace, stage: int, folder: str) -> TrainConfig:
    """The demo's, for one rank and a few steps, a line for each of them."""
    config = scenes()
    return dataclasses.replace(
        config,
        store=str(Path(args.store).absolute()),
        storage=folder,
        num_workers=1,
        phases=(dataclasses.replace(config.phases[0], steps=args.steps),),
        zero=ZeroConfig(stage=stage),
        cpus_per_worker=float(args.threads),
        checkpoint=CheckpointConfig(every_steps=10**6),
        validation=ValidationConfig(),
        metrics=dataclasses.replace(config.metrics, every_steps=1),
    )


def run_trainer(config: TrainConfig) -> tuple[list[dict[str, float]], list[float]]:
    """(its lines of metrics, seconds of each step but the first ones): from one step's beginning to the next one's."""
    begun: list[float] = []
    per_step = config.run_phases[0].split(1)[1]

    def observe(part: str) -> None:
        if part == "data":
            begun.append(time.perf_counter())

    train(config, {}, observe)
    begun = begun[::per_step]
    lines = read_lines(Path(config.storage, config.name, "metrics.jsonl"), "train")
    return lines, np.diff(begun)[WARM:].tolist()


def run_bare(config: TrainConfig, with_engine: bool) -> tuple[list[float], list[float]]:
    """(losses, seconds of each step but the first ones)."""
    tables = Tables(config.run_phases, config.data, {})
    batches, objective = in_memory(config, tables), tables.phase(0).objective
    model, step_taken = bare_engine(config, tables) if with_engine else bare_model(config, tables)
    per_step = config.run_phases[0].split(1)[1]
    losses, begun = [], []
    for step in range(config.total_steps):
        begun.append(time.perf_counter())
        total = 0.0
        for number, batch in enumerate(batches[step * per_step : (step + 1) * per_step]):
            noisy = objective.add_noise(batch.latents, batch.noise, batch.timestep)
            prediction = model(noisy, batch.timestep, batch.prompt_embeds, batch.prompt_mask, batch.instruction_embeds)
            loss = loss_per_sample(objective, prediction, batch.latents, batch.noise, batch.timestep).mean() / per_step
            step_taken(loss, config.optimizer.learning_rate_at(step, config.total_steps), number == per_step - 1)
            total += float(loss.detach())
        losses.append(total)
    return losses, np.diff(begun)[WARM:].tolist()


Step = Callable[[torch.Tensor, float, bool], None]
"""(loss of a microbatch, learning rate, whether it is the step's last): backward, and the optimizer's move after the last."""


def bare_model(config: TrainConfig, tables: Tables) -> tuple[LIDiT, Step]:
    """The model, and how it learns with torch alone."""
    torch.manual_seed(config.seed)
    model = LIDiT(tables.model_config(config.model))
    optimizer = build_optimizer(model, config.optimizer)

    def step(loss: torch.Tensor, learning_rate: float, last: bool) -> None:
        loss.backward()
        if last:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad()

    return model, step


def bare_engine(config: TrainConfig, tables: Tables) -> tuple[Any, Step]:
    """DeepSpeed's engine around the model, and how it learns."""
    engine = build_engine(config, tables.model_config(config.model), Ranks.here())

    def step(loss: torch.Tensor, learning_rate: float, last: bool) -> None:
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(loss, scale_wrt_gas=False)
        if last:
            set_learning_rate(engine, learning_rate)
            engine.step()

    return engine, step


def in_memory(config: TrainConfig, tables: Tables) -> list[Batch]:
    """All microbatches of the run, made beforehand."""
    table, phase = tables.phase(0), config.run_phases[0]
    loader = Batches(
        table,
        config.data,
        config.seed,
        BatchSlice(phase.split(1)[0]),
        range(phase.steps),
    )
    with loader as batches:
        return list(batches)


if __name__ == "__main__":
    main()
