"""Weights of a trained model, as a folder: safetensors and one JSON, all that inference needs to know.

    weights/
      config.json                           format, model, objective, encoders, vae, image_size, training
      model.safetensors                     or, above `shard_bytes`:
      model-00001-of-00003.safetensors ...  and model.safetensors.index.json, as Hugging Face lays them out

`config.json` names what the model was trained with, so that it is never used with anything else:

    format      1
    model       fields of `LIDiTConfig`
    objective   `name` (flow, ddpm) and its fields, see `lidit.diffusion`
    encoders    name -> {config: fields of `lidit.frozen.text.EncoderConfig`, fingerprint: of `PromptEncoder.fingerprint`}
    vae         {model, revision, dtype: as of `lidit.frozen.vae.load_vae`, fingerprint: of `VAE.fingerprint`}
    image_size  [height, width] in pixels that it was last trained at
    training    whatever the trainer wants to be remembered: step, images_seen, ema, table version ...

Nothing is pickled. A folder appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lidit.config import LIDiTConfig
from lidit.model import LIDiT
from lidit.runtime.durable import flush
from lidit.runtime.model_files import ModelFiles, resolve_model

FORMAT = 1
SHARD_BYTES = 5_000_000_000
CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FILES = ModelFiles(weights=(SINGLE_FILE, "model-*-of-*.safetensors"), index=INDEX_FILE, tokenizer=False)
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors", re.ASCII)
EXTRA_KEYS = ("objective", "encoders", "vae", "image_size", "training")
SHOWN = 5  # tensors of a kind that an error lists


def save_weights(
    folder: str | Path,
    model: LIDiT,
    *,
    extra: Mapping[str, Any] | None = None,
    state: Iterable[tuple[str, Tensor]] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Writes a model's weights and what belongs to them.

    Args:
        folder: where; its parents are made.
        model: gives the config, and the weights unless `state` does.
        extra: values of config.json: any of `EXTRA_KEYS`.
        state: (name, tensor) of every weight, in any order, on any device: averaged weights, or the pieces of a sharded
            model as they are gathered. Taken one by one: no more than one shard is in memory at a time.
        dtype: that the tensors are stored in; by default as they come.
        shard_bytes: largest file; a tensor above it gets a file of its own.
        overwrite: replace a folder that is there, if it holds weights and nothing else (`check_replaceable`). The old one is
            moved aside before and deleted after.

    Returns:
        The folder.

    Raises:
        ValueError: the folder is there, or is to be replaced and holds something else; `state` is not the model's; `extra` has
            other keys, or values that are no JSON.
    """
    folder = Path(folder)
    if not overwrite and folder.exists():
        raise ValueError(f"weights folder {folder}: it is there already; give another one, or pass overwrite=True")
    check_replaceable(folder)
    config = json.dumps(_config(model.config, extra or {}), indent=2)
    wanted = expected_shapes(model.config)
    tensors = model.state_dict().items() if state is None else state
    with _appears_whole(folder, overwrite) as beside:
        found = _write_shards(beside, tensors, dtype, shard_bytes)
        _check_tensors(found, wanted, f"weights to be saved in {folder}", "does the state belong to this model?")
        _write_text(beside / CONFIG_FILE, config)
    return folder


def check_replaceable(folder: Path) -> None:
    """Raises ValueError where a folder holds anything but what `save_weights` writes, and must not be deleted; one that is not
    there, or is empty, is fine."""
    if folder.is_symlink():
        raise ValueError(f"{folder} is a link: name the folder itself, or another one")
    try:
        names = sorted(path.name for path in folder.iterdir())
    except FileNotFoundError:
        return
    except NotADirectoryError as error:
        raise ValueError(f"{folder} is a file: expected a folder of weights, or a new one") from error
    strange = [name for name in names if not _is_own(folder / name)]
    if strange:
        raise ValueError(
            f"{folder} is not replaced: it holds {strange[0]!r} ({len(strange)} of {len(names)} entries), which is no weights "
            f"of lidit's; name the folder of the weights, or another one"
        )
    if names and CONFIG_FILE not in names:
        raise ValueError(f"{folder} is not replaced: it has no {CONFIG_FILE} of lidit's weights; name another folder")


