"""Where the test data lies, and the fixtures that tests of several folders use."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytest_plugins = [f"tests.support.{name}" for name in ("llms", "stores", "images", "servers", "weights")]


def pytest_configure() -> None:
    """Started in the background by a shell, this process ignores Ctrl-C, and the jobs that it starts would, too."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real prompts, photos and tiny LLMs; tests that need it say so when they skip."""
    folder = Path(os.environ.get("LIDIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder} (or in the folder that LIDIT_TEST_DATA names)")
    return folder


@pytest.fixture(scope="session", autouse=True)
def no_process_outlives_the_tests() -> Iterator[None]:
    """Processes of ranks, and a Ray, are kept from test to test, and end with the last."""
    yield
    if (stores := sys.modules.get("tests.support.stores")) is not None:
        stores.SharedRay.stop()
    if (training := sys.modules.get("tests.support.training")) is not None:
        training.close_ranks()
