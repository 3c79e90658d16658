"""The scheduled job: new shards of the sources -> ingest -> recaption -> embed -> latents -> verify, on what is new.

    lidit preprocess --config preprocess.yaml                      # now and then, by hand or by a schedule
    lidit preprocess --config preprocess.yaml --if-busy wait --wait-seconds 3600
    lidit preprocess --config preprocess.yaml --dry-run

One run brings the whole table up to date; a run with nothing new changes nothing. Killed at any point, the next schedule goes
on where it was. A lease in the store keeps two runs apart. The result is one JSON object: on stdout, in the run's folder, and
in `<store>/preprocess/last.json` (the last good one in `last_ok.json`). The exit status is 0 where all is done (or another run
is at it), 1 where a stage failed, 2 where the config is wrong. docs/operations.md says what to alert on.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import fsspec
import yaml

from lidit.cli import run
from lidit.runtime.durable import flushed_commit
from lidit.runtime.fields import JobConfig, NonNegativeFloat, to_plain
from lidit.runtime.files import replace_file
from lidit.runtime.lease import Lease, LeaseHeld, LeaseLost
from lidit.runtime.outage import outlast
from lidit.runtime.places import absolute, settled
from lidit.runtime.result import JobResult, filled
from lidit.runtime.uris import shown
from lidit.store import columns
from pipelines import embed, ingest, latents, recaption, verify
from pipelines.embed import EmbedConfig
from pipelines.engine.retention import VERIFIED_TAG, RetentionConfig, clean_up, tagged_versions
from pipelines.engine.runs import Run
from pipelines.engine.table import Table, samples_of
from pipelines.ingest import IngestConfig
from pipelines.latents import LatentsConfig
from pipelines.recaption import RecaptionConfig
from pipelines.verify import VerifyConfig

StageName = Literal["ingest", "recaption", "embed", "latents", "verify"]
STAGES: tuple[StageName, ...] = ("ingest", "recaption", "embed", "latents", "verify")
FOLDER = "preprocess"  # folder in the store: the lease, and the last result
LAST, LAST_OK = "last.json", "last_ok.json"
DEFAULT_STORE = "./store"


@dataclass(frozen=True)
class PreprocessConfig(JobConfig):
    """The scheduled job. The stages' own `store`, `dry_run`, `overwrite` and `reread` are not set here."""

    store: str = DEFAULT_STORE
    """Folder or URI of the feature store; made if it is not there."""
    stages: Sequence[StageName] = STAGES
    """Which stages run, always in this order. Prompt tables have no images: embed and verify."""
    ingest: Sequence[IngestConfig] = ()
    """The sources, each with the options of `lidit ingest`; what of them is new is taken in."""
    recaption: RecaptionConfig = RecaptionConfig()
    """As for `lidit recaption`."""
    embed: EmbedConfig = EmbedConfig()
    """As for `lidit embed`."""
    latents: LatentsConfig = LatentsConfig()
    """As for `lidit latents`."""
    verify: VerifyConfig = VerifyConfig(sample=0)
    """As for `lidit verify`; without `since`, what has changed since the last run that found nothing wrong. `sample` loads all
    LLMs into the driver's process, on its CPU: none by default."""
    retention: RetentionConfig = RetentionConfig()
    """Which old versions of the tables stay readable."""
    if_busy: Literal["leave", "wait"] = "leave"
    """What to do while another run works on the store: leave it to that one, or wait and then look for what is left."""
    wait_seconds: NonNegativeFloat = 3600.0
    """How long to wait at most, with `if_busy: wait`; then the run fails. A run killed on another machine counts as gone after
    900 s."""
    dry_run: bool = False
    """Print the plan of every stage and exit; what a stage would read of an earlier one may not be there yet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or not self.stages or len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages: expected some of {', '.join(STAGES)}, each once, received {list(self.stages)}")
        if "ingest" in self.stages and not self.ingest:
            raise ValueError(
                "ingest: expected at least one source, such as `ingest: [{source: 'webdataset:s3://bucket/set'}]`; or leave "
                "ingest out of `stages`"
            )
        for name, part in self.parts():
            _check_part(name, part, self.store)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """(name, config) of every stage's config."""
        for number, source in enumerate(self.ingest):
            yield f"ingest.{number}", source
        for name in STAGES[1:]:
            yield name, getattr(self, name)


