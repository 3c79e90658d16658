"""Turns a checkpoint into weights: safetensors and one JSON, ready for `lidit sample` and `lidit.from_pretrained`.

Works on a CPU, for checkpoints of any ZeRO stage and any number of ranks, on any storage; reads shards in pieces, so that no
more than a shard of the weights is in memory beside the model's own file. Every file is checked against the manifest before
it is read, and nothing is unpickled but tensors and DeepSpeed's own few classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lidit.cli import run
from lidit.config import LIDiTConfig
from lidit.model import LIDiT
from lidit.runtime.fields import JobConfig, from_plain
from lidit.runtime.model_files import split_revision
from lidit.runtime.places import absolute
from lidit.runtime.result import JobResult
from lidit.weights import expected_shapes, save_weights
from trainer.checkpoints.manifest import Damaged, Manifest, check_content, read_manifest, steps_in
from trainer.checkpoints.resume import read_state
from trainer.checkpoints.save import EMA_FOLDER, ENGINE
from trainer.checkpoints.universal import restricted_unpickling
from trainer.config import OptimizerConfig
from trainer.engine.optimizer import parameter_groups
from trainer.engine.shards import ShardReader
from trainer.storage import Storage, inside

VAE_KEYS = (
    "autoencoder",
    "weights",
    "config",
    "dtype",
    "scaling_factor",
    "shift_factor",
)  # keys of the latents' fingerprint
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ExportConfig(JobConfig):
    """The export job."""

    run: str = "./runs/scenes"
    """Folder or URI of the run: `<storage>/<name>`."""
    out: str = "./weights"
    """Folder to write the weights to; must not exist unless `overwrite` is set."""
    step: int | None = None
    """Step of the checkpoint to export; null: the newest valid one."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Weights to export: the moving average, or the weights as trained; auto: the average where the run keeps one."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the exported file."""
    vae: str | None = None
    """Autoencoder to name in the weights, where the run's config does not (folder, or `owner/name@commit`)."""
    overwrite: bool = False
    """Replace `out` if it exists."""


@dataclass
class ExportResult(JobResult):
    """Result of an export."""

    LINES = (
        "export: {weights} weights of step {step:,}, {parameters:,} parameters",
        "  folder     {out}",
        "  warning    {warnings}",
        '  next       lidit sample --weights {out} --prompt "..."',
    )

    out: str
    step: int
    weights: str  # ema or raw
    parameters: int
    ok: bool = True
    warnings: list[str] = dataclasses.field(default_factory=list)


def main(config: ExportConfig) -> ExportResult:
    """Runs the job.

    Raises:
        ValueError: no such checkpoint, it is damaged, it has no average, or `out` is there.
    """
    storage = Storage(absolute(config.run))
    manifest, state, warnings = _choose(storage, config.step)
    has_ema = any(name.startswith(f"{EMA_FOLDER}/") for name in manifest.files)
    kind = {"auto": "ema" if has_ema else "raw"}.get(config.weights, config.weights)
    if kind == "ema" and not has_ema:
        raise ValueError(
            f"{storage.uri}, step {manifest.step:,}, keeps no average (ema.decay was 0): export --weights raw"
        )
    model_config = LIDiTConfig.from_dict(state["model"])
    with torch.device("meta"):
        model = LIDiT(model_config)
    shapes = expected_shapes(model_config)
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(_files(storage, manifest, f"{EMA_FOLDER}/" if kind == "ema" else f"{ENGINE}/"))
        weights = stack.enter_context(_average(files, shapes) if kind == "ema" else _raw(files, shapes, state))
        save_weights(
            config.out,
            model,
            extra=_extra(state, kind, config.vae),
            state=weights,
            dtype=DTYPES[config.dtype],
            overwrite=config.overwrite,
        )
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    return ExportResult(config.out, manifest.step, kind, parameters, warnings=warnings)


# -- which ------------------------------------------------------------------------------------------------------------


def _choose(storage: Storage, step: int | None) -> tuple[Manifest, dict[str, Any], list[str]]:
    """Returns manifest and state of the checkpoint asked for, or of the newest valid one, and warnings about those skipped."""
    steps = [step] if step is not None else list(reversed(steps_in(storage)))
    warnings: list[str] = []
    for candidate in steps:
        try:
            manifest = read_manifest(storage, candidate)
            return manifest, read_state(storage, manifest), warnings
        except Damaged as error:
            warnings.append(f"checkpoint skipped: {error}")
    steps_there = ", ".join(map(str, steps_in(storage))) or "none"
    raise ValueError(f"{storage.uri}: no checkpoint to export; steps there: {steps_there}{'; '.join(['', *warnings])}")


