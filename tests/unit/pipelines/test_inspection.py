"""A store looked at: facts from metadata, samples, latents decoded back, a page that escapes everything and needs nothing."""

import base64
import html.parser
import io
import json
import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from lidit.store import columns
from pipelines import inspection
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.runs import Run
from pipelines.engine.table import Table
from pipelines.inspection import InspectConfig
from pipelines.report.charts import bars, histogram
from pipelines.report.facts import Reason, StageFacts, gather, labels, numbers
from pipelines.report.page import Chart, Page, human, render
from pipelines.report.samples import Picture, Sample, draw_samples, open_decoder, thumbnail
from pipelines.sources.base import ERROR_FIELD, ID_FIELD, IMAGE_FIELDS, Record, make_row

pytestmark = pytest.mark.unit

EVIL = '<script>alert(1)</script> & "quotes" \'n <img src=x onerror=alert(2)>'


@pytest.fixture
def store(tmp_path, photo):
    """A store of two fragments of ingest's columns, with captions that are an attack, and rows that failed."""
    table = Table(str(tmp_path / "shop" / columns.SAMPLES_TABLE))
    schema = pa.schema([ID_FIELD, *IMAGE_FIELDS, ERROR_FIELD])
    table.create(schema)
    rows = [make_row(Record(f"s/{n}.tar#{n}", photo(n, size=(96, 64 + n)), f"{EVIL} {n}"), True) for n in range(6)]
    rows += [make_row(Record(f"s/{n}.tar#{EVIL}", b"no image" if n else b"", None), True) for n in range(3)]
    rows.append(make_row(Record("s/9", photo(9), None), True))
    for part in (rows[:5], rows[5:]):
        writer = ColumnFileWriter(table.uri, schema, "ingest-1")
        writer.write(pa.RecordBatch.from_pylist(part, schema))
        table.append([writer.finish(table.open())])
    return str(tmp_path / "shop")


def add_columns(store, fields, values, fragments):
    """Columns of a stage, in some of the fragments."""
    table = Table(f"{store}/{columns.SAMPLES_TABLE}")
    table.declare(fields, columns.META_FINGERPRINT)
    for fragment in fragments:
        rows = table.open().get_fragment(fragment).count_rows()
        writer = ColumnFileWriter(table.uri, pa.schema(fields), "stage-1")
        writer.write(
            pa.record_batch([pa.array(value[:rows], f.type) for f, value in zip(fields, values)], pa.schema(fields))
        )
        table.attach([writer.finish(table.open(), fragment)])


def stage_field(name, kind, stage="embed", fingerprint="{}", **metadata):
    about = {columns.META_STAGE: stage, columns.META_FINGERPRINT: fingerprint, **metadata}
    return pa.field(name, kind, metadata=about)


# -- facts ------------------------------------------------------------------------------------------------------------


def test_facts_of_a_fresh_store(store):
    facts = gather(store)
    assert (facts.rows, facts.fragments, facts.deleted, facts.stages, facts.encoders) == (10, 2, 0, [], [])
    by_name = {column.name: column for column in facts.columns}
    assert by_name["image"].nulls is None and by_name["image"].rows == 10
    assert [by_name[name].nulls for name in ("image_id", "height", "caption_original", "ingest_error")] == [0, 3, 4, 7]
    assert facts.bytes == sum(column.bytes for column in facts.columns)
    files = sum(file.stat().st_size for file in Path(store).rglob("data/*.lance"))
    assert 0.7 * files < facts.bytes < files and by_name["image"].bytes > 0.5 * facts.bytes


def test_facts_of_stages_half_done(store):
    one = '{"model": "a"}'
    fields = [stage_field("x", pa.int32(), fingerprint=one), stage_field("y", pa.int32(), fingerprint=one)]
    add_columns(store, fields, [[1, None, 3, 4, 5], [1, 2, 3, 4, 5]], [0])
    add_columns(store, [stage_field("z", pa.int32(), "other", '{"model": "b"}')], [[7] * 5], [0, 1])
    facts = gather(store)
    embed, other = facts.stages
    assert (embed.name, embed.columns, embed.fragments, embed.waiting) == ("embed", ["x", "y"], 1, 1)
    assert embed.fingerprint == {"model": "a"} and len(embed.digest) == 12 and embed.digest != other.digest
    assert (other.fragments, other.waiting) == (2, 0)
    by_name = {column.name: column for column in facts.columns}
    assert (by_name["x"].rows, by_name["x"].nulls, by_name["z"].nulls, by_name["x"].stage) == (5, 1, 0, "embed")


