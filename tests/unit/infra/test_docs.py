"""Every job that the pages on clusters and operations tell to run has the flags that they give it."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from lidit import cli
from lidit.cli import parse_config

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "docs" / name for name in ("cluster.md", "operations.md", "security.md")]
CONFIGS = {"embed.yaml": "embed-config.yaml", "preprocess.yaml": "preprocess-config.yaml"}
pytestmark = pytest.mark.unit


def commands() -> list[list[str]]:
    """The words after `python` or `lidit` of every command of a bash block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.replace("$BUCKET", "bucket").replace("$S", "s3://bucket/store")
                for words in (
                    shlex.split(part, comments=True) for part in re.split(r"&&|&$| -- ", line) if "'" not in part
                ):
                    if words[:1] in (["python"], ["lidit"]):
                        found.append(words[1:])
    return found


def test_there_are_commands():
    names = {words[0] for words in commands()}
    jobs = {f"pipelines/{name}.py" for name in ("ingest", "recaption", "embed", "latents", "verify", "preprocess")}
    assert jobs | {"trainer/train.py", "infra/preflight.py", "infra/pinned.py", "export", "sample"} == names


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command(words):
    if words[0] == "infra/preflight.py":
        return check_preflight(words[1:])
    if words[0] == "infra/pinned.py":
        assert [name for name in words[1:] if not (ROOT / name).exists()] == []
        return
    assert (ROOT / words[0]).exists() or words[0] in cli.JOBS
    job = Path(words[0]).stem
    argv = [str(ROOT / "infra/kubernetes/base" / CONFIGS[word]) if word in CONFIGS else word for word in words[1:]]
    parse_config(job, importlib.import_module(cli.JOBS[job][0]), argv)


def check_preflight(argv: list[str]) -> None:
    known = (ROOT / "infra/preflight.py").read_text()
    assert [flag for flag in argv if flag.startswith("--") and f'"{flag}"' not in known] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    text = page.read_text()
    named = set(re.findall(r"infra/[\w/.-]*\w", text)) | {f"docs/{name}" for name in re.findall(r"\]\((\w+\.md)", text)}
    named |= {found for name in re.findall(r"`(test_\w+\.py)`", text) for found in [name]}
    tests = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert [name for name in named if not (ROOT / name).exists() and name not in tests] == []