def load_weights(
    folder: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> LIDiT:
    """Loads a model, ready for inference.

    The model is laid out without memory first and takes the file's tensors as its own, so there is one copy of them. On the
    CPU, and without `dtype`, that copy is the mapped file itself.

    Args:
        folder: of `save_weights`, or a hub id `owner/name` that holds the same files.
        revision: full commit hash, for hub ids; of a local folder, `sha256:` and the digest that it must have.
        device: where the weights go, directly.
        dtype: precision of the weights; by default that of the file.

    Raises:
        ValueError: the folder is no weights folder, was written by a later version, is damaged, or its tensors are not those
            of its config; names what is missing, what is too many and what has another shape.
    """
    folder = resolve_weights(folder, revision)
    config = LIDiTConfig.from_dict(read_config(folder)["model"])
    with torch.device("meta"):
        model = LIDiT(config)
    with contextlib.ExitStack() as stack:
        opened: list[Any] = [
            stack.enter_context(safe_open(file, framework="pt", device=str(device))) for file in _weight_files(folder)
        ]
        found = {name: tuple(file.get_slice(name).get_shape()) for file in opened for name in file.keys()}  # noqa: SIM118
        _check_tensors(found, expected_shapes(config), f"weights in {folder}", "is config.json another model's?")
        state = {name: file.get_tensor(name).to(dtype=dtype) for file in opened for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(state, strict=True, assign=True)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())), "a buffer is not in the state"
    return model.eval()


def from_pretrained(path: str | Path, **options: Any) -> LIDiT:
    """Loads the trained `LIDiT` alone; options and errors as of `load_weights`. To make images: `lidit.TextToImage`."""
    return load_weights(path, **options)


def resolve_weights(path: str | Path, revision: str | None = None) -> Path:
    """Finds the folder of weights, or of a hub id with a pinned commit. Raises ValueError unless all its files are whole."""
    return resolve_model(str(path), revision, FILES)


