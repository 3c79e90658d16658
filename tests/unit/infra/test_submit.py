"""What `infra/submit.py` refuses before it asks the cluster for anything."""

import subprocess
import sys
from pathlib import Path

import pytest

SUBMIT = Path(__file__).resolve().parents[3] / "infra/submit.py"
pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    "address, word, named",
    [
        ("http://head:8265", "sftp://me:hunter2@host/x", "word 2 of the command"),
        ("http://head:8265", "--store=s3://b/x?X-Amz-Signature=hunter2", "word 2 of the command"),
        ("http://me:hunter2@head:8265", "x", "--address"),
    ],
)
def test_command_with_a_secret_is_not_sent(address, word, named):
    argv = [sys.executable, str(SUBMIT), "--address", address, "--name", "night", "--", "lidit", word]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2 and f"{named}: expected an address without credentials" in ended.stderr
    assert "hunter2" not in ended.stdout + ended.stderr and "***" in ended.stderr