@contextlib.contextmanager
def _files(storage: Storage, manifest: Manifest, prefix: str) -> Iterator[list[Path]]:
    """Yields the local paths of the checkpoint's files with that prefix, downloaded if need be and checked."""
    with tempfile.TemporaryDirectory(prefix="lidit-export-") as temporary:
        folder = Path(storage.path(manifest.place)) if storage.local else Path(temporary)
        paths = []
        for name, file in sorted(manifest.files.items()):
            if not name.startswith(prefix):
                continue
            remote, path = f"{manifest.place}/{name}", inside(folder, name)
            if not storage.local:
                storage.download(remote, path)
            try:
                check_content(path, file, remote)
            except Damaged as error:
                raise ValueError(f"{storage.uri}: {error}. Export another step with --step") from error
            paths.append(path)
        yield paths


# -- weights ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _average(files: list[Path], shapes: Mapping[str, Any]) -> Iterator[Iterator[tuple[str, Tensor]]]:
    with ShardReader(files) as reader:
        yield iter(reader.state(shapes))


@contextlib.contextmanager
def _raw(
    files: list[Path], shapes: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Yields (name, fp32 master weight) from DeepSpeed's shards; at stage 0 in fp32 the weights themselves."""
    ordered = sorted(files, key=_rank_of)
    with restricted_unpickling():
        module = next(_load(path) for path in ordered if path.name.endswith("model_states.pt"))
        shards = [_load(path)["optimizer_state_dict"] for path in ordered if path.name.endswith("optim_states.pt")]
    if not shards:
        yield _replicated(module, shapes, state)
    elif state["zero_stage"] == 3:
        yield _equal_pieces(shards, module["param_shapes"])
    else:
        yield _ranges(shards, shapes)


def _rank_of(path: Path) -> int:
    """`bf16_zero_pp_rank_12_mp_rank_00_optim_states.pt` -> 12; a file of no single rank: -1."""
    match = re.search(r"zero_pp_rank_(\d+)_", path.name)
    return int(match[1]) if match else -1


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _replicated(
    saved: Mapping[str, Any], shapes: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """Stage 0: yields the module's weights; in bf16 the optimizer's fp32 copy of them, group by group."""
    masters = (saved.get("optimizer") or {}).get("fp32_groups")
    if masters is None:
        yield from ((name, saved["module"][name]) for name in shapes)
        return
    with torch.device("meta"):
        model = LIDiT(LIDiTConfig.from_dict(state["model"]))
    names = {id(param): name for name, param in model.named_parameters()}
    groups = parameter_groups(model, from_plain(OptimizerConfig, state["config"]["optimizer"], "optimizer"))
    for group, tensors in zip(groups, masters, strict=True):
        yield from zip((names[id(param)] for param in group), tensors, strict=True)


def _equal_pieces(shards: list[dict[str, Any]], groups: list[Mapping[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Stage 3: joins the equal slices of each parameter, padded at the end, that the ranks hold in the order of `groups`."""
    flat = [shard["fp32_flat_groups"] for shard in shards]
    for number, group in enumerate(groups):
        offset = 0
        for name, shape in group.items():
            numel = torch.Size(shape).numel()
            piece = -(-numel // len(shards))
            parts = [rank[number][offset : offset + piece] for rank in flat]
            yield name, torch.cat(parts)[:numel].reshape(tuple(shape))
            offset += piece


def _ranges(shards: list[dict[str, Any]], shapes: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Stages 1 and 2: joins a parameter's slices in the order of ranks; each rank holds a range of the flattened group."""
    for name, shape in shapes.items():
        pieces = []
        for shard in shards:
            for flat, mapping in zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"]):
                if name in mapping:
                    pieces.append(flat[mapping[name].start : mapping[name].start + mapping[name].numel])
        yield name, torch.cat(pieces).reshape(shape)


def _extra(state: Mapping[str, Any], kind: str, vae: str | None) -> dict[str, Any]:
    """Returns what the weights' config.json says of the training."""
    table, config = state["table"], state["config"]
    made_with = {key: value for key, value in table["features"]["latents"].items() if key in VAE_KEYS}
    named = vae or config.get("vae")
    extra: dict[str, Any] = {
        "objective": state["objective"],
        "encoders": table["encoders"],
        "image_size": table["image_size"],
        "training": {
            "run": config["name"],
            "step": state["step"],
            "images_seen": state["images_seen"],
            "weights": kind,
            "tables": table["versions"],
        },
    }
    if named:
        model, revision = split_revision(named)
        extra["vae"] = {"model": model, "revision": revision, "fingerprint": made_with}
    return extra


if __name__ == "__main__":
    run("export")