def read_config(folder: str | Path) -> dict[str, Any]:
    """Reads `config.json` of a weights folder. Raises ValueError where there is none that this version can read."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{folder}: expected a weights folder, as `save_weights` writes it; it has no {CONFIG_FILE}")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, received {error}") from error
    if not isinstance(config, dict) or "model" not in config or not isinstance(config.get("format"), int):
        raise ValueError(f"{path}: expected `format` and `model` of lidit's weights; is it another project's model?")
    if config["format"] > FORMAT:
        raise ValueError(f"{path}: format {config['format']} is newer than this lidit reads ({FORMAT}): update lidit")
    return config


def expected_shapes(config: LIDiTConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every weight of a model with this config; allocates no memory for them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in LIDiT(config).state_dict().items()}


# -- parts ------------------------------------------------------------------------------------------------------------


def _config(model: LIDiTConfig, extra: Mapping[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(extra) - set(EXTRA_KEYS))
    if unknown:
        raise ValueError(f"extra: expected keys among {', '.join(EXTRA_KEYS)}, received also {', '.join(unknown)}")
    for name in extra.get("encoders", {}):
        if name not in model.encoders:
            raise ValueError(f"extra: encoder {name!r} is none of the model's, which are {', '.join(model.encoders)}")
    config = {"format": FORMAT, "model": model.to_dict(), **extra}
    try:
        json.dumps(config)
    except TypeError as error:
        raise ValueError(f"extra: expected values that JSON can hold: {error}") from error
    return config


def _is_own(path: Path) -> bool:
    """Tells whether `save_weights` writes such a file, by its name and by its first bytes."""
    if path.is_symlink() or not path.is_file():
        return False
    if path.name == CONFIG_FILE:
        try:
            read_config(path.parent)
        except ValueError:
            return False
        return True
    if path.name == INDEX_FILE:
        try:
            return isinstance(json.loads(path.read_bytes())["weight_map"], dict)
        except (ValueError, KeyError, TypeError):
            return False
    return WEIGHTS_NAME.fullmatch(path.name) is not None and _is_safetensors(path)


def _is_safetensors(path: Path) -> bool:
    with open(path, "rb") as file:  # the length of a JSON object, and the object
        return 0 < int.from_bytes(file.read(8), "little") <= path.stat().st_size and file.read(1) == b"{"


@contextlib.contextmanager
def _appears_whole(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Gives an empty folder beside `folder`, which becomes `folder` if the block ends well and vanishes if it does not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    beside, old = (folder.parent / f".{folder.name}.{kind}-{token}" for kind in ("new", "old"))
    beside.mkdir()
    try:
        yield beside
        if folder.exists():
            if not overwrite:
                raise ValueError(f"weights folder {folder}: it was made by something else meanwhile; give another one")
            check_replaceable(folder)  # once more: writing took a while
            folder.rename(old)
        beside.rename(folder)
        flush(folder.parent)
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            old.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        _remove_own(old)


def _remove_own(folder: Path) -> None:
    """Deletes a weights folder file by file; what is not ours stays, and the folder with it."""
    if folder.exists():
        for path in sorted(folder.iterdir(), key=lambda path: path.name == CONFIG_FILE):
            if _is_own(path):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()


def _write_shards(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> dict[str, tuple[int, ...]]:
    """Writes safetensors files, and an index if there are several; returns the shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    shards: list[list[str]] = []
    total = 0
    for shard in _cut(tensors, dtype, shard_bytes):
        file = folder / f"{len(shards)}.part"  # how many there will be is known at the end
        save_file(shard, file, metadata={"format": "pt"})
        flush(file)
        if twice := shapes.keys() & shard.keys():
            raise ValueError(f"state: expected every weight once, received {', '.join(sorted(twice))} twice")
        shapes |= {name: tuple(tensor.shape) for name, tensor in shard.items()}
        total += sum(tensor.nbytes for tensor in shard.values())
        shards.append(list(shard))
        shard.clear()  # before the next one is filled
    names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    for number, name in enumerate(names):
        (folder / f"{number}.part").rename(folder / name)
    if len(shards) > 1:
        weight_map = {weight: name for name, weights in zip(names, shards) for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_text(folder / INDEX_FILE, json.dumps(index, indent=2))
    return shapes


def _cut(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None, shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors on the CPU, in groups of at most `shard_bytes`. A tensor may change once the next is asked for."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        copied = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
        if shard and (size + copied.nbytes > shard_bytes or name in shard):
            yield shard
            shard, size = {}, 0
        shard[name] = copied
        size += copied.nbytes
    yield shard


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder that `resolve_weights` has checked."""
    if not (folder / INDEX_FILE).is_file():
        return [folder / SINGLE_FILE]
    return sorted({folder / name for name in json.loads((folder / INDEX_FILE).read_text())["weight_map"].values()})


def _check_tensors(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]], what: str, hint: str
) -> None:
    """Raises ValueError with a report unless both have the same names with the same shapes."""
    problems = {
        "missing": [f"{name} {wanted[name]}" for name in wanted if name not in found],
        "unexpected": [f"{name} {found[name]}" for name in found if name not in wanted],
        "of another shape": [
            f"{name} expected {wanted[name]}, received {shape}"
            for name, shape in found.items()
            if name in wanted and shape != wanted[name]
        ],
    }
    lines = [
        f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{' ...' if len(names) > SHOWN else ''}"
        for kind, names in problems.items()
        if names
    ]
    if lines:
        raise ValueError(
            "\n".join([f"{what} do not fit the model's config ({len(wanted)} tensors):", *lines, f"  {hint}"])
        )


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n")
    flush(path)