@dataclass
class PreprocessResult(JobResult):
    """PreprocessResult of a run. `ok` unless a stage failed or found something wrong."""

    job: str = field(default="preprocess", init=False)
    store: str
    run: str = ""
    status: str = ""  # done, busy (another run is at it), failed
    ok: bool = False
    dry_run: bool = False
    failed_stage: str = ""
    error: str = ""
    new_rows: int = 0  # taken in by this run
    version: int = 0  # version of the samples table at the end
    stages: list[dict[str, Any]] = field(default_factory=list)  # summaries, in the order they ran
    retention: dict[str, Any] = field(default_factory=dict)
    started: str = ""  # UTC
    seconds: float = 0.0
    plan: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Says how the run ended; each stage has printed its own text before."""
        words = {"done": "done", "busy": "left, another run is at work", "failed": f"FAILED in {self.failed_stage}"}
        yield f"preprocess: {words[self.status]}, {self.new_rows:,} new rows, {self.seconds:,.1f} s"
        yield from filled(["  error      {error}"], vars(self))
        if self.retention:
            kept = ", ".join(f"{tag} ({version})" for tag, version in self.retention["tagged"].items())
            freed = f"{self.retention['removed']:,} old versions removed, {self.retention['bytes_freed'] / 1e6:,.1f} MB"
            yield f"  versions   {freed}; kept by a tag: {kept or 'none'}"
        if self.status == "failed":
            yield "  next       mend the cause; the next schedule (or the same command) goes on from here"
        yield f"  table      {self.store.rstrip('/')}/{columns.SAMPLES_TABLE}, version {self.version}"


def main(config: PreprocessConfig) -> PreprocessResult:
    """Runs the stages, one after the other, on what each of them lacks.

    A stage's failure is no exception here: it is in the result, which is written down all the same.
    """
    config = settled(config)
    result = PreprocessResult(config.store, started=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", dry_run=config.dry_run)
    start = time.monotonic()
    if config.dry_run:
        result.plan, result.ok = _plan(config), True
        return result
    try:
        wait_seconds = config.wait_seconds if config.if_busy == "wait" else 0.0
        with Lease(config.store, FOLDER, wait_seconds) as lease, Run(config.store, FOLDER) as run:
            result.run = run.id
            run.write("config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False))
            _run_stages(config, lease, result)
            result.seconds = time.monotonic() - start
            run.write("summary.json", result.to_json())
            _write_last(result, lease)
    except LeaseHeld as held:
        print(f"preprocess: {held}", file=sys.stderr, flush=True)
        result.error = str(held)
        result.status, result.ok = ("busy", True) if config.if_busy == "leave" else ("failed", False)
        result.failed_stage = "" if result.ok else "lease"
    result.seconds = time.monotonic() - start
    return result


def _run_stages(config: PreprocessConfig, lease: Lease, result: PreprocessResult) -> None:
    """Fills the result, up to the first stage that fails."""
    for name, act in _acts(config):
        try:
            lease.check()
            summary = act()
        except Exception as error:  # whatever it is: a schedule's result must say so
            if not isinstance(error, (ValueError, RuntimeError, OSError)) or isinstance(error, LeaseLost):
                traceback.print_exc()
            result.status, result.failed_stage, result.error = "failed", name, _words(error)
            return
        print(summary.to_text(), file=sys.stderr, flush=True)
        result.stages.append(summary.values())
        result.new_rows += summary.rows if name == "ingest" else 0
        if not summary.ok:
            problems = [problem for of_check in getattr(summary, "problems", {}).values() for problem in of_check]
            result.status, result.failed_stage = "failed", name
            result.error = problems[0] if problems else f"{name} did not finish"
            return
    try:
        lease.check()
        result.retention = clean_up(config.store, config.retention)
        result.version = _samples(config).open().version
    except (ValueError, RuntimeError, OSError) as error:
        result.status, result.failed_stage, result.error = "failed", "retention", _words(error)
        return
    result.status, result.ok = "done", True


def _acts(config: PreprocessConfig) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(stage, what runs it) in order; a stage's config is resolved when it is its turn."""
    jobs = {"recaption": recaption, "embed": embed, "latents": latents}
    for name in STAGES:
        if name not in config.stages:
            continue
        if name == "ingest":
            for source in config.ingest:
                yield name, _bound(ingest.main, dataclasses.replace(source, store=config.store))
        elif name == "verify":
            yield name, lambda: _verify(config)
        else:
            own = dataclasses.replace(getattr(config, name), store=config.store)
            yield name, _bound(jobs[name].main, own)


