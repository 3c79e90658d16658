"""Trains LI-DiT: the feature table -> checkpoints, through Ray Train and DeepSpeed.

Reads latents and prompt embeddings from the store (never an image, never an LLM) and writes into `<storage>/<name>`:
checkpoints, metrics.jsonl, TensorBoard, sample grids. The same command goes on where the run stopped, on any number of GPUs
that divides the batch. With no arguments it trains the demo recipe `scenes` on ./store.
`--recipe NAME` starts from another recipe; `--config FILE.yaml` and dotted flags change any field of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from lidit.cli import run
from lidit.runtime.heartbeat import HEARTBEAT_SECONDS
from lidit.runtime.lease import Lease, LeaseHeld, LeaseLost
from lidit.runtime.outage import is_away
from lidit.runtime.places import settled
from lidit.runtime.result import JobResult, filled
from trainer.checkpoints.manifest import steps_in
from trainer.checkpoints.save import Observe
from trainer.config import TrainConfig
from trainer.data.tables import Tables, pinned_versions, write_versions
from trainer.engine.signals import STOP
from trainer.recipes import RECIPES
from trainer.storage import Storage

__all__ = ["RECIPES", "TrainConfig", "TrainResult", "main"]


@dataclass
class TrainResult(JobResult):
    """Result of a start of a run. `ok` if all steps that were asked for are done."""

    LINES = (
        "train: {status}, {run} at step {step:,} of {total_steps:,} (from {resumed_from:,}), {images_seen:,} images seen, "
        "{seconds:,.1f} s",
        "  loss       {last[loss]:.4f} at step {last[step]:,}, after {first[loss]:.4f} at step {first[step]:,}",
        "  speed      {last[samples_per_second]:,.1f} samples/s, data wait {last[data_wait]:.1%}",
        "  held out   {validation[loss]:.4f}{ema} at step {validation[step]:,}",
        "  skipped    {skipped_steps:,} steps had a loss or gradient that was not finite",
        "  warning    {warnings}",
        "  folder     {folder}",
        "  next       {next}",
    )

    run: str
    folder: str
    ok: bool = False
    dry_run: bool = False
    plan: list[str] = field(default_factory=list)  # of a dry run
    status: str = ""  # done, stopped
    step: int = 0
    total_steps: int = 0
    resumed_from: int = 0
    images_seen: int = 0
    skipped_steps: int = 0
    first: dict[str, Any] = field(default_factory=dict)  # line of the run's metrics
    last: dict[str, Any] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)  # the newest
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of this start, Ray included
    next: str = ""

    def lines(self) -> Iterator[str]:
        """Says how far the run is, what came of it, and what to do next."""
        ema = f", EMA {self.validation['ema_loss']:.4f}" if "ema_loss" in self.validation else ""
        return filled(self.LINES, {**vars(self), "ema": ema})


def main(config: TrainConfig, observe: Observe | None = None) -> TrainResult:
    """Runs the job.

    Args:
        config: the run.
        observe: called in every worker with the name of what begins: `data`, `forward`, `backward`, `check`, `step`,
            `validate`, `save:shards` and so on. For profilers and fault tests.

    Raises:
        ValueError: the table lacks something, or the run's checkpoint was made otherwise.
        RuntimeError: a checkpoint could not be saved, losses are not finite, or workers failed more than `max_failures` times.
    """
    start = time.monotonic()
    config = settled(config)
    storage = Storage(f"{config.storage}/{config.name}")
    summary = TrainResult(config.name, storage.uri, total_steps=config.total_steps)
    if config.dry_run:
        return dataclasses.replace(summary, ok=True, dry_run=True, plan=_plan(config))
    _check_resume_mode(config, storage)
    with only_driver(storage) as lease:
        pinned = pinned_versions(storage)
        tables = Tables(config.run_phases, config.data, pinned)
        write_versions(storage, tables, pinned)
        warnings = _told([*tables.pin(storage, pinned), *tables.stale()])
        storage.remove(STOP)
        _start_ray(config)
        config = _resolve_hardware(config)
        storage.write("config.json", json.dumps(config.to_dict(), indent=1).encode())
        outcome = _fit(config, storage, tables.versions, observe, lease)
        if outcome["status"] == "failed":
            raise (ValueError if outcome["input"] else RuntimeError)(outcome["error"])
        if outcome["step"] == config.total_steps:
            lease.check()  # tags belong to the run: if another driver has taken over, they are in use
            warnings += _told(tables.unpin(storage))
    known = {f.name for f in dataclasses.fields(summary)}
    for name, value in outcome.items():
        if name in known:
            setattr(summary, name, value)
    summary.warnings = [*warnings, *summary.warnings]
    summary.ok, summary.seconds = outcome["status"] == "done", time.monotonic() - start
    export = f"lidit export --run {summary.folder} --out weights"
    summary.next = export if summary.step == summary.total_steps else "the same command goes on from here"
    return summary


def _told(warnings: list[str]) -> list[str]:
    for warning in warnings:
        print(f"lidit train: WARNING: {warning}", file=sys.stderr, flush=True)
    return warnings


# -- the driver: the only one of its run, takes signals while Ray Train works -----------------------------------------


@contextlib.contextmanager
def only_driver(storage: Storage) -> Iterator[Lease]:
    """Holds the run's lease, so that no other driver trains the run. Raises ValueError if one does."""
    with contextlib.ExitStack() as stack:
        try:
            lease = stack.enter_context(Lease(storage.uri, "driver"))
        except LeaseHeld as held:
            raise ValueError(
                f"{held}: wait for it, stop it (it saves first), or give this run another `name`"
            ) from held
        yield lease


