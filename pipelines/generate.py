"""Makes images of prompts: a prompt set and trained weights -> the sample table, and files as a benchmark's scorer reads them.

    lidit generate --weights weights --prompt "a red circle" --store ./generated --out pictures
    lidit generate --weights weights --prompts evaluation_metadata.jsonl --layout geneval --out outputs --store ./geneval

A stage like the others: the rows are the images to make, and the column `image` is what is missing. So the same command goes on
after a kill, every image is made once, and a file appears whole. An image depends on prompt, seed and settings alone; other
weights or settings are another store, or `--overwrite`. docs/generate.md has the layouts.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from lidit.cli import run
from lidit.components import Components
from lidit.runtime.fields import PositiveInt, to_plain
from lidit.runtime.model_files import config_digest, split_revision, weights_digest
from lidit.runtime.places import settled
from lidit.sampler import SamplerConfig
from lidit.store import columns
from lidit.weights import FILES, read_config, resolve_weights
from pipelines.engine.column_file import UNCOMPRESSED
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.summary import Summary
from pipelines.engine.table import samples_of
from pipelines.engine.worker import ALSO_READS, READS, Columns
from pipelines.generation.layouts import LAYOUTS, check_folder, image_files, write_layout
from pipelines.generation.prompt_sets import Picture, Prompt, add_rows, pictures, read_prompts

if TYPE_CHECKING:
    from lidit.text_to_image import TextToImage

LayoutName = Literal["geneval", "t2i-compbench", "dpg", "drawbench", "flat"]
PNG_SHARE = 0.5  # of the raw pixels, what a dry run expects


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(StageConfig):
    """The generate job."""

    weights: str
    """Trained weights: folder, or `owner/name@commit` on the hub."""
    store: str = "./generated"
    """Folder or URI of the sample table; made if it is not there."""
    prompts: str | None = None
    """Prompts: a .txt, .tsv, .csv or .jsonl file, or a folder of .txt files with one each."""
    prompt: str | None = None
    """One prompt, instead of `prompts`."""
    layout: LayoutName = "flat"
    """How files are named in `out`, and how many images with which seeds a prompt gets where the fields below say nothing."""
    out: str | None = None
    """Folder for the files; null: none, the table has the images."""
    images_per_prompt: PositiveInt | None = None
    """Images of each prompt; null: as the layout has it."""
    seed: int | None = None
    """Image k of every prompt begins with the noise of `seed` + k; null: as the layout has it."""
    sampler: SamplerConfig = SamplerConfig()
    """Steps and guidance."""
    height: int | None = None
    """Pixels; null: what the weights were trained at."""
    width: int | None = None
    """Pixels; null: what the weights were trained at."""
    batch_size: PositiveInt = 16
    """Images made at once; changes speed and memory, not the images."""
    rows_per_fragment: PositiveInt = 64
    """Images of a fragment: what is done again after a kill, at most, per actor."""
    long_prompts: Literal["refuse", "cut"] = "refuse"
    """What to do about prompts that are longer than an encoder reads: stop before anything is made, or cut their ends and count
    them."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Where encoders are now, by name: folder or `owner/name@commit`. Default: where they were in training."""
    vae: str | None = None
    """Where the VAE is now: folder or `owner/name@commit`. Default: where it was in training."""
    download_models: bool = False
    """Fetch encoders and a VAE that the weights name by a hub id and that are not in the local hub cache: the weights' author
    chose them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.prompts is None) == (self.prompt is None):
            raise ValueError("expected either --prompts FILE or --prompt TEXT")

    @property
    def count(self) -> int:
        """Images of each prompt."""
        return LAYOUTS[self.layout].images_per_prompt if self.images_per_prompt is None else self.images_per_prompt

    @property
    def first_seed(self) -> int:
        """Seed of each prompt's first image."""
        return LAYOUTS[self.layout].seed if self.seed is None else self.seed

    def folder(self) -> Path:
        """The weights' files, whole."""
        return resolve_weights(*split_revision(self.weights))

    def size(self) -> tuple[int, int]:
        """(height, width) of the images, pixels."""
        from lidit.text_to_image import IMAGE_SIZE

        height, width = read_config(self.folder()).get("image_size", IMAGE_SIZE)
        return self.height or height, self.width or width


