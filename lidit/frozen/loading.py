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


def load_model(loader: Any, folder: Path, whole: bool = True, **options: Any) -> Any:
    """Loads the model of a folder, weights from safetensors.

    Args:
        loader: a class of transformers; `options` go to its `from_pretrained`, whose errors are raised too.
        folder: the model.
        whole: refuse a folder that lacks tensors of the model. Off: transformers draws them at random, such as a head that
            nobody uses.

    Raises:
        ValueError: tensors are missing, or of another shape.
    """
    model, report = loader.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **SAFE, **options)
    missing = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if missing and whole:
        raise ValueError(
            f"weights in {folder} do not fit its config.json: {len(missing)} tensors are missing or of another shape, such "
            f"as {', '.join(sorted(missing)[:3])}; is a shard missing, or config.json another model's?"
        )
    return model


def _from_folder(loader: Any, folder: Path) -> Any:
    try:
        return loader.from_pretrained(folder, **SAFE)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError) as error:
        what = loader.__name__.removeprefix("Auto").lower()
        raise ValueError(
            f"model folder {folder}: expected a {what} that this version of transformers has a class for (code that comes "
            f"with a model is never run) and can read, received {type(error).__name__}: {error}"
        ) from error
