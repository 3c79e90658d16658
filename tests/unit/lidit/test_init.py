"""`import lidit` is cheap and gives what it promises."""

import subprocess
import sys

import pytest

import lidit

pytestmark = pytest.mark.unit


def test_importing_loads_nothing_heavy():
    code = "import lidit, sys; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'lidit'" in loaded
    for package in ("torch", "numpy", "transformers", "diffusers", "PIL"):
        assert f"'{package}'" not in loaded


def test_what_it_promises_is_there():
    from lidit.text_to_image import TextToImage
    from lidit.weights import from_pretrained

    assert lidit.TextToImage is TextToImage and lidit.from_pretrained is from_pretrained
    assert set(lidit.__all__) == {"TextToImage", "from_pretrained"}
    with pytest.raises(AttributeError, match="no attribute 'TextToVideo'"):
        lidit.TextToVideo  # noqa: B018
