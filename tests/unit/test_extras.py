"""Every extra that a message, a docstring or a page tells the user to install is one that the package has."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
NAMED = re.compile(r"\blidit\[([a-z0-9_,\- ]+)\]|\bextras? `([a-z0-9_-]+)`")
pytestmark = pytest.mark.unit


def named() -> dict[str, set[str]]:
    """Extra -> the files that name it."""
    found: dict[str, set[str]] = {}
    folders = [ROOT / name for name in ("lidit", "pipelines", "trainer", "demo", "docs", "infra")]
    files = [path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".md", ".yaml")]
    for path in [*files, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "Makefile", ROOT / "pyproject.toml"]:
        for several, one in NAMED.findall(path.read_text()):
            for extra in (several or one).split(","):
                found.setdefault(extra.strip(), set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_extra_that_is_named_exists() -> None:
    missing = {extra: sorted(files) for extra, files in named().items() if extra not in EXTRAS}
    assert not missing


def test_extras_are_found_in_messages_and_pages() -> None:
    assert {"trainer/monitor/metrics.py", "docs/training.md"} <= named()["wandb"]