@contextlib.contextmanager
def stopped_by_signals(storage: Storage) -> Iterator[None]:
    """Makes SIGTERM and Ctrl-C ask the workers to save and stop; a second Ctrl-C does not wait for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    # In memory, not in the storage: that may be away, and a second Ctrl-C must not wait for it.
    asked = threading.Event()

    def handle(signum: int, frame: Any) -> None:
        if asked.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()
        print("lidit train: stopping after this step; it is saved first", file=sys.stderr, flush=True)
        storage.write(STOP, b"")

    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        storage.remove(STOP)


def in_thread(act: Callable[[], Any], lease: Lease) -> Any:
    """Calls `act` in another thread, so that this one handles signals meanwhile; returns or raises what `act` does.

    Raises:
        LeaseLost: this driver was suspended for so long that another one may train the run now.
    """
    outcome: Future[Any] = Future()

    def run() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="fit", daemon=True)
    thread.start()
    checked = time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        if time.monotonic() - checked > HEARTBEAT_SECONDS:
            checked = time.monotonic()
            _check_lease(lease)
    return outcome.result()


def _check_lease(lease: Lease) -> None:
    """Raises LeaseLost if another driver holds the run now; while storage is away the next check decides."""
    try:
        lease.check(wait=False)
    except LeaseLost:
        raise
    except Exception as error:
        if not is_away(error) and not isinstance(error, OSError):
            raise


# -- Ray --------------------------------------------------------------------------------------------------------------


def _start_ray(config: TrainConfig) -> None:
    """Starts Ray; a local one gets at least the CPUs that the ranks ask for."""
    import ray

    from lidit.runtime.cluster import start_ray

    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # paths in the config are the user's
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    start_ray(ray, num_cpus=max(os.cpu_count() or 1, math.ceil(config.num_workers * config.cpus_per_worker)))


def _resolve_hardware(config: TrainConfig) -> TrainConfig:
    """Sets `use_gpu` if it is null: whether the cluster has GPUs. Refuses more ranks than a local machine has GPUs."""
    import ray

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0)
    use_gpu = config.use_gpu if config.use_gpu is not None else gpus > 0
    if use_gpu and gpus < config.num_workers and not os.environ.get("RAY_ADDRESS"):
        raise ValueError(
            f"num_workers {config.num_workers}: each needs a GPU, this machine has {gpus:g}; lower num_workers, set use_gpu to "
            f"false, or submit the job to a cluster"
        )
    return dataclasses.replace(config, use_gpu=use_gpu)


def _fit(
    config: TrainConfig, storage: Storage, versions: dict[str, int], observe: Observe | None, lease: Lease
) -> dict[str, Any]:
    """Runs the workers under Ray Train while this driver holds the lease; returns what rank 0 returned."""
    import pyarrow.fs
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from trainer.worker import train_worker

    assert config.use_gpu is not None
    settings = {"config": config.to_dict(), "versions": versions, "observe": observe, "lease": lease.number}
    trainer = _trainer_class()(
        train_worker,  # type: ignore[arg-type]  # what it returns comes back in the result
        train_loop_config=settings,
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
            accelerator_type=config.accelerator_type if config.use_gpu else None,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # the stub knows the older one
            name=f"{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=storage.path("ray"),
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(storage.fs)),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[_sigterm_callback()],
            worker_runtime_env={"env_vars": _worker_environment(config)},
            logging_config=LoggingConfig("ERROR"),
        ),
    )
    with stopped_by_signals(storage):
        try:
            return in_thread(trainer.fit, lease).return_value
        except TrainingFailedError as error:
            raise RuntimeError(
                f"run {config.name!r} failed more than max_failures {config.max_failures} times, at last with "
                f"{_reason(error)}. What is saved is kept, the same command goes on"
            ) from error


def _reason(error: Exception) -> str:
    """Returns the last line of the first failed rank's error."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        return f"rank {rank}: {(str(failure).strip() or repr(failure)).splitlines()[-1]}"
    return (str(error).strip() or repr(error)).splitlines()[-1]


