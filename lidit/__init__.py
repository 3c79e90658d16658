"""lidit: text-to-image diffusion transformers prompted through several decoder-only LLMs.

The model and its maths. This package needs torch and transformers only; it knows nothing of ray, lance or deepspeed.
Importing it loads neither: what stands in `__all__` is fetched when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lidit.text_to_image import TextToImage
    from lidit.weights import from_pretrained

__all__ = ["TextToImage", "from_pretrained"]

_HOME = {"TextToImage": "lidit.text_to_image", "from_pretrained": "lidit.weights"}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("lidit")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
