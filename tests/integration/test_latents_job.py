"""The latents job on real engines: local Ray, Lance tables, real photographs with TAEF2, scenes with the demo's VAE."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from lidit.frozen.vae import load_vae
from lidit.images.pixels import bucket_pixels, to_unit_range
from lidit.store.buckets import make_buckets
from lidit.store.codec import decode_latents
from pipelines import embed, ingest, latents, verify
from pipelines.embed import EmbedConfig
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import Table
from pipelines.engine.unit_pass import CommitConfig
from pipelines.ingest import IngestConfig
from pipelines.latents import LatentsConfig
from pipelines.verify import VerifyConfig
from tests.support.stores import World

ONE = ActorsConfig(min=1, max=1, num_gpus=0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def config(world: Any) -> LatentsConfig:
    """The demo's: its autoencoder, buckets of about 64 x 64 pixels."""
    return LatentsConfig(store=str(world.store), actors=ONE, commit=CommitConfig(2, 5.0))


def put(world: Any, source: str, rows_per_fragment: int = 50) -> Any:
    return ingest.main(IngestConfig(source, str(world.store), rows_per_fragment=rows_per_fragment, actors=ONE))


def read(world: Any, column: str = "latents", bucket: str = "bucket") -> dict[str, np.ndarray | None]:
    """image_id -> latents."""
    table = world.table.to_table(columns=["image_id", column, bucket])
    values = decode_latents(table[column], world.table.schema.field(column), table[bucket])
    return dict(zip(table["image_id"].to_pylist(), values))


def psnr_of(vae: Any, stored: np.ndarray, data: bytes, buckets: Any) -> float:
    """Stored latents decoded, against the pixels of the bucket, in dB."""
    _, pixels = bucket_pixels(data, buckets)
    wanted = to_unit_range(torch.from_numpy(pixels.copy())[None])
    decoded = vae.decode(torch.from_numpy(stored.copy())[None]).clamp(-1, 1)
    assert decoded.shape == wanted.shape
    return -10 * math.log10(((decoded - wanted) / 2).square().mean().item())


def test_scenes_with_the_demo_autoencoder(world: Any, config: LatentsConfig) -> None:
    put(world, "scenes:120")
    summary = latents.main(config)
    assert (summary.ok, summary.rows, summary.fragments, summary.errors) == (True, 120, 3, 0)
    assert summary.counts["images"] == 120 and summary.rates["images_per_second"] > 0
    assert "images/s" in summary.to_text() and "ms to decode and resize" in summary.to_text()
    rows, values = world.rows(), read(world)
    vae = load_vae("demo/vae", device="cpu")
    channels, downscale = vae.channels, vae.downscale
    for image_id, value in values.items():
        height, width = rows[image_id]["height"], rows[image_id]["width"]
        assert rows[image_id]["bucket"] == f"{height}x{width}", "scenes have the sizes of the buckets"
        assert value is not None and value.shape == (channels, height // downscale, width // downscale)
    everything = np.concatenate([value.reshape(-1) for value in values.values() if value is not None])
    assert abs(everything.mean()) < 0.1 and abs(everything.std() - 1) < 0.1, "scaled as training wants it"
    found = [psnr_of(vae, values[name], rows[name]["image"], config.buckets) for name in list(values)[::10]]  # type: ignore[arg-type]
    assert np.mean(found) >= 28
    for fragment in world.table.get_fragments():
        assert len(fragment.metadata.files) == 2
    report = verify.main(VerifyConfig(str(world.store), sample=0))
    assert report.ok and "latents" in report.checks, report.to_text()
    assert world.orphans() == set()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, data: Path, llms: Any) -> Any:
    """A store of the 35 photographs, five rows each, with TAEF2's latents in the centre square and in wide buckets."""
    torch.set_num_threads(1)
    world = World(tmp_path_factory.mktemp("photos"), llms)
    assert put(world, f"coco:{data / 'coco-mini-cc'}", 175).rows == 175
    square = LatentsConfig(
        store=str(world.store), model=str(data / "taef2"), resolution=256, step=32, max_aspect=1.0, actors=ONE
    )
    wide = dataclasses.replace(square, max_aspect=2.0, name="wide")
    world.summaries = latents.main(square), latents.main(wide)
    world.wide_buckets = wide.buckets
    return world


def one_per_photo(world: Any, column: str, bucket: str) -> list[tuple[str, bytes, np.ndarray]]:
    """(id, image, latents) of each photo, by id; asserts that equal images have equal latents."""
    rows, found = world.rows(), {}
    for image_id, value in read(world, column, bucket).items():
        image = rows[image_id]["image"]
        assert value is not None
        if image in found:
            assert np.array_equal(found[image][1], value)
        found.setdefault(image, (image_id, value))
    return sorted((image_id, image, value) for image, (image_id, value) in found.items())