def _trainer_class() -> Any:
    """Returns Ray's TorchTrainer; for a local Ray a subclass without its cleaner.

    The cleaner is for clusters whose driver dies, and asks the dashboard, which a local Ray lacks, every second."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    class LocalTrainer(TorchTrainer):
        """A trainer for a local Ray, which ends with its driver: there is nothing to clean up."""

        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # the stub knows the older one
            return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]

    return TorchTrainer if os.environ.get("RAY_ADDRESS") else LocalTrainer


def _worker_environment(config: TrainConfig) -> dict[str, str]:
    threads = str(max(1, int(config.cpus_per_worker)))
    return {"OMP_NUM_THREADS": threads, **({} if config.use_gpu else {"DS_ACCELERATOR": "cpu"})}


def _sigterm_callback() -> Any:
    """Returns a callback that lets workers save on SIGTERM: only a worker's main thread can install the handler."""
    from ray.train.v2._internal.execution.callback import WorkerCallback

    class SaveOnSigterm(WorkerCallback):
        """Called in the main thread of every worker."""

        def after_init_train_context(self) -> None:
            from trainer.engine.signals import install_sigterm

            install_sigterm()

    return SaveOnSigterm()


def _check_resume_mode(config: TrainConfig, storage: Storage) -> None:
    steps = steps_in(storage)
    if config.resume == "must" and not steps:
        raise ValueError(f"resume: must, but {storage.uri} has no checkpoint; is it the right `storage` and `name`?")
    if config.resume == "never" and steps:
        raise ValueError(
            f"resume: never, but {storage.uri} has a checkpoint at step {steps[-1]:,}; give the run another `name`, or set "
            f"resume to auto"
        )


def _plan(config: TrainConfig) -> list[str]:
    """Returns the lines of a dry run: what the run would need."""
    from trainer.data.survey import survey
    from trainer.planner.estimate import estimate

    tables, unknown = {}, []
    for number, phase in enumerate(config.run_phases):
        try:
            features = Tables((phase,), config.data, {}).features(0)
            tables[number] = (features, survey(features, config.data.holdout))
        except ValueError as error:
            unknown.append(f"note       phase {number}: {error}")
    return [*estimate(config, config.num_workers, tables).lines(), *unknown]


if __name__ == "__main__":
    run("train")
