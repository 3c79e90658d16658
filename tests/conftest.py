"""What all tests share: where the test data lies, and tiny models made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real prompts, photos and tiny LLMs; tests that need it say so when they skip."""
    folder = Path(os.environ.get("LIDIT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the test data in {folder} (or in the folder that LIDIT_TEST_DATA names)")
    return folder