def photo_figures(data: Path) -> dict[bytes, dict[str, Any]]:
    """A photograph -> its PSNR in dB, mean and deviation of its latents."""
    images = json.loads((data / "golden" / "taef2_reference.json").read_text())["images"]
    files = {path.name: path.read_bytes() for path in (data / "coco-mini-cc").rglob("*.jpg")}
    return {files[figures["file_name"]]: figures for figures in images}


def test_photos_in_the_centre_square_reach_the_reference(photos: Any, data: Path) -> None:
    summary = photos.summaries[0]
    assert (summary.ok, summary.rows, summary.errors, summary.counts["images"]) == (True, 175, 0, 35)
    made = one_per_photo(photos, "latents", "bucket")
    assert len(made) == 35 and all(value.shape == (32, 32, 32) for _, _, value in made)
    figures = photo_figures(data)  # of these photographs; the file's own means are of more
    vae = load_vae(str(data / "taef2"), device="cpu")
    found = [psnr_of(vae, value, image, ((256, 256),)) for _, image, value in made]
    assert np.mean(found) == pytest.approx(28.0, abs=1.0), "dB"
    for psnr, (_, image, value) in zip(found, made):
        wanted = figures[image]
        np.testing.assert_allclose(psnr, wanted["psnr_db"], atol=0.25, err_msg="bf16 costs little")
        np.testing.assert_allclose(
            (value.mean(), value.std()), (wanted["latent_mean"], wanted["latent_std"]), atol=1e-2
        )


def test_photos_in_buckets_of_their_aspect(photos: Any, data: Path) -> None:
    summary = photos.summaries[1]
    assert (summary.ok, summary.rows, summary.counts["images"]) == (True, 175, 35)
    buckets = make_buckets(256, 32)
    assert photos.wide_buckets == buckets
    rows = photos.rows()
    assert {row["bucket"] for row in rows.values()} == {"256x256"}, "the first run's columns are as they were"
    assert len({row["bucket_wide"] for row in rows.values()}) >= 4
    made = one_per_photo(photos, "latents_wide", "bucket_wide")
    for image_id, _, value in made:
        height, width = map(int, rows[image_id]["bucket_wide"].split("x"))
        assert value.shape == (32, height // 8, width // 8)
        lost = math.log(height / width) - math.log(rows[image_id]["height"] / rows[image_id]["width"])
        assert abs(lost) < 0.25, "at most a fifth of a side is cut off"
    vae = load_vae(str(data / "taef2"), device="cpu")
    found = [psnr_of(vae, value, image, buckets) for _, image, value in made[::4]]
    assert np.mean(found) == pytest.approx(28.0, abs=2.0), "dB; every fourth photo"
    report = verify.main(VerifyConfig(str(photos.store), sample=0))
    assert report.ok, report.to_text()


def test_new_rows_are_the_only_work_of_the_next_run(world: Any, config: LatentsConfig) -> None:
    put(world, "scenes:60")
    latents.main(config)
    before = read(world)
    assert put(world, "scenes:100").rows == 40
    plan = latents.main(dataclasses.replace(config, dry_run=True))
    assert "40 rows" in "\n".join(plan.plan) and "there, same fingerprint" in "\n".join(plan.plan)
    summary = latents.main(config)
    assert (summary.rows, summary.fragments) == (40, 1)
    after = read(world)
    assert len(after) == 100 and all(np.array_equal(after[name], value) for name, value in before.items())
    assert latents.main(config).fragments == 0


def test_dry_run_tells_the_bytes(world: Any, config: LatentsConfig) -> None:
    put(world, "scenes:60")
    version = world.table.version
    plan = "\n".join(latents.main(dataclasses.replace(config, dry_run=True)).plan)
    assert "2 fragments, 60 rows" in plan and "latents: new" in plan and "bucket: new" in plan
    assert world.table.version == version
    promised = int(re.search(r"\(([\d,]+) bytes a row", plan)[1].replace(",", ""))  # type: ignore[index]
    summary = latents.main(config)
    assert summary.rates["bytes_per_row"] == pytest.approx(promised, rel=0.1)


def test_another_fingerprint_is_refused_and_overwrite_replaces(world: Any, config: LatentsConfig) -> None:
    put(world, "scenes:60")
    latents.main(config)
    first = read(world)
    other = dataclasses.replace(config, codec="fp32", max_aspect=1.0, max_upscale=2.0)
    with pytest.raises(ValueError, match=r"latents.*codec.*max_aspect.*--overwrite"):
        latents.main(other)
    assert all(np.array_equal(value, first[name]) for name, value in read(world).items())
    latents.main(dataclasses.replace(other, overwrite=True))
    assert {row["bucket"] for row in world.rows().values()} == {"64x64"}
    assert world.table.schema.field("latents").metadata[b"lidit:codec"] == b"fp32"


def test_moments_beside_latents_share_the_bucket(world: Any, config: LatentsConfig) -> None:
    put(world, "scenes:30")
    latents.main(dataclasses.replace(config, codec="fp32"))
    bucket = [row["bucket"] for row in world.rows().values()]
    summary = latents.main(dataclasses.replace(config, codec="fp32", moments=True))
    assert summary.rows == 30 and [row["bucket"] for row in world.rows().values()] == bucket
    mean = read(world)
    for image_id, moments in read(world, "latent_moments").items():
        value = mean[image_id]
        assert value is not None and moments is not None and moments.shape == (2 * len(value), *value.shape[1:])
        np.testing.assert_allclose(moments[: len(value)], value, atol=1e-4)
        assert (moments[len(value) :] > 0).all()


def test_beside_an_embed_run(world: Any, config: LatentsConfig) -> None:
    """Two stages on one table at once, each its own columns."""
    from concurrent.futures import ThreadPoolExecutor

    from lidit.frozen.text import EncoderConfig

    put(world, "scenes:90", 30)
    encoder = EncoderConfig("one", str(world.llms["one"]), template="plain", dtype="fp32")
    embed_config = EmbedConfig(
        store=str(world.store), text=("caption_original",), encoders=(encoder,), actors=ONE, commit=CommitConfig(1, 0.0)
    )
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(latents.main, config), pool.submit(embed.main, embed_config)]
        assert [run.result().fragments for run in runs] == [3, 3]
    for row in world.rows().values():
        assert row["latents"] and (row["caption_original_embeds_one"] is None) == (row["caption_original"] is None)


