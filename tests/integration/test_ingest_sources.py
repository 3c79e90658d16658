"""Ingest on real engines: the same pictures by every way are the same rows, whatever is listed twice, grown or changed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import ingest
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.unit_pass import ErrorRateExceeded
from pipelines.ingest import IngestConfig
from pipelines.ingestion.filters import FiltersConfig
from pipelines.sources.base import ColumnsConfig
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.integration
TWO = ActorsConfig(min=2, max=2, num_cpus=0.5, num_gpus=0)
Pair = tuple[bytes, str | None]


def write_tar(path: Path, pairs: Iterable[Pair], first: int = 0, extension: str = "jpg") -> Path:
    """Samples with keys that count from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, (image, caption) in enumerate(pairs, start=first):
            parts = [(f"{key:06d}.{extension}", image)] + ([(f"{key:06d}.txt", caption.encode())] if caption else [])
            for name, content in parts:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def as_table(pairs: Sequence[Pair]) -> pa.Table:
    return pa.table(
        {"jpg": pa.array([image for image, _ in pairs], pa.binary()), "caption": [text for _, text in pairs]}
    )


@pytest.fixture(scope="module")
def pairs(photo: Callable[..., bytes]) -> list[Pair]:
    """60 pictures with captions."""
    return [(photo(seed), f"caption {seed}") for seed in range(60)]


def put(world: Any, spec: str, store: Path | None = None, **options: Any) -> Any:
    options = {"rows_per_fragment": 16, "actors": TWO, **options}
    return ingest.main(IngestConfig(spec, str(store or world.store), **options))


def contents(world: Any) -> Counter[Pair]:
    return Counter((row["image"], row["caption_original"]) for row in world.rows().values())


def write_img2dataset(folder: Path, pairs: Sequence[Pair]) -> None:
    for number, (image, caption) in enumerate(pairs):
        shard = folder / f"{number // 30:05d}"
        shard.mkdir(parents=True, exist_ok=True)
        (shard / f"{number:09d}.jpg").write_bytes(image)
        (shard / f"{number:09d}.txt").write_text(str(caption))
        (shard / f"{number:09d}.json").write_text(json.dumps({"caption": caption, "status": "success"}))


@pytest.mark.usefixtures("ray_here")
def test_the_same_pictures_by_any_way_are_the_same_rows(world: Any, pairs: list[Pair]) -> None:
    folder = world.folder
    for number in range(3):
        write_tar(folder / "tars" / f"{number:04d}.tar", pairs[number * 20 : number * 20 + 20], number * 20)
    pq.write_table(as_table(pairs), folder / "a.parquet", row_group_size=25)
    lance.write_dataset(as_table(pairs), str(folder / "t.lance"), max_rows_per_file=25)
    write_img2dataset(folder / "files", pairs)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(as_table(pairs).to_pydict()).save_to_disk(str(folder / "hf"))

    first = put(world, f"webdataset:{folder}/tars/{{0000..0002}}.tar")
    assert (first.ok, first.rows, first.errors, first.counts["read"]) == (True, 60, 0, 60)
    assert contents(world) == Counter(pairs), "bytes as they came"
    rows = world.rows()
    for spec in (
        f"parquet:{folder}/a.parquet",
        f"lance:{folder}/t.lance",
        f"hf:{folder}/hf",
        f"img2dataset:{folder}/files",
    ):
        again = put(world, spec)
        assert (again.ok, again.rows, again.counts["read"], again.counts["already_there"]) == (True, 0, 60, 60), spec
    assert put(world, f"lance:{folder}/t.lance").counts == {"shards_done_before": 3}
    assert world.rows() == rows and world.orphans() == set()
    world.table.validate()


@pytest.mark.usefixtures("ray_here")
def test_only_what_is_new_is_added(world: Any, pairs: list[Pair]) -> None:
    tars = world.folder / "tars"
    write_tar(tars / "0.tar", pairs[:20])
    write_tar(tars / "1.tar", pairs[10:30])  # ten of them are in the other one
    first = put(world, f"webdataset:{tars}")
    assert (first.rows, first.counts["read"], first.counts["repeated"]) == (30, 40, 10)
    version = world.table.version
    second = put(world, f"webdataset:{tars}")
    assert second.counts == {"shards_done_before": 2} and world.table.version == version
    assert put(world, f"webdataset:{tars}", reread=True).counts["already_there"] == 40

    shutil.copy(tars / "1.tar", tars / "copy.tar")  # the same under another name
    write_tar(tars / "0.tar", pairs[:25])  # rewritten, five captions more
    write_tar(tars / "2.tar", [(pairs[0][0], "another caption"), *pairs[28:40]])
    third = put(world, f"webdataset:{tars}")
    assert (third.rows, third.counts["shards_done_before"], third.counts["read"]) == (11, 1, 58)
    assert contents(world) == Counter([*pairs[:40], (pairs[0][0], "another caption")])
    assert "1 shards were taken in whole before" in third.to_text() and "47 rows were there already" in third.to_text()


