"""Does the embed job stay small when the table grows? Memory of driver and actor, and the share of time that commits take.

- driver: peak memory of the driver process (ingest's and embed's) for tables of 1,000 to 100,000 rows, 1,000 a fragment.
- actor: peak memory of the one actor on a table of one fragment of 2,048 to 32,768 rows, longer prompts, fp32 storage. A
  window holds 8,192 rows. While one is encoded the one before is written: beyond two a larger fragment costs no more.
- commits: seconds spent committing over seconds of work, with a table of 1,000 fragments of 4 rows and default settings.

Every job runs in a process of its own; the cases take turns; figures are medians over the repeats. Memory is the kernel's
high-water mark of resident memory. Models: the tiny LLMs of ../shared/data or $LIDIT_TEST_DATA.

    python tests/benchmarks/scaling.py --parts driver actor commits
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import report

from lidit.frozen.text import EncoderConfig

DRIVER_ROWS = (1_000, 10_000, 100_000)
DRIVER_FRAGMENT = 1_000
ACTOR_ROWS = (2_048, 8_192, 16_384, 32_768)
COMMIT_FRAGMENTS, COMMIT_ROWS = 1_000, 4
FLAT = 1.1  # of the smallest table's peak; of the second largest fragment's
COMMIT_SHARE = 0.01
SAMPLE_SECONDS = 0.05


def short_prompts(rows: int) -> list[str]:
    """A few tokens each, all different."""
    return [f"{number} red cats" for number in range(rows)]


def long_prompts(rows: int) -> list[str]:
    """Real prompts with a number before them, all different."""
    base = [" ".join(prompt.split()) for prompt in report.real_prompts()]
    random.Random(0).shuffle(base)
    return [f"{row}. {base[row % len(base)]}" for row in range(rows)]


def peak_mb(process: int | str = "self") -> float:
    """High-water mark of a process's resident memory, 0 where it is gone."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3 if "VmHWM:" in status else 0.0


class ActorWatch:
    """Peak memory of the actors that this process's Ray has started, sampled while the job runs."""

    def __init__(self) -> None:
        self.peak = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> ActorWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        own = os.getpid()
        while not self._stop.wait(SAMPLE_SECONDS):
            parents = _parents()
            for process in parents:
                if _is_below(process, own, parents) and "_UnitCaller" in _title(process):
                    self.peak = max(self.peak, peak_mb(process))


def _parents() -> dict[int, int]:
    """Process -> its parent, for all."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def _is_below(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    while process in parents and process != ancestor:
        process = parents[process]
    return process == ancestor


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def ingest(store: str, file: str, rows_per_fragment: int) -> dict[str, float]:
    """The prompts of the file as a table; peak memory of the driver."""
    from pipelines import ingest as job

    summary = job.main(job.IngestConfig(f"prompts:{file}", store, rows_per_fragment))
    return {**json.loads(summary.to_json()), "driver_mb": peak_mb()}


def embed(store: str, model: str, codec: str, threads: int) -> dict[str, float]:
    """The embed job with one actor; peak memory of driver and actor."""
    from pipelines import embed as job
    from pipelines.engine.pool import ActorsConfig

    encoder = EncoderConfig("tiny", model, template="plain", dtype="fp32", codec=codec)  # type: ignore[arg-type]
    config = job.EmbedConfig(
        store=store, encoders=(encoder,), actors=ActorsConfig(min=1, max=1, num_cpus=threads, num_gpus=0)
    )
    with ActorWatch() as watch:
        summary = job.main(config)
    return {**json.loads(summary.to_json()), "driver_mb": peak_mb(), "actor_mb": watch.peak}


def alone(what: str, **arguments: object) -> dict[str, float]:
    """Runs `ingest` or `embed` in a process of its own."""
    return report.alone(__file__, what, **arguments)


def run_case(prompts: list[str], rows_per_fragment: int, model: str, codec: str, threads: int) -> dict[str, float]:
    """Ingests and embeds; the embed summary, and the ingest driver's memory."""
    with tempfile.TemporaryDirectory() as folder:
        file, store = Path(folder, "prompts.txt"), f"{folder}/store"
        file.write_text("\n".join(prompts), "utf-8")
        ingested = alone("ingest", store=store, file=str(file), rows_per_fragment=rows_per_fragment)
        model_folder = str((report.data_folder() / "models" / model).resolve())
        done = alone("embed", store=store, model=model_folder, codec=codec, threads=threads)
        assert done["ok"] and done["rows"] == len(prompts), done
        return {**done, "ingest_driver_mb": ingested["driver_mb"]}