def test_errors_are_counted_by_reason(store):
    facts = gather(store)
    assert [(reason.stage, reason.text, reason.count) for reason in facts.reasons] == [
        ("ingest", "text, not an image", 2),
        ("ingest", "N bytes: expected an image file", 1),
    ]
    assert len(facts.reasons[0].examples) == 2 and facts.reasons[1].examples[0][1].startswith("0 bytes")


def test_numbers_of_a_reason_do_not_make_it_another(store):
    reasons = [f"truncated ({number} bytes of 0x{number:x})" for number in range(5)]
    add_columns(store, [pa.field("embed_error", pa.string())], [reasons], [0, 1])
    (found,) = [reason for reason in gather(store).reasons if reason.stage == "embed"]
    assert (found.text, found.count, len(found.examples)) == ("truncated (N bytes of N)", 10, 3)


def test_version_and_deleted_rows(store):
    table = Table(f"{store}/{columns.SAMPLES_TABLE}")
    version = table.open().version
    table.open().delete("caption_original IS NULL")
    assert (gather(store).rows, gather(store).deleted) == (6, 4)
    assert gather(store, version).rows == 10
    with pytest.raises(ValueError, match="no version 99, the newest is"):
        gather(store, 99)
    with pytest.raises(ValueError, match="no table at"):
        gather(f"{store}/none")


def test_runs_are_listed_newest_first(store):
    with Run(store, "ingest") as done:
        done.write("summary.json", json.dumps({"rows": 3, "errors": 1, "seconds": 2.5}))
    with Run(store, "embed") as works:
        facts = gather(store)
        states = {run["run"]: run["state"] for run in facts.runs}
        assert states == {done.id: "done", works.id: "works"}
    assert {run["state"] for run in gather(store).runs} == {"done", "stopped"}
    (first,) = [run for run in facts.runs if run["job"] == "ingest"]
    assert (first["rows"], first["errors"], first["seconds"]) == (3, 1, 2.5)
    assert re.fullmatch(r"[\d-]{10} \d\d:\d\d", first["when"])


def test_values_for_histograms(store):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    assert sorted(numbers(dataset, "height", 100).tolist()) == [64, 64, 65, 66, 67, 68, 69]
    assert numbers(dataset, "caption_original", 100).tolist() == [len(EVIL) + 2] * 6
    assert labels(dataset, "ingest_error", 100).most_common(1) == [("text, not an image", 2)]


# -- charts -----------------------------------------------------------------------------------------------------------


def counts_in(svg):
    return [int(text.replace(",", "")) for text in re.findall(r": ([\d,]+) rows</title>", svg)]


@pytest.mark.parametrize(
    "values",
    [
        np.arange(1000),
        np.array([5]),
        np.array([5, 5, 5]),
        np.random.default_rng(0).normal(size=500),
        np.array([1, 10**6]),
    ],
)
def test_histogram_counts_every_value(values):
    svg = histogram(values, "tokens")
    assert sum(counts_in(svg)) == len(values) and "tokens" in svg and "nan" not in svg
    assert svg.startswith("<svg") and svg.endswith("</svg>")


def test_histogram_of_few_whole_numbers_has_a_bar_each():
    assert counts_in(histogram(np.array([3, 3, 4, 6, 6, 6]), "x")) == [2, 1, 0, 3]


def test_the_long_tail_shares_the_last_bar():
    values = np.concatenate([np.arange(1000), [10**9]])
    svg = histogram(values, "x")
    assert "and more x" in svg and sum(counts_in(svg)) == 1001


def test_nothing_to_draw():
    assert histogram(np.empty(0), "x") == "" and bars([]) == ""


def test_bars_escape_their_labels():
    svg = bars([("<b>", 3), ("64x96", 1)], with_shape=True)
    assert "<b>" not in svg and "&lt;b&gt;" in svg and "(75%)" in svg and svg.count('class="frame"') == 1


# -- samples ----------------------------------------------------------------------------------------------------------


def decoded(picture):
    kind, _, data = picture.uri.partition(",")
    assert kind == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_samples_are_good_rows_and_the_same_every_time(store):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    one, two = (draw_samples(dataset, 20, seed=3) for _ in range(2))
    assert [sample.image_id for sample in one] == [sample.image_id for sample in two] and len(one) == 7
    assert all(sample.image is not None and list(sample.texts) == ["caption_original"] for sample in one)
    assert len({tuple(s.image_id for s in draw_samples(dataset, 3, seed=seed)) for seed in range(8)}) > 1
    assert draw_samples(dataset, 0, 0) == []


def test_thumbnails_are_small_and_upright(photo, zoo):
    picture = thumbnail(photo(0, size=(600, 300)))
    assert decoded(picture).size == (224, 112) == (picture.width, picture.height)
    assert thumbnail(zoo.good["rotated.jpg"]).height == 96, "64 x 96, turned by a quarter"
    assert all(thumbnail(data) is not None for data in zoo.good.values())
    assert all(thumbnail(data) is None for data, _ in zoo.bad.values())