@pytest.mark.usefixtures("ray_here")
def test_photos_of_coco_as_a_webdataset(world: Any, data: Path) -> None:
    """The 35 photos with their captions: five rows each, by `coco` and by tars; one each if images must be unique."""
    root = data / "coco-mini-cc"
    record = json.loads((root / "captions.json").read_text())
    names = {image["id"]: image["file_name"] for image in record["images"]}
    pairs = [((root / "images" / names[n["image_id"]]).read_bytes(), n["caption"]) for n in record["annotations"]]
    for number in range(5):
        write_tar(world.folder / "tars" / f"{number}.tar", pairs[number * 35 : number * 35 + 35], number * 35)
    by_tar = put(world, f"webdataset:{world.folder}/tars")
    assert (by_tar.rows, by_tar.errors) == (175, 0)
    assert contents(world) == Counter((image, text.rstrip("\r\n")) for image, text in pairs)
    store = world.folder / "coco"
    assert put(world, f"coco:{root}", store).rows == 175
    table = (
        lance.dataset(str(store / "samples.lance")).to_table(["image", "height", "width", "image_digest"]).to_pylist()
    )
    sizes = {row["image_digest"]: (row["height"], row["width"]) for row in table}
    assert len(sizes) == 35
    assert {row["image_digest"]: (row["height"], row["width"]) for row in world.rows().values()} == sizes
    unique = put(
        world, f"webdataset:{world.folder}/tars", world.folder / "unique", filters=FiltersConfig(duplicates=True)
    )
    assert (unique.rows, unique.counts["filtered_duplicates"]) == (35, 140)
    assert "140 by duplicates" in unique.to_text()


@pytest.mark.usefixtures("ray_here")
def test_near_duplicates_across_workers(world: Any, photo: Callable[..., bytes]) -> None:
    """Each picture in three qualities, in three shards: one of each is left, whichever comes first."""
    for number, quality in enumerate((95, 80, 60)):
        write_tar(world.folder / "tars" / f"{number}.tar", [(photo(seed, quality=quality), None) for seed in range(30)])
    made = put(world, f"webdataset:{world.folder}/tars", filters=FiltersConfig(near_duplicates=6), rows_per_fragment=4)
    assert (made.rows, made.counts["filtered_near_duplicates"]) == (30, 60)
    seed_of = {photo(seed, quality=quality): seed for seed in range(30) for quality in (95, 80, 60)}
    assert {seed_of[row["image"]] for row in world.rows().values()} == set(range(30))


@pytest.mark.usefixtures("ray_here")
def test_damage_is_rows_with_reasons_and_the_job_goes_on(world: Any, pairs: list[Pair], zoo: Any) -> None:
    tars = world.folder / "tars"
    write_tar(tars / "0.tar", [(data, name) for name, (data, _) in zoo.bad.items()])
    write_tar(tars / "1.tar", pairs[:20])
    (tars / "1.tar").write_bytes((tars / "1.tar").read_bytes()[:30_000])
    (tars / "2.tar").write_bytes(b"no tar")
    write_tar(tars / "3.tar", [(data, name) for name, data in zoo.good.items()])
    made = put(world, f"webdataset:{tars}", max_error_rate=1.0)
    rows = world.rows().values()
    errors = {row["source"]: row["ingest_error"] for row in rows if row["ingest_error"]}
    assert made.ok and made.errors == len(zoo.bad) + 2 == len(errors)
    assert "damaged" in errors["tars/1.tar#end"] and "damaged" in errors["tars/2.tar#end"]
    assert {row["caption_original"] for row in rows} >= set(zoo.good)
    assert all(row["image"] is None and row["caption_original"] is None for row in rows if row["ingest_error"])
    write_tar(tars / "1.tar", pairs[:20])  # it is repaired
    again = put(world, f"webdataset:{tars}", max_error_rate=1.0)
    assert again.errors == 0 and contents(world).keys() >= set(pairs[:20])