def _bound(act: Callable[[Any], Any], config: Any) -> Callable[[], Any]:
    return lambda: act(config)


def _verify(config: PreprocessConfig) -> Any:
    """Verifies what has changed since the version that was verified last, and marks the version it looked at."""
    table = _samples(config)
    tags = table.open().tags
    since = config.verify.since or (VERIFIED_TAG if VERIFIED_TAG in tags.list() else "")
    report = verify.main(dataclasses.replace(config.verify, store=config.store, since=since))
    if report.ok:
        with flushed_commit(table.uri):
            if VERIFIED_TAG in tags.list():
                tags.update(VERIFIED_TAG, report.version)
            else:
                tags.create(VERIFIED_TAG, report.version)
    return report


def _plan(config: PreprocessConfig) -> list[str]:
    """Every stage's own plan, changing nothing."""
    lines = []
    jobs = {"ingest": ingest, "recaption": recaption, "embed": embed, "latents": latents}
    for name, part in config.parts():
        stage = name.partition(".")[0]
        if stage not in config.stages or stage == "verify":
            continue
        lines.append(f"-- {name}")
        try:
            lines += jobs[stage].main(dataclasses.replace(part, store=config.store, dry_run=True)).plan
        except ValueError as error:
            lines.append(f"no plan yet: {error}")
    samples = _samples(config)
    tagged = tagged_versions(samples) if samples.exists() else {}
    lines.append(f"-- versions kept by a tag: {', '.join(tagged) or 'none'}")
    return lines


def _write_last(result: PreprocessResult, lease: Lease) -> None:
    """Where a monitor looks: the last result, and the last good one, of runs that held the lease to their end."""
    try:
        lease.check()
    except LeaseLost:
        return
    fs, folder = fsspec.core.url_to_fs(f"{result.store.rstrip('/')}/{FOLDER}")
    for name in (LAST, LAST_OK) if result.ok else (LAST,):
        _replace(fs, f"{folder}/{name}", result.to_json().encode())


def _replace(fs: Any, path: str, content: bytes) -> None:
    outlast(lambda: replace_file(fs, path, content), f"writing {path}")


def _samples(config: PreprocessConfig) -> Table:
    return samples_of(config.store)


def _check_part(name: str, part: Any, store: str) -> None:
    """Refuses what a schedule must not say of a stage."""
    if absolute(part.store) not in (absolute(DEFAULT_STORE), absolute(store)):
        raise ValueError(f"{name}.store: expected none, for it is the job's own ({store}); received {part.store!r}")
    for switch in ("dry_run", "overwrite", "stamp", "reread"):
        if getattr(part, switch, False):
            raise ValueError(
                f"{name}.{switch}: not for a job that runs by a schedule; run `lidit {name.partition('.')[0]}` by hand"
            )


def _words(error: BaseException) -> str:
    """The innermost message, with its kind."""
    cause = getattr(error, "cause", None) or error.__cause__
    if isinstance(cause, BaseException) and cause is not error:
        return _words(cause)
    return shown(f"{type(error).__name__}: {str(error).strip()}")


if __name__ == "__main__":
    run("preprocess")