class GenerateImages:
    """`prompt`, `seed` -> `image` (PNG), its size, and what made it."""

    name = "generate"

    def __init__(self, config: GenerateConfig):
        self.config = config
        self.height, self.width = config.size()
        device = config.actors.device()
        self.pipe = open_pipe(config, device)
        self.digest = weights_digest(config.folder(), FILES)
        self.window_rows = config.rows_per_fragment

    @classmethod
    def writes(cls, config: GenerateConfig) -> list[pa.Field]:
        """The image and its facts; what they all depend on is in the metadata."""
        metadata = {
            READS: columns.PROMPT,
            ALSO_READS: columns.SEED,
            columns.META_STAGE: cls.name,
            columns.META_FINGERPRINT: json.dumps(fingerprint(config), sort_keys=True),
            columns.META_VERSIONS: json.dumps(
                {name: version(name) for name in ("torch", "transformers", "tokenizers", "diffusers")}
            ),
        }
        return [
            pa.field(columns.IMAGE, pa.large_binary(), metadata={**metadata, **UNCOMPRESSED}),
            pa.field(columns.HEIGHT, pa.int32(), metadata=metadata),
            pa.field(columns.WIDTH, pa.int32(), metadata=metadata),
            pa.field(columns.GUIDANCE_SCALE, pa.float32(), metadata=metadata),
            pa.field(columns.NUM_INFERENCE_STEPS, pa.int32(), metadata=metadata),
            pa.field(columns.WEIGHTS_DIGEST, pa.string(), metadata=metadata),
        ]

    @classmethod
    def bytes_per_row(cls, config: GenerateConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        """About what a PNG of that size takes."""
        height, width = config.size()
        return height * width * 3 * PNG_SHARE

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """Makes the window's images, `batch_size` at a time."""
        prompts, seeds = window.column(columns.PROMPT).to_pylist(), window.column(columns.SEED).to_pylist()
        start = time.perf_counter()
        images = self.pipe(
            prompts,
            seed=seeds,
            height=self.height,
            width=self.width,
            batch_size=self.config.batch_size,
            **asdict(self.config.sampler),
        )
        seconds = time.perf_counter() - start
        count, sampler = len(images), self.config.sampler
        arrays = {
            columns.IMAGE: pa.array([_png(image) for image in images], pa.large_binary()),
            columns.HEIGHT: pa.array([self.height] * count, pa.int32()),
            columns.WIDTH: pa.array([self.width] * count, pa.int32()),
            columns.GUIDANCE_SCALE: pa.array([sampler.guidance_scale] * count, pa.float32()),
            columns.NUM_INFERENCE_STEPS: pa.array([sampler.num_inference_steps] * count, pa.int32()),
            columns.WEIGHTS_DIGEST: pa.array([self.digest] * count, pa.string()),
        }
        return Columns({name: arrays[name] for name in wanted}, counts={"images": count, "call_seconds": seconds})


def open_pipe(config: GenerateConfig, device: str) -> TextToImage:
    """Encoders, model and VAE that belong together, on the device."""
    from lidit.text_to_image import TextToImage

    weights, revision = split_revision(config.weights)
    return TextToImage.from_pretrained(
        weights,
        revision=revision,
        device=device,
        encoders=config.encoders,
        vae=config.vae,
        download_models=config.download_models,
    )


def fingerprint(config: GenerateConfig) -> dict[str, Any]:
    """All that an image depends on besides its prompt and seed."""
    folder = config.folder()
    saved = read_config(folder)
    return {
        "weights": weights_digest(folder, FILES),
        "objective": saved.get("objective"),
        "encoders": {
            name: _encoder_print(config, name, encoder) for name, encoder in saved.get("encoders", {}).items()
        },
        "vae": saved.get("vae", {}).get("fingerprint"),
        "size": list(config.size()),
        **to_plain(config.sampler),
    }


def _encoder_print(config: GenerateConfig, name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder's fingerprint in training, and the digest of its config as it is now where training recorded none."""
    recorded = saved.get("fingerprint") or {}
    if "model_config" in recorded:
        return recorded
    components = Components(config.folder(), download=config.download_models)
    return {**recorded, "model_config": config_digest(components.encoder_folder(name, config.encoders.get(name)))}


def check_input(config: GenerateConfig, prompts: Sequence[Prompt]) -> int:
    """Says before any work what would go wrong; loads tokenizers and configs, no weights. Returns how many prompts are cut.

    Raises:
        ValueError: encoders or VAE are not those of training, the size cannot be made, or prompts are too long.
    """
    folder = config.folder()
    saved, components = read_config(folder), Components(folder, download=config.download_models)
    unknown = sorted(set(config.encoders) - set(saved["model"]["encoders"]))
    if unknown:
        raise ValueError(f"encoders: expected names among {', '.join(saved['model']['encoders'])}, received {unknown}")
    unit = components.vae(config.vae, "cpu").downscale * saved["model"]["patch_size"]
    height, width = config.size()
    if height < unit or width < unit or height % unit or width % unit:
        raise ValueError(
            f"size {height} x {width} pixels: expected height and width to be multiples of {unit} (VAE times patch size)"
        )
    too_long: set[int] = set()
    for name in saved["model"]["encoders"]:
        encoder = components.encoder(name, config.encoders.get(name), "cpu")
        _, excess = encoder.tokenize([prompt.text for prompt in prompts])
        rows = [row for row, tokens in enumerate(excess.tolist()) if tokens > 0]
        if rows and config.long_prompts == "refuse":
            first = prompts[rows[0]]
            raise ValueError(
                f"{len(rows)} of {len(prompts)} prompts are longer than the {encoder.max_prompt_tokens} tokens that "
                f"encoder {name} reads, by up to {int(excess.max())}; first prompt {first.index}, {first.text[:60]!r}. Shorten "
                f"them, or let their ends be cut off with --long_prompts cut"
            )
        too_long.update(rows)
    return len(too_long)


def main(config: GenerateConfig) -> Summary:
    """Adds the rows that are new, makes the images that are missing, writes the files.

    Raises:
        ValueError: the input is wrong; nothing was made.
        RuntimeError, OSError: a worker failed, or a disk is full; the same command goes on.
    """
    config = settled(config)
    prompts, name = _prompts(config)
    wanted = pictures(name, prompts, config.count, config.first_seed)
    cut = check_input(config, prompts)
    if config.out is not None:
        check_folder(config.layout, Path(config.out), image_files(config.layout, wanted, config.count))
    if config.dry_run and not samples_of(config.store).exists():
        height, width = config.size()
        plan = [f"{len(prompts):,} prompts x {config.count} images of {height} x {width} pixels, into {config.store}"]
        return Summary("generate", config.store, ok=True, dry_run=True, plan=plan)
    if not config.dry_run:
        add_rows(config.store, wanted, config.rows_per_fragment)
    summary = run_stage(GenerateImages, config)
    summary.counts |= {"truncated": cut} if cut else {}
    summary.next = f"lidit score --store {config.store}"
    if config.out is not None and not config.dry_run:
        _write_files(config, wanted, summary)
    return summary


def _prompts(config: GenerateConfig) -> tuple[list[Prompt], str]:
    """(the prompts, name of their set)."""
    if config.prompt is not None:
        if not config.prompt.strip():
            raise ValueError("prompt: expected some words, received none")
        return [Prompt(0, config.prompt, {"prompt": config.prompt}, "0")], "prompt"
    assert config.prompts is not None
    return read_prompts(config.prompts), Path(config.prompts).name


def _write_files(config: GenerateConfig, wanted: Sequence[Picture], summary: Summary) -> None:
    dataset = samples_of(config.store).open()
    ids = dataset.to_table(columns=[columns.IMAGE_ID])[columns.IMAGE_ID].to_pylist()
    row_of = {image_id: row for row, image_id in enumerate(ids)}

    def read(image_ids: Sequence[str]) -> Mapping[str, bytes]:
        taken = dataset.take([row_of[image_id] for image_id in image_ids], columns=[columns.IMAGE])[
            columns.IMAGE
        ].to_pylist()
        return {image_id: data for image_id, data in zip(image_ids, taken) if data is not None}

    assert config.out is not None
    written = write_layout(config.layout, Path(config.out), wanted, config.count, read)
    summary.counts["files"] = written
    due = len(wanted) // config.count if LAYOUTS[config.layout].grid else len(wanted)
    if written < due:
        summary.ok = False
        print(
            f"{due - written} of {due} files are missing in {config.out}: their images failed, see the column "
            f"{columns.error('generate')} of {config.store}",
            file=sys.stderr,
        )


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    run("generate")