@pytest.mark.usefixtures("ray_here")
def test_columns_named_wrongly_stop_the_job(world: Any, pairs: list[Pair]) -> None:
    """A column of bytes that are no images: the job does not fill the table with errors."""
    texts = [f"row {number}" for number in range(1800)]
    wrong = pa.table({"embedding": [text.encode() for text in texts], "caption": texts})
    pq.write_table(wrong, world.folder / "a.parquet", row_group_size=16)
    with pytest.raises(
        ErrorRateExceeded, match=r"max_error_rate 0.5 allows; such as: .*text, not an image.*--columns.image"
    ):
        put(world, f"parquet:{world.folder}/a.parquet", columns=ColumnsConfig(image="embedding"))
    assert world.table.count_rows() == 0


@pytest.mark.usefixtures("ray_here")
def test_dry_run_changes_nothing(world: Any, pairs: list[Pair]) -> None:
    pq.write_table(as_table(pairs), world.folder / "a.parquet", row_group_size=25)
    config = IngestConfig(f"parquet:{world.folder}/a.parquet", str(world.store), 25, TWO, dry_run=True)
    plan = ingest.main(config).to_text()
    assert "3 pieces in 3 units: 60 rows" in plan and "filters    none" in plan and not world.store.exists()
    ingest.main(dataclasses.replace(config, dry_run=False))
    assert "0 pieces in 0 units: 0 rows" in ingest.main(config).to_text()


def test_from_s3(world: Any, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """A server of S3's own protocol: tars and Parquet by URI, credentials from the environment alone."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    s3fs.S3FileSystem.clear_instance_cache()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "never-to-be-seen", "AWS_DEFAULT_REGION": "us-east-1", "NO_PROXY": "*",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fs = s3fs.S3FileSystem()
        fs.mkdir("bucket")
        for number in range(2):
            fs.put_file(
                write_tar(world.folder / f"{number}.tar", pairs[number * 20 : number * 20 + 20]),
                f"bucket/set/{number:02d}.tar",
            )
        pq.write_table(as_table(pairs[30:]), world.folder / "a.parquet", row_group_size=10)
        fs.put_file(world.folder / "a.parquet", "bucket/set/a.parquet")
        flags = ("--store", world.store, "--rows-per-fragment", 16, "--source")
        first = world.run("ingest", *flags, "webdataset:s3://bucket/set/{00..01}.tar")
        second = world.run("ingest", *flags, "parquet:s3://bucket/set")
        rows = (first.summary["rows"], second.summary["rows"], second.summary["counts"]["already_there"])
        assert rows == (40, 20, 10) and contents(world) == Counter(pairs)
        stamps = [piece["stamp"] for piece in open_source("webdataset:s3://bucket/set/*.tar").pieces()]
        assert len(set(stamps)) == 2 and None not in stamps, "ETags tell whether something changed"
        for key in (
            "dd/a.jpg",
            "dd//a.jpg",
            "dd/b::c.jpg",
            "dd/x y+%41#?.jpg",
        ):  # all that a key may be, each of them a file
            fs.pipe_file(f"bucket/{key}", pairs[len(key)][0])
        source = open_source("folder:s3://bucket/dd")
        listed = {item["path"]: source.record(item).image for item in source.items()}  # type: ignore[attr-defined]
        assert listed == {path: pairs[3 + len(path)][0] for path in ("a.jpg", "/a.jpg", "b::c.jpg", "x y+%41#?.jpg")}
        for number, key in enumerate(("odd/a.tar", "odd/a.tar::b.tar", "odd/a::file://b.tar")):
            fs.put_file(write_tar(world.folder / "x.tar", pairs[number : number + 1]), f"bucket/{key}")
        source = open_source("webdataset:s3://bucket/odd")
        assert [record.image for record in source.records(source.pieces())] == [pairs[0][0], pairs[1][0]]
        assert +source.left_out == {"left_out_name that reads as another address": 1}
        told = [first.stdout, first.stderr, *(path.read_text() for path in (world.store / "runs").rglob("*.yaml"))]
        assert "never-to-be-seen" not in "".join(told) and os.environ["AWS_SECRET_ACCESS_KEY"] == "never-to-be-seen"
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.stop()
