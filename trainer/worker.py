"""One rank of a run: what Ray Train calls in every worker process, from the checkpoint to the last step."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

from trainer.checkpoints.resume import Layout, LocalCheckpoint, Resume, load_engine
from trainer.checkpoints.save import Checkpoints, Observe, SaveFailed
from trainer.config import TrainConfig
from trainer.data.check import DamagedData, DataCheck
from trainer.data.tables import Tables
from trainer.engine.ema import EMA
from trainer.engine.engine import build_engine, prepare_process
from trainer.engine.ranks import Ranks, told_to_ranks
from trainer.engine.signals import StopFile
from trainer.loop import Loop, NotFinite, Progress, TrainState
from trainer.monitor.metrics import MetricsWriter
from trainer.monitor.report import Report
from trainer.monitor.validation import Validation
from trainer.storage import Storage


@told_to_ranks
class WrongInput(ValueError):
    """Tables, checkpoint and config do not fit together; raised on all ranks."""


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """Trains; returns what the driver tells the user: `status` done, stopped or failed, and figures.

    What the ranks have found out together, and what trying again would not mend, is returned; anything else is raised, and
    Ray Train starts the ranks again.

    Args:
        settings: `config` (of `TrainConfig.to_dict`), `versions` of the tables, `observe` (may be None), `lease` (number of the
            driver's lease; missing: it has none).
    """
    config = TrainConfig.from_dict(settings["config"])
    prepare_process(config.use_gpu, config.cpus_per_worker)
    try:
        return train(config, settings["versions"], settings.get("observe") or _nothing, settings.get("lease", 0))
    except (SaveFailed, NotFinite, WrongInput, DamagedData) as error:
        return {"status": "failed", "error": str(error), "input": isinstance(error, WrongInput)}


def train(
    config: TrainConfig, versions: dict[str, int], observe: Observe = lambda part: None, lease: int = 0
) -> dict[str, Any]:
    """Trains on one rank, in an initialized process group. Returns the same on all ranks except for figures."""
    ranks, storage = Ranks.here(), Storage(f"{config.storage}/{config.name}")
    tables = Tables(config.run_phases, config.data, versions)
    checkpoints = Checkpoints(storage, ranks, config.checkpoint, observe, lease)
    ranks.from_first(checkpoints.clean_up)
    resume = Resume(storage, ranks, Layout(ranks.world_size, config.zero.stage))
    with resume.newest() as checkpoint:
        changes = ranks.from_first(lambda: _check(config, checkpoint, tables, ranks))
        engine = build_engine(
            config, tables.model_config(config.model), ranks, checkpoint is not None and checkpoint.universal
        )
        state = _restore(checkpoint, engine, with_average=config.ema.decay > 0)
    progress = state.progress
    with contextlib.ExitStack() as stack:
        report = stop = None
        if ranks.first:
            writer = MetricsWriter(storage, config.metrics, config.name, progress.step, config.to_dict())
            stack.callback(writer.close)
            writer.started(progress.step, ranks.world_size)
            report = Report(writer, config.total_steps)
            stop = stack.enter_context(StopFile(storage))
            _say_begin(report, config, progress.step, changes)
        check = None
        if config.data.verify:
            features = [tables.features(number) for number in range(len(config.phases))]
            check = stack.enter_context(DataCheck(features, ranks.rank, ranks.world_size))

        def asked_to_stop() -> bool:
            return (check is not None and bool(check.found)) or (stop is not None and stop.requested)

        started = progress.step
        done = Loop(config, ranks, tables, state, checkpoints, report, asked_to_stop, observe).run()
        if check is not None:
            _check_data(check, ranks, report, progress.step)
    engine.destroy()
    return {
        "status": "done" if done else "stopped",
        "resumed_from": started,
        **dataclasses.asdict(progress),
        "images_seen": config.phase_at(progress.step)[2],
        "first": report.first if report else {},
        "last": report.last if report else {},
        "validation": report.validation if report else {},
        "warnings": resume.warnings,
    }


def _check(config: TrainConfig, checkpoint: LocalCheckpoint | None, tables: Tables, ranks: Ranks) -> list[str]:
    """Checks on rank 0 that the run may start, or resume from a checkpoint; returns the settings that changed since."""
    number, step_in_phase, _ = config.phase_at(checkpoint.step if checkpoint else 0)
    try:
        table = tables.phase(number)
        if config.validation.every_steps:
            Validation(table, config.validation, config.data, config.vae, config.microbatch_size, ranks)
        if checkpoint is None:
            return []
        changes = config.check_resumable(checkpoint.state)
        tables.check_trained(checkpoint.state, number, begun=step_in_phase > 0)
        return changes
    except ValueError as error:
        raise WrongInput(str(error)) from error


def _check_data(check: DataCheck, ranks: Ranks, report: Report | None, step: int) -> None:
    """Raises DamagedData on all ranks if any of them found a damaged data file."""
    if report is not None and check.files:
        report.say(check.words())
    if damaged := [problem for problem in ranks.gather(check.found) if problem]:
        raise DamagedData(
            f"data are damaged, the run is saved at step {step:,}: {'; '.join(damaged)}. Restore these files, or make their "
            f"columns anew, and run the same command again; `lidit verify` reads all files, data.verify=false trains on"
        )


def _restore(checkpoint: LocalCheckpoint | None, engine: Any, with_average: bool) -> TrainState:
    """Loads a checkpoint into the engine; returns the state with the average, restored or new, and the progress."""
    if checkpoint is None:
        return TrainState(engine, EMA(engine) if with_average else None, Progress())
    load_engine(checkpoint, engine)
    ema = EMA(engine) if with_average else None
    if ema is not None and checkpoint.ema:
        ema.load(list(checkpoint.ema))
    progress = Progress(**{field.name: checkpoint.state[field.name] for field in dataclasses.fields(Progress)})
    return TrainState(engine, ema, progress)


def _say_begin(report: Report, config: TrainConfig, step: int, changes: list[str]) -> None:
    where = f"from step {step:,}" if step else "from the start"
    report.say(f"{config.name} {where}, {config.num_workers} ranks, ZeRO stage {config.zero.stage}, {config.precision}")
    for change in changes:
        report.say(f"changed since the checkpoint: {change}")


def _nothing(part: str) -> None:
    """Default of `observe`."""
