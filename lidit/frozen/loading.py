"""The one way to load what transformers reads from a model folder: no code of the folder runs, no pickle, no network.

Without `trust_remote_code` transformers asks on the terminal whether it may run the folder's own code (`auto_map` of
config.json), and whoever answers for the user, such as `yes |`, agrees. Here it is always refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError

SAFE: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}


def load_config(folder: Path) -> Any:
    """Loads the config of a model folder. Raises ValueError where it is of no architecture that transformers itself has."""
    return _from_folder(transformers.AutoConfig, folder)


def load_tokenizer(folder: Path) -> Any:
    """Loads the tokenizer of a model folder. Raises ValueError where it is of no class that transformers itself has."""
    return _from_folder(transformers.AutoTokenizer, folder)


def load_processor(folder: Path, loader: Any = transformers.AutoProcessor) -> Any:
    """Loads the processor (of images, of images and text) of a model folder.

    Raises:
        ValueError: it is of no class that transformers itself has, or its files are not there or hold nonsense.
    """
    return _from_folder(loader, folder)


def load_model(loader: Any, folder: Path, **options: Any) -> Any:
    """Loads the model of a folder, weights from safetensors; `loader` is a class of transformers, options are of its
    `from_pretrained`. Raises what that raises."""
    return loader.from_pretrained(folder, use_safetensors=True, **SAFE, **options)


def _from_folder(loader: Any, folder: Path) -> Any:
    try:
        return loader.from_pretrained(folder, **SAFE)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError) as error:
        what = loader.__name__.removeprefix("Auto").lower()
        raise ValueError(
            f"model folder {folder}: expected a {what} that this version of transformers has a class for (code that comes "
            f"with a model is never run) and can read, received {type(error).__name__}: {error}"
        ) from error
