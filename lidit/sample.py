"""Makes images: a weights folder and a prompt -> image files.

The encoders and the VAE are those that the weights were trained with: they are found where they were then, or by
`--encoders` and `--vae`, and checked.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lidit.cli import run
from lidit.runtime.fields import JobConfig, PositiveInt
from lidit.runtime.result import JobResult
from lidit.sampler import SamplerConfig


@dataclass(frozen=True, kw_only=True)
class SampleConfig(SamplerConfig, JobConfig):
    """The sample job."""

    weights: str
    """Trained weights: folder, or `owner/name@commit` on the hub."""
    prompt: str
    """Description of the image."""
    out: str = "sample.png"
    """Image file; the format is told by its ending. Several images are numbered: sample-0.png, sample-1.png ..."""
    images: PositiveInt = 1
    """Number of images; image k begins with the noise of `seed + k`."""
    seed: int = 0
    """Seed of the noise: the same seed gives the same image."""
    height: int | None = None
    """Pixels; by default what the weights were trained at."""
    width: int | None = None
    """Pixels; by default what the weights were trained at."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from; by default the empty prompt."""
    batch_size: int = 8
    """Images made at once; lower it if a GPU runs out of memory."""
    device: str | None = None
    """`cpu`, `cuda`, `cuda:1` ...; by default the GPU if there is one."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Places of the encoders now, by name: folder or `owner/name@commit`. Default: where they were in training."""
    vae: str | None = None
    """Place of the VAE now: folder or `owner/name@commit`. Default: where it was in training."""
    download_models: bool = False
    """Fetch encoders and a VAE that the weights name by a hub id and that are not in the local hub cache: the weights' author
    chose them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_ending(self.out)

    @property
    def files(self) -> list[Path]:
        """Files that the images are written to."""
        out = Path(self.out)
        if self.images == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(self.images)]


@dataclass
class SampleResult(JobResult):
    """Images that the job made."""

    job: str = field(default="sample", init=False)
    weights: str
    files: list[str]
    seconds: float  # sampling and decoding, loading not counted
    load_seconds: float

    def lines(self) -> Iterator[str]:
        """How long it took and where the files are."""
        yield f"sample: {len(self.files)} in {self.seconds:,.1f} s, after {self.load_seconds:,.1f} s of loading"
        yield from (f"  {file}" for file in self.files)


def main(config: SampleConfig) -> SampleResult:
    """Loads the weights, makes the images, saves them."""
    from lidit.runtime.model_files import split_revision
    from lidit.text_to_image import TextToImage

    started = time.perf_counter()
    weights, revision = split_revision(config.weights)
    pipe = TextToImage.from_pretrained(
        weights,
        revision=revision,
        device=config.device,
        encoders=config.encoders,
        vae=config.vae,
        download_models=config.download_models,
    )
    loaded = time.perf_counter()
    images = pipe(
        config.prompt,
        seed=config.seed,
        images_per_prompt=config.images,
        height=config.height,
        width=config.width,
        negative_prompt=config.negative_prompt,
        batch_size=config.batch_size,
        on_step=_show_progress if sys.stderr.isatty() else None,
        **{option.name: getattr(config, option.name) for option in dataclasses.fields(SamplerConfig)},
    )
    made = time.perf_counter()
    for file, image in zip(config.files, images):
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
    return SampleResult(config.weights, [str(file) for file in config.files], made - loaded, loaded - started)


def _show_progress(done: int, steps: int, latents: object) -> None:
    print(f"\rstep {done} of {steps}", end="\n" if done == steps else "", file=sys.__stderr__, flush=True)


def _check_ending(out: str) -> None:
    """Raises ValueError for a file whose format Pillow cannot write: before the work, not after it."""
    from PIL import Image

    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if Path(out).suffix.lower() not in endings:
        raise ValueError(f"out: expected an image file such as sample.png, .jpg or .webp, received {out!r}")


if __name__ == "__main__":
    run("sample")