@pytest.fixture
def encoded(store, tmp_path):
    """Latents by a tiny autoencoder for the first fragment; the folder of the autoencoder."""
    import diffusers

    from lidit.frozen.vae import load_vae
    from lidit.images.pixels import bucket_pixels, to_unit_range
    from lidit.store.codec import encode_latents

    torch.manual_seed(0)
    folder = tmp_path / "vae"
    diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, latent_channels=3,
    ).save_pretrained(folder)  # fmt: skip
    vae = load_vae(str(folder), device="cpu")
    shape = {columns.META_CODEC: "fp32", columns.META_CHANNELS: "3", columns.META_DOWNSCALE: "2"}
    fingerprint = json.dumps({**vae.fingerprint(), "resolution": 32})
    fields = [
        stage_field("latents", pa.large_binary(), "latents", fingerprint, **shape),
        stage_field("bucket", pa.string(), "latents"),
    ]
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    images = dataset.get_fragment(0).to_table(["image"])["image"].to_pylist()
    pixels = np.stack([bucket_pixels(image, [(32, 48)])[1] for image in images])
    packed = encode_latents(vae.encode(to_unit_range(torch.from_numpy(pixels))), "fp32").numpy()
    add_columns(store, fields, [[row.tobytes() for row in packed], ["32x48"] * 5], [0])
    return folder


def test_latents_are_decoded_back(store, encoded):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    decoder = open_decoder(store, dataset, str(encoded))
    assert decoder.problem == "" and decoder.vae is not None
    samples = draw_samples(dataset, 20, 0, decoder)
    shown = [sample for sample in samples if sample.decoded]
    assert len(shown) == 5 and len(samples) == 7
    for sample in shown:
        assert decoded(sample.decoded).size == decoded(sample.cropped).size == (48, 32) and sample.bucket == "32x48"
        assert np.isfinite(sample.psnr)


def test_moments_are_shown_by_their_mean():
    assert columns.bucket_of("latent_moments_512") == "bucket_512"
    assert [columns.bucket_of(name) for name in ("latents", "latents_b", "latent_moments")] == [
        "bucket",
        "bucket_b",
        "bucket",
    ]


def test_the_autoencoder_is_found_by_the_run_that_used_it(store, encoded):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    assert "no run says" in open_decoder(store, dataset, None).problem
    with Run(store, "latents") as run:
        run.write("config.yaml", f"model: {encoded}\nrevision: null\n")
    assert open_decoder(store, dataset, None).vae is not None


@pytest.mark.parametrize(
    "text",
    [
        "", "[1]", "word", "{model: [1], revision: {}}", "{model: x, revision: 3}", "model: {a: b}", "[" * 5000, "a: *b",
        "model: !!python/object/apply:os.getcwd []", "{revision: x}", "x" * 2_000_000, "a: \x00",
    ],
)  # fmt: skip
def test_runs_whose_files_are_broken_are_passed_over(store, encoded, text):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    with Run(store, "latents") as run:
        run.write("config.yaml", text)
        run.write("summary.json", text)
    assert "no run says" in open_decoder(store, dataset, None).problem
    assert InspectConfig(store) and inspection.main(InspectConfig(store)).to_text()