def medians(runs: Sequence[dict[str, float]], *keys: str) -> list[float]:
    return [statistics.median(run[key] for run in runs) for key in keys]


def driver_part(made: report.Report, runs: dict[int, list[dict[str, float]]]) -> None:
    rows, peaks = [], {}
    for size, results in runs.items():
        ingested, peak, work, rate = medians(
            results, "ingest_driver_mb", "driver_mb", "work_seconds", "rows_per_second"
        )
        peaks[size] = peak
        rows.append([
            f"{size:,}", f"{results[0]['fragments']:,}", f"{peak:.0f}", f"{ingested:.0f}", f"{work:.1f}", f"{rate:,.0f}",
        ])  # fmt: skip
    growth = report.verdict(max(peaks.values()) / peaks[min(peaks)], FLAT, at_least=False, form="{:.2f}x")
    header = ["rows", "fragments", "embed driver MB", "ingest driver MB", "work s", "rows/s"]
    made.table(f"driver: peak memory; embed's largest over its smallest table's {growth}", header, rows)


def actor_part(made: report.Report, runs: dict[int, list[dict[str, float]]]) -> None:
    rows, peaks = [], {}
    for size, results in runs.items():
        peak, written = medians(results, "actor_mb", "bytes_written")
        peaks[size] = peak
        rows.append([f"{size:,}", f"{written / 1e6:,.0f}", f"{peak:.0f}"])
    *_, window, largest = sorted(peaks)
    growth = report.verdict(peaks[largest] / peaks[window], FLAT, at_least=False, form="{:.2f}x")
    title = f"actor: peak memory on one fragment; {largest:,} rows over {window:,} {growth}"
    made.table(title, ["rows of the fragment", "embeddings MB", "actor MB"], rows)


def commit_part(made: report.Report, runs: list[dict[str, float]]) -> None:
    work, seconds, commits = medians(runs, "work_seconds", "commit_seconds", "commits")
    share = statistics.median(run["commit_seconds"] / run["work_seconds"] for run in runs)
    verdict = report.verdict(share, COMMIT_SHARE, at_least=False, form="{:.2%}")
    row = [f"{runs[0]['fragments']:,}", f"{work:.1f}", f"{commits:.0f}", f"{seconds:.3f}", verdict]
    made.table("commits", ["fragments", "work s", "commits", "commit s", "share"], [row])


def main() -> None:
    parser = report.parser(__doc__)
    parts = ("driver", "actor", "commits")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which of the three (all)")
    parser.add_argument("--driver-rows", type=int, nargs="+", default=DRIVER_ROWS, help="tables of the driver part")
    parser.add_argument("--actor-rows", type=int, nargs="+", default=ACTOR_ROWS, help="fragments of the actor part")
    parser.add_argument("--fragments", type=int, default=COMMIT_FRAGMENTS, help="of the commits part (1000)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, arguments = options.child
        print(json.dumps({"ingest": ingest, "embed": embed}[what](**json.loads(arguments))))
        return
    threads = options.threads
    driver: dict[int, list[dict[str, float]]] = {size: [] for size in sorted(options.driver_rows)}
    actor: dict[int, list[dict[str, float]]] = {size: [] for size in sorted(options.actor_rows)}
    commits: list[dict[str, float]] = []
    for _ in range(options.repeats):
        for size in driver if "driver" in options.parts else ():
            driver[size].append(run_case(short_prompts(size), DRIVER_FRAGMENT, "stories260K", "bf16", threads))
        for size in actor if "actor" in options.parts else ():
            actor[size].append(run_case(long_prompts(size), size, "babyllama-tok105", "fp32", threads))
        if "commits" in options.parts:
            prompts = short_prompts(options.fragments * COMMIT_ROWS)
            commits.append(run_case(prompts, COMMIT_ROWS, "stories260K", "bf16", threads))
    made = report.Report(f"Scaling of the embed job, one actor of {threads} CPU, medians of {options.repeats}")
    if "driver" in options.parts:
        driver_part(made, driver)
    if "actor" in options.parts:
        actor_part(made, actor)
    if commits:
        commit_part(made, commits)
    made.record(options.record)


if __name__ == "__main__":
    main()
