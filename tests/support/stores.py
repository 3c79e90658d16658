"""A small store and its jobs, each run in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.llms import WORDS

ROOT = Path(__file__).resolve().parents[2]


ON_SHARED_RAY = ("ingest", "recaption", "embed", "latents", "generate")


def environment() -> dict[str, str]:
    """What a job's process inherits."""
    return {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTEST_CURRENT_TEST")}


class SharedRay:
    """One local Ray for all jobs that run to their end. Its workers inherit the environment that it was started with."""

    script = (
        "import sys, ray; from lidit.runtime.cluster import start_ray; start_ray(ray, log_to_driver=False)\n"
        "print(ray.get_runtime_context().gcs_address, flush=True); sys.stdin.read()"
    )
    started: tuple[subprocess.Popen[str], dict[str, str], str] | None = None

    @classmethod
    def address(cls) -> str | None:
        """Its address; None for a job whose environment is another one, which needs a Ray of its own."""
        env = environment()
        if cls.started is None:
            command, pipe = [sys.executable, "-c", cls.script], subprocess.PIPE
            process = subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdin=pipe, stdout=pipe)
            assert process.stdout is not None
            cls.started = (process, env, process.stdout.readline().strip())
            assert cls.started[2], "the shared Ray did not start"
        return cls.started[2] if env == cls.started[1] else None

    @classmethod
    def stop(cls) -> None:
        """Ends it; it also ends with this process."""
        if cls.started is not None:
            cls.started[0].communicate(timeout=60)
            cls.started = None


@pytest.fixture
def world(tmp_path: Path, llms: dict[str, Path]) -> World:
    """A store to be, prompts to put in, and a config for both tiny LLMs."""
    return World(tmp_path, llms)


class World:
    """A small job: writes prompts and config, runs `lidit` in a process of its own, reads the store back."""

    def __init__(self, folder: Path, llms: dict[str, Path]):
        self.folder, self.llms, self.store = folder, llms, folder / "store"

    def prompts(self, count: int, seed: int = 0, name: str = "prompts.txt") -> Path:
        """A file of distinct prompts."""
        import random

        draw = random.Random(seed)
        lines = [f"{number} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 30))) for number in range(count)]
        path = self.folder / name
        path.write_text("\n".join(lines))
        return path

    def config(self, **changes: Any) -> Path:
        """Writes the embed job's YAML; `changes` replace top-level keys."""
        encoders = [
            {"name": name, "model": str(path), "template": "plain", "dtype": "fp32", "codec": "bf16"}
            for name, path in self.llms.items()
        ]
        values = {
            "store": str(self.store),
            "text": ["caption"],
            "encoders": encoders,
            "batch_tokens": 2048,
            "actors": {"min": 1, "max": 1},
            "commit": {"fragments": 1, "seconds": 0.0},
            **changes,
        }
        path = self.folder / "embed.yaml"
        path.write_text(yaml.safe_dump(values))
        return path

    def start(self, *argv: object, ray: str | None = None) -> subprocess.Popen[str]:
        """Starts `lidit ARGV` in a process of its own, with a Ray of its own if none is named."""
        command = [sys.executable, "-m", "lidit.cli", *map(str, argv)]
        env = {**environment(), **({"RAY_ADDRESS": ray, "RAY_AUTH_MODE": "token"} if ray else {})}
        return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, process: subprocess.Popen[str], expect: int = 0) -> Result:
        """Waits for it; asserts the exit status, and that Ray's C++ did not talk to the user."""
        stdout, stderr = process.communicate(timeout=300)
        assert ".cc:" not in stderr, stderr
        assert process.returncode == expect, f"exit status {process.returncode}, not {expect}\n{stderr}"
        return Result(stdout, stderr)

    def run(self, *argv: object, expect: int = 0) -> Result:
        """Runs `lidit ARGV` to its end; jobs over a table share a Ray, which takes longer to start than they take."""
        ray = SharedRay.address() if argv[0] in ON_SHARED_RAY else None
        return self.finish(self.start(*argv, ray=ray), expect)

    def ingest(self, prompts: Path, rows_per_fragment: int = 50) -> Result:
        """Ingests a prompt file."""
        flags = ("--source", f"prompts:{prompts}", "--rows-per-fragment", rows_per_fragment)
        return self.run("ingest", "--store", self.store, *flags)

    # -- reading back -------------------------------------------------------------------------------------------------

    @property
    def table(self) -> Any:
        """The samples table, newest version."""
        import lance

        return lance.dataset(str(self.store / "samples.lance"))

    def rows(self) -> dict[str, dict[str, Any]]:
        """image_id -> all columns of the row; asserts that no id is there twice."""
        rows = self.table.to_table().to_pylist()
        by_id = {row["image_id"]: row for row in rows}
        assert len(by_id) == len(rows)
        return by_id

    def orphans(self) -> set[str]:
        """Data files that no version refers to."""
        dataset = self.table
        paths = set(dataset.all_files().read_all()["path"].to_pylist())
        known = set(dataset.tracked_files().read_all()["path"].to_pylist())
        return {path for path in paths - known if path.startswith(("data/", "_unfinished/"))}

    def data_files(self) -> list[Path]:
        """Column files that embed runs have begun."""
        return sorted((self.store / "samples.lance" / "data").glob("embed-*.lance"))

    def committed(self, column: str = "caption_embeds_one") -> int:
        """Fragments that have the column."""
        from pipelines.engine.table import Table

        table = Table(str(self.store / "samples.lance"))
        dataset = table.open()
        return len(dataset.get_fragments()) - len(table.missing([column], dataset))


class Result:
    """What a finished job printed."""

    def __init__(self, stdout: str, stderr: str):
        self.stdout, self.stderr = stdout, stderr

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON on the last line of stdout."""
        return json.loads(self.stdout.strip().splitlines()[-1])
