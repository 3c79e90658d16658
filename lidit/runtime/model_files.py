"""Finds, checks and digests the files of a model without loading it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

PROJECT_ROOT = Path(__file__).resolve().parent.parent.parent
COMMIT = re.compile(r"[0-9a-f]{40}")
PIN = "sha256:"
"""Before a digest, where a revision is expected: what lies there must have it."""
WEIGHT_FILES = "*.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model",
)  # fmt: skip
OTHER_TOKENIZER_FILES = (
    "*.model", "*.spm", "*.tiktoken", "*.bpe", "*.codes", "*.tokenizer", "*.jinja", "additional_chat_templates/*.jinja",
    "tokenizer*.json", "*vocab*.json", "*vocab*.txt", "merges*", "tekken.json", "dict.txt", "emoji.json", "byte_maps.json",
    "normalizer.json", "word_*.json",
)  # fmt: skip
"""Patterns of what the tokenizer classes of transformers read besides."""
HARMLESS_KEYS = {
    "_name_or_path", "_commit_hash", "transformers_version",  # where it came from, who wrote it
    "dtype", "torch_dtype",  # the precision is always asked for, and is in the fingerprint
    "use_cache", "output_attentions", "output_hidden_states",  # likewise given with each call
    "initializer_range", "initializer_factor",  # no weight is drawn: missing ones are refused
}  # fmt: skip
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "generation_config.json", "chat_template.json")
ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class ModelFiles:
    """The files that a model of some kind is made of."""

    weights: tuple[str, ...] = (WEIGHT_FILES,)
    """Glob patterns of the weight files."""
    index: str = "model.safetensors.index.json"
    """The file that lists the shards, where there are several."""
    tokenizer: bool = True
    """True if there must be a tokenizer."""
    hub_id: str = r"[\w.-]+/[\w.-]+"
    """Pattern of a hub id; with a third part, the model lies in that folder of its repository."""


LANGUAGE_MODEL = ModelFiles()
AUTOENCODER = ModelFiles(
    weights=("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors"),
    index="diffusion_pytorch_model.safetensors.index.json",
    tokenizer=False,
    hub_id=r"[\w.-]+/[\w.-]+(/[\w.-]+)?",
)  # diffusers' own names; its `.fp16` variants and single-file checkpoints beside them are not read


def resolve_model(model: str, revision: str | None, files: ModelFiles = LANGUAGE_MODEL, download: bool = True) -> Path:
    """A local folder, or a hub id with a pinned commit -> the folder that holds the model's files.

    A relative path is looked up from the working directory, then from the project's root. A hub id is `owner/name`
    (of an autoencoder also `owner/name/folder`) and needs `revision` to be a full commit hash: a branch name would let two
    runs of one job read two different models. Of a folder, `revision` may be `sha256:` and the digest of `model_digest`.

    Args:
        download: whether a hub id may be fetched; off where data names the model (a store, the config of weights), not the
            user: then it must be in the local hub cache.

    Raises:
        ValueError: nothing is there, files are missing or cut short, the revision is not pinned, or the digest another one.
    """
    for folder in (Path(model), PROJECT_ROOT / model):
        if folder.is_dir():
            check_model_folder(folder, files)
            check_pin(f"model folder {folder}", revision, functools.partial(model_digest, folder, files))
            return folder.resolve()
    if model.startswith(("/", ".", "~")) or not re.fullmatch(files.hub_id, model):
        raise ValueError(
            f"model {model!r}: expected a folder with config.json, or a hub id `owner/name`; nothing is there"
        )
    if not revision or not COMMIT.fullmatch(revision):
        raise ValueError(
            f"model {model!r} is no local folder, so it is read as a hub id: expected `revision` to be a full commit hash "
            f"(40 hex digits), received {revision!r}; copy it from the model's commit list, or give the path of a folder"
        )
    from huggingface_hub import snapshot_download

    owner, name, *inner = model.split("/")
    patterns = [*files.weights, "*.json", *((*TOKENIZER_FILES, *OTHER_TOKENIZER_FILES) if files.tokenizer else ())]
    try:
        path = snapshot_download(
            f"{owner}/{name}",
            revision=revision,
            allow_patterns=["/".join([*inner, pattern]) for pattern in patterns],
            local_files_only=not download,
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and OSError: all mean the same here
        if not download:
            raise ValueError(
                f"model {model!r} at {revision[:12]} is named by data, not by you, and is not in the local hub cache: pass "
                f"--download_models (download_models=True) to fetch it, or say where it is"
            ) from error
        raise ValueError(
            f"model {model!r} at {revision[:12]}: expected to find it in the local hub cache or on the hub, "
            f"received {type(error).__name__}: {error}; check the name and the network, or give the path of a folder"
        ) from error
    folder = Path(path, *inner)
    if not folder.is_dir():
        raise ValueError(f"model {model!r} at {revision[:12]}: the repository has no such folder, or no model in it")
    check_model_folder(folder, files)
    return folder


def check_model_folder(folder: Path, files: ModelFiles = LANGUAGE_MODEL) -> None:
    """Raises ValueError unless config.json, a tokenizer and whole safetensors files (every shard) are there."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder}: expected config.json, received {_listing(folder)}")
    if (folder / ADAPTER).is_file():
        raise ValueError(
            f"model folder {folder}: expected whole weights, received an adapter beside them ({ADAPTER}), which counts or not "
            f"by what is installed: merge it into the weights, or take the file away"
        )
    if files.tokenizer and not tokenizer_files(folder):
        raise ValueError(
            f"model folder {folder}: expected a tokenizer (tokenizer.json or the like), {_listing(folder)}"
        )
    index = folder / files.index
    wanted = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else set()
    present = {path.name for path in _weight_files(folder, files)}
    if not present or wanted - present:
        missing = ", ".join(sorted(wanted - present)) or files.weights[0]
        raise ValueError(
            f"model folder {folder}: missing {missing} ({_listing(folder)}); "
            f"only safetensors weights are read, convert pickled ones first"
        )
    for name in sorted(present):
        try:
            with safe_open(folder / name, framework="np") as weights:
                weights.keys()
        except SafetensorError as error:
            size = (folder / name).stat().st_size
            raise ValueError(
                f"weights {folder / name}: file is cut short or damaged ({size:,} bytes): {error}"
            ) from error