# -- images as they come -------------------------------------------------------------------------------------------------


def write_images(world: Any, images: dict[str, bytes | None]) -> None:
    """Puts images straight into a table, also such as no source would let in."""
    schema = pa.schema([pa.field("image_id", pa.string()), pa.field("image", pa.large_binary())])
    table = Table(str(world.store / "samples.lance"))
    table.create(schema)
    writer = ColumnFileWriter(table.uri, schema, "ingest-test")
    rows = [{"image_id": name, "image": data} for name, data in images.items()]
    writer.write(pa.RecordBatch.from_pylist(rows, schema))
    table.append([writer.finish(table.open())])


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_odd_and_bad_images(world: Any, config: LatentsConfig) -> None:
    """Every good one is encoded, every bad one has a reason, the job goes on and says so."""
    picture = Image.effect_mandelbrot((160, 96), (-2, -1, 1, 1), 50).convert("RGB")
    png = encoded(picture, "PNG")
    good = {
        "plain": png,
        "cmyk": encoded(picture.convert("CMYK"), "JPEG"),
        "16 bits": encoded(Image.fromarray(np.arange(96 * 160, dtype=np.uint16).reshape(96, 160) * 4), "PNG"),
        "palette": encoded(picture.convert("P"), "PNG"),
        "animated GIF": encoded(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
        "animated WebP": encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(90)]),
        "turned": encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=_turned()),
    }
    bad = {
        "truncated": png[: len(png) // 2],
        "0 bytes": b"",
        "1x1": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "text": b"Not found",
    }
    write_images(world, {**good, **bad, "null": None})
    summary = latents.main(dataclasses.replace(config, max_error_rate=0.5))
    assert (summary.ok, summary.rows, summary.errors) == (True, len(good) + len(bad) + 1, len(bad))
    assert len(summary.error_examples) == len(bad)
    rows = world.rows()
    for name in good:
        assert rows[name]["bucket"] == "48x80" and rows[name]["latents_error"] is None, rows[name]
    for name in bad:
        assert rows[name]["bucket"] is rows[name]["latents"] is None
        assert rows[name]["latents_error"].startswith("latents: ")
    assert rows["null"]["latents"] is rows["null"]["latents_error"] is None
    with pytest.raises(RuntimeError, match=r"max_error_rate 0\.01 allows"):
        latents.main(dataclasses.replace(config, overwrite=True))


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter clockwise
    return exif


def test_through_ingest_a_folder_of_good_and_bad_files(world: Any, config: LatentsConfig, tmp_path: Path) -> None:
    """Names lie: a PNG called .jpg is a PNG, a text called .jpg is no image. What ingest refused is null here."""
    folder = tmp_path / "images"
    folder.mkdir()
    picture = Image.effect_mandelbrot((100, 100), (-2, -1, 1, 1), 50)
    (folder / "a.jpg").write_bytes(encoded(picture, "PNG"))
    (folder / "b.jpg").write_text("this is text")
    (folder / "c.png").write_bytes(encoded(picture.resize((8, 8)), "PNG"))
    put(world, f"folder:{folder}")
    summary = latents.main(dataclasses.replace(config, max_error_rate=0.5))
    rows = {name.rpartition("/")[2]: row for name, row in world.rows().items()}
    assert summary.ok and summary.errors == 1 and summary.counts["images"] == 1
    assert rows["a.jpg"]["bucket"] == "64x64"
    assert rows["b.jpg"]["ingest_error"] and rows["b.jpg"]["latents_error"] is None
    assert "8.00 times larger" in rows["c.png"]["latents_error"]