def test_another_autoencoder_is_not_used(store, encoded, tmp_path):
    dataset = Table(f"{store}/{columns.SAMPLES_TABLE}").open()
    config = json.loads((encoded / "config.json").read_text())
    (encoded / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    problem = open_decoder(store, dataset, str(encoded)).problem
    assert "is not the one that made the latents: config, scaling_factor differ" in problem
    assert "cannot be loaded here" in open_decoder(store, dataset, str(tmp_path / "none")).problem


def test_no_latents_no_decoder(store):
    assert open_decoder(store, Table(f"{store}/{columns.SAMPLES_TABLE}").open(), None) is None


# -- the page ---------------------------------------------------------------------------------------------------------


class Reader(html.parser.HTMLParser):
    """Notes tags, attributes and text, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.handlers = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        self.text.append(data)


def test_page_escapes_everything_and_needs_nothing(store, encoded, tmp_path):
    page = tmp_path / "page.html"
    found = inspection.main(InspectConfig(store, html=str(page), samples=20, vae=str(encoded)))
    text = page.read_text("utf-8")
    read = Reader(text)
    assert "script" not in read.tags and not read.handlers
    assert read.links and all(link.startswith("data:image/") for link in read.links)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    seen = "".join(read.text)
    assert seen.count(EVIL) >= 6, "shown as it is, as text"
    for words in ("Samples", "Distributions", "Columns", "Stages", "Errors", "32x48", "decoded", "as encoded", "null"):
        assert words in seen, words
    assert found.html == str(page) and list(found.notes) == []


def test_page_without_latents_or_images_says_so(store, encoded, tmp_path, fill):
    page = tmp_path / "page.html"
    found = inspection.main(InspectConfig(store, html=str(page)))
    assert "Latents are not decoded: no run says" in found.to_text() and "no run says" in page.read_text()
    fill([["a prompt", None, EVIL]])
    inspection.main(InspectConfig(str(tmp_path / "store"), html=str(page)))
    seen = "".join(Reader(page.read_text()).text)
    assert "no image" in seen and EVIL in seen and "Length of caption" in seen


def test_page_of_an_empty_table(tmp_path):
    table = Table(str(tmp_path / "e" / columns.SAMPLES_TABLE))
    table.create(pa.schema([ID_FIELD, *IMAGE_FIELDS, ERROR_FIELD]))
    found = inspection.main(InspectConfig(str(tmp_path / "e"), html=str(tmp_path / "p.html")))
    assert "The table has no rows." in (tmp_path / "p.html").read_text() and "0 rows in 0 fragments" in found.to_text()


def test_hostile_names_are_escaped(store):
    facts = gather(store)
    facts.uri = f"/{EVIL}/samples.lance"
    facts.columns[0].name = facts.columns[1].about = facts.columns[2].stage = EVIL
    facts.runs = [{"run": EVIL, "job": EVIL, "when": EVIL, "state": EVIL}]
    facts.encoders = [
        {"encoder": EVIL, "width": 1, "instruction_tokens": 1, "null_tokens": 0, "digest": EVIL, "model": EVIL}
    ]
    facts.stages = [StageFacts(EVIL, [EVIL], {EVIL: EVIL}, EVIL, 1, 1)]
    facts.reasons = [Reason(EVIL, EVIL, 1, [(EVIL, EVIL)])]
    facts.changed = EVIL
    picture = Picture(EVIL, 1, 1)
    samples = [Sample(EVIL, source=f"{EVIL}!", size=EVIL, texts={EVIL: EVIL}, notes={EVIL: EVIL})]
    samples.append(Sample("seen", image=picture))
    chart = Chart(EVIL, EVIL, EVIL)  # a chart that is no `Markup` is text too
    read = Reader(render(Page(facts, [chart], samples, [EVIL])))
    assert "script" not in read.tags and read.tags.count("img") == 1 and not read.handlers
    assert read.links == [EVIL] and "".join(read.text).count(EVIL) == 31, "in every place"


def test_a_value_is_no_template_and_turns_no_text(store):
    facts = gather(store)
    facts.uri = "/{{ 7 * 7 }}{% raw %}\u202e/samples.lance"
    assert "<h1>{{ 7 * 7 }}{% raw %}\\u202e</h1>" in render(Page(facts))


def test_templates_and_styles_are_in_the_wheel():
    root = Path(inspection.__file__).parents[1]
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    for folder in ("pipelines/report", "demo"):
        names = {path.name for path in (root / folder).iterdir() if path.suffix in (".j2", ".css")}
        patterns = listed[folder.replace("/", ".")]
        assert names and all(any(fnmatch(name, pattern) for pattern in patterns) for name in names)


# -- text and JSON ----------------------------------------------------------------------------------------------------


def test_text_and_json(store, encoded):
    found = inspection.main(InspectConfig(store))
    text = found.to_text()
    for words in (
        "10 rows in 2 fragments",
        "image_id",
        "fp32, 3 channels, 1/2 size",
        "text, not an image",
        "latents",
    ):
        assert words in text, words
    record = json.loads(found.to_json())
    assert record["job"] == "inspect" and record["rows"] == 10 and record["html"] is None
    assert {column["name"] for column in record["columns"]} >= {"image", "latents"}


def test_nothing_is_changed(store, tmp_path):
    table = Table(f"{store}/{columns.SAMPLES_TABLE}")
    version, before = table.open().version, sorted(path for path in (tmp_path / "shop").rglob("*"))
    inspection.main(InspectConfig(store, html=str(tmp_path / "p.html")))
    assert table.open().version == version and sorted((tmp_path / "shop").rglob("*")) == before


@pytest.mark.parametrize(
    "size, words", [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (12_345_678, "12.3 MB"), (5e15, "5,000.0 TB")]
)
def test_bytes_in_words(size, words):
    assert human(size) == words


def test_config_is_checked():
    with pytest.raises(ValueError, match="samples: expected a whole number >= 0, received -1"):
        InspectConfig(samples=-1)