def split_revision(model: str) -> tuple[str, str | None]:
    """`owner/name@commit`, `path@sha256:digest` -> what is before and after the last @; what exists as it is -> (it, None)."""
    if Path(model).exists() or "@" not in model:
        return model, None
    name, _, revision = model.rpartition("@")
    return name, revision


def check_pin(what: str, revision: str | None, digest: Callable[[], str]) -> None:
    """Raises ValueError where `revision` is `sha256:DIGEST` and what lies there has another; it is only then asked for."""
    if revision is None or not revision.startswith(PIN):
        return
    received = digest()
    if received != revision.removeprefix(PIN).lower():
        raise ValueError(
            f"{what}: expected {revision}, received {PIN}{received}; take the right files, or, if these are the ones "
            f"you trust, name their digest"
        )


def model_digest(folder: Path, files: ModelFiles = LANGUAGE_MODEL) -> str:
    """sha256 over all files that a model is read from: weights, every JSON file, tokenizer."""
    found = {
        *_weight_files(folder, files),
        *folder.glob("*.json"),
        *(tokenizer_files(folder) if files.tokenizer else ()),
    }
    return digest_of_files(sorted(found))


def weights_digest(folder: Path, files: ModelFiles = LANGUAGE_MODEL) -> str:
    """sha256 over the digests of all weight files, in name order (files are hashed in parallel)."""
    return digest_of_files(_weight_files(folder, files))


def tokenizer_files(folder: Path) -> list[Path]:
    """All files that a tokenizer may be read from, chat templates included: the common ones first, then others by name."""
    common = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    others = {path for pattern in OTHER_TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()}
    return common + sorted(others - set(common))


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files, chat template included."""
    return digest_of_files(tokenizer_files(folder))


def processor_digest(folder: Path) -> str:
    """sha256 over what a processor, and the generation after it, read besides the tokenizer's files."""
    return digest_of_files([folder / name for name in PROCESSOR_FILES if (folder / name).is_file()])


def config_digest(folder: Path) -> str:
    """sha256 of what config.json says of a model's values, its sub-configs included.

    Taken of the file, not of the config object that transformers makes of it: the object changes while a model is loaded (the
    blocks that are left out), and every release fills in further defaults, so that one folder would have several digests.
    What a release assumes where the file is silent, the attention implementation too, is told by the library versions that
    are kept with each column. Order and white space of the file do not count, nor do `HARMLESS_KEYS`. That list is short on
    purpose: a harmless key that counts costs one `--stamp`, a harmful one that does not costs a spoiled column.

    Raises:
        ValueError: config.json is not a JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: expected JSON, received something else: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / 'config.json'}: expected a JSON object, received {type(config).__name__}")
    return hashlib.sha256(json.dumps(_values_only(config), sort_keys=True).encode()).hexdigest()


def _values_only(config: dict[str, Any]) -> dict[str, Any]:
    """A config and its sub-configs without the keys that change no value."""
    return {
        key: _values_only(value)
        if isinstance(value, dict) and key.endswith("_config") and key != "quantization_config"
        else value
        for key, value in config.items()
        if key not in HARMLESS_KEYS
    }


def digest_of_files(paths: list[Path]) -> str:
    """sha256 over names and digests of the files, in the order given."""

    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(file_digest, paths))
    joined = "\n".join(f"{path.name} {digest}" for path, digest in zip(paths, digests))
    return hashlib.sha256(joined.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    stat = path.stat()
    return _file_digest(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, mtime_ns: int) -> str:
    """Digest of a file as it was then: one job asks for it several times."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weight_files(folder: Path, files: ModelFiles) -> list[Path]:
    return sorted({path for pattern in files.weights for path in folder.glob(pattern) if path.is_file()})


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (
        f"the folder holds {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "the folder is empty"
    )
