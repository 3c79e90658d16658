"""What the benchmarks share: real prompts, a table on the screen, and a section of RESULTS.md with all that was measured.

Needs only torch and transformers: `rich` makes the tables prettier where it is installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
LIBRARIES = ("torch", "transformers", "tokenizers", "ray", "pylance", "pyarrow", "numpy")


def parser(description: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """The flags that all of them have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--repeats", type=int, default=repeats, help=f"figures are medians over them ({repeats})")
    made.add_argument("--threads", type=int, default=1, help="torch threads (1)")
    made.add_argument(
        "--record", nargs="?", type=Path, const=RESULTS, metavar="FILE", help="append the figures (to RESULTS.md here)"
    )
    return made


def data_folder() -> Path:
    """The folder of real prompts and small models; exits with a word where it is not there."""
    folder = Path(os.environ.get("LIDIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        sys.exit(
            f"this benchmark needs the test data: expected it in {folder}, or in the folder $LIDIT_TEST_DATA names"
        )
    return folder


def real_prompts(train: bool = False) -> list[str]:
    """T2I-CompBench validation (2,400), PartiPrompts (1,632), dense DrawBench (200), in file order; `train`: 5,600 more."""
    data = data_folder()
    files = sorted((data / "t2i-compbench" / "dataset").glob("*_val.txt"))
    if train:
        files += sorted((data / "t2i-compbench" / "dataset").glob("*_train.txt"))
    files.append(data / "drawbench" / "drawbench_upsampled.txt")
    prompts = [line for file in files for line in file.read_text("utf-8").splitlines() if line.strip()]
    parti = (data / "parti" / "PartiPrompts.tsv").read_text("utf-8").splitlines()[1:]
    return prompts + [line.split("\t")[0] for line in parti]


def machine(gpu: str = "") -> str:
    """Cores, processor, memory and library versions in words; nothing that tells whose machine it is."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    name, memory = platform.processor() or platform.machine(), "memory unknown"
    if cpuinfo.exists():
        found = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = found[0] if found else name
    if meminfo.exists():
        memory = f"{int(meminfo.read_text().split()[1]) / 1e6:.0f} GB"
    versions = [f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            versions.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return f"{os.cpu_count()} cores of {name}, {memory}{f', {gpu}' if gpu else ''}; {', '.join(versions)}"


def commit() -> str:
    """Short hash of the checkout, marked where the sources differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "lidit", "pipelines")
        return git("rev-parse", "--short", "HEAD") + (" and changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def command() -> str:
    """The command line, absolute paths cut to their last part."""
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *words])


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        print(f"\n{title}")
        for row in [header, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)))
        return
    table = Table(*header, title=title, title_justify="left")
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


class Report:
    """Tables of one run: shown at once, recorded together at the end."""

    def __init__(self, title: str, gpu: str = ""):
        self.lines = [f"## {title}", ""]
        self.gpu = gpu

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        show(title, header, rows)
        cells = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in [header, *rows]]
        self.lines += [title, "", cells[0], "|" + "---|" * len(header), *cells[1:], ""]

    def record(self, file: Path | None) -> None:
        """Appends the section, unless `file` is None."""
        if file is None:
            return
        date = datetime.date.today().isoformat()
        about = [f"{date}, commit {commit()}; {machine(self.gpu)}.", "", f"    {command()}", ""]
        text = file.read_text() if file.exists() else "# Results of the benchmarks\n"
        file.write_text("\n".join([text.rstrip("\n"), "", *self.lines[:2], *about, *self.lines[2:]]))
        print(f"recorded in {file}")


def alone(script: str, what: str, **arguments: Any) -> dict[str, Any]:
    """Runs `script --child what` with the arguments as JSON in a process of its own; what it prints last, as JSON."""
    command = [sys.executable, script, "--child", what, json.dumps(arguments)]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def verdict(value: float, target: float, at_least: bool = True, form: str = "{:.1f}x") -> str:
    """`16.2x (target 15.0x: reached)`."""
    reached = value >= target if at_least else value <= target
    sign = "at least" if at_least else "at most"
    return f"{form.format(value)} ({sign} {form.format(target)}: {'reached' if reached else 'MISSED'})"
