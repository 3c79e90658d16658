"""Edited sources: rows that differ from their source are found, and take its content under their own names."""

import json

import pytest

from lidit.store import columns
from pipelines import ingest
from pipelines.engine.pool import Tracker
from pipelines.engine.runs import Fenced, Run
from pipelines.engine.table import Table, column_holder, field_ids
from pipelines.ingest import IngestConfig
from pipelines.ingestion import compare as ingest_compare
from pipelines.ingestion import worker as ingest_worker
from pipelines.ingestion.filters import FiltersConfig
from pipelines.ingestion.listed_sizes import note_sizes, read_sizes
from pipelines.ingestion.summary import IngestSummary
from pipelines.ingestion.update import UpdatePass, UpdateWorker, units_of
from pipelines.ingestion.work import Work
from pipelines.sources import files as sources_listed
from pipelines.sources.base import ERROR_FIELD, MAX_TEXT_BYTES
from pipelines.sources.image_check import check_image, digest
from pipelines.sources.registry import open_source
from tests.unit.pipelines.conftest import Near

pytestmark = pytest.mark.unit


class Edited:
    """A folder of pictures with text files, ingested; then edited by the test."""

    def __init__(self, job, folder, photo, count=6, **options):
        self.folder, self.options = folder / "set", options
        self.folder.mkdir()
        for number in range(count):
            self.put(f"{number}.jpg", photo(number))
            self.put(f"{number}.txt", f"text {number}")
        self.spec = f"folder:{self.folder}"
        self.job = job(self.spec, **options)
        self.job.run()
        self.table, self.uri = self.job.table, self.job.config.store

    def put(self, name, content):
        (self.folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    def work(self, **options):
        config = IngestConfig(self.spec, self.uri, **{"update": True, **self.options, **options})
        return Work.of(config, open_source(self.spec), self.table)

    def results(self, work=None, **options):
        config = IngestConfig(self.spec, self.uri, update=True, **{**self.options, **options})
        worker = UpdateWorker(config, self.table.uri, "ingest-2", Near(Tracker()))
        return [worker(unit) for unit in units_of((work or self.work(**options)).to_update)]

    def update(self, **options):
        """What an update counts."""
        results = self.results(**options)
        with Run(self.uri, "ingest") as run:
            summary = IngestSummary("ingest", self.uri)
            committer = UpdatePass(self.table, run, summary, {result["name"] for result in results}, rows=1)
            for result in results:
                committer.take(result)
                committer.take(result)  # Ray may give a result twice
            committer.flush()
            assert committer.unsettled == set()
        self.summary = summary
        return summary.counts

    def rows(self):
        return {row[columns.IMAGE_ID].rpartition("/")[2]: row for row in self.table.open().to_table().to_pylist()}

    def holders(self, name):
        dataset = self.table.open()
        return [column_holder(f.metadata, field_ids(dataset)[name]) for f in dataset.get_fragments()]


@pytest.fixture
def edited(job, tmp_path, photo):
    return lambda **options: Edited(job, tmp_path, photo, **options)


def test_captions_are_compared_in_full_and_images_by_sample_or_all(edited, photo, monkeypatch):
    monkeypatch.setattr(ingest_compare, "COMPARED_IMAGES", 2)  # 0 and 3 of six
    one = edited()
    assert one.work(update=False).counts == {"already_there": 6, "compared": 6, "compared_images": 2, "differ": 0}
    one.put("4.txt", "edited")
    one.put("5.jpg", photo(50))
    quick = one.work(update=False)
    found = {"compared": 6, "compared_images": 2, "differ": 1}
    assert quick.counts == {"already_there": 6, **found} and quick.examples["differ"] == ["set/4.jpg"]
    told = IngestSummary("ingest", "s", counts=dict(quick.counts), examples=quick.examples).to_text()
    assert (
        "1 of these have another image or caption in the source now, such as set/4.jpg: captions of 6 rows and " in told
    )
    assert "images of 2 were compared. They stay as they are; --update takes what the source has now" in told
    for options in ({"update": False, "compare": "all"}, {"update": True}):
        assert one.work(**options).counts == {"already_there": 6, "compared": 6, "compared_images": 6, "differ": 2}
    assert one.work(update=True, compare="quick").counts["differ"] == 1


def test_many_caption_files_are_compared_by_sample(edited, monkeypatch):
    monkeypatch.setattr(ingest_compare, "CAPTION_FILES", 3)
    monkeypatch.setattr(ingest_compare, "COMPARED_IMAGES", 1)
    one = edited()
    for number in range(6):
        one.put(f"{number}.txt", "edited")
    assert one.work(update=False).counts == {"already_there": 6, "compared": 3, "compared_images": 1, "differ": 3}


def test_images_whose_files_have_another_size_are_compared(edited, photo, monkeypatch):
    monkeypatch.setattr(ingest_compare, "COMPARED_IMAGES", 1)
    one = edited()
    note_sizes(one.table.uri, "ingest-20200101T000000-000000", one.job.work.sizes)
    (one.folder / "4.jpg").write_bytes(photo(4) + b" ")
    quick = one.work(update=False)
    found = {"already_there": 6, "compared": 6, "compared_images": 2, "compared_sizes": 6, "differ": 1}
    assert quick.counts == found and quick.examples["differ"] == ["set/4.jpg"] and quick.sizes == {}
    told = IngestSummary("ingest", "s", counts=dict(quick.counts), examples=quick.examples).to_text()
    assert "captions of 6 rows, file sizes of 6 and images of 2 were compared" in told
    assert one.update(compare="quick") == {"updated": 1}
    after = one.work(update=False)
    assert after.counts == {**found, "differ": 0} and list(after.sizes.values()) == [len(photo(4)) + 1]
    note_sizes(one.table.uri, "ingest-20210101T000000-000000", after.sizes)
    assert one.work(update=False).counts == {**found, "differ": 0, "compared_images": 1}


def test_sizes_are_noted_of_what_was_compared_and_a_note_may_be_lost(edited, photo):
    one = edited()
    assert one.job.work.sizes == one.work().sizes and len(one.work().sizes) == 6
    one.put("4.jpg", photo(50))
    assert len(one.work().sizes) == 5, "not of an image that differs"
    note_sizes(one.table.uri, "ingest-20200101T000000-000000", one.work().sizes)
    assert one.work().sizes == {}, "what is noted is not noted again"
    (note,) = (one.folder.parent / "store/samples.lance/_listed").iterdir()
    note.write_bytes(b"")
    assert len(one.work().sizes) == 5
    assert read_sizes(one.table.uri, []) == {} and read_sizes(f"{one.uri}/none.lance", ["x"]) == {}


def test_nothing_differs_is_said_of_what_was_compared(edited):
    one = edited()
    told = IngestSummary("ingest", "s", counts=dict(one.work(update=False).counts)).to_text()
    assert "none of these has another image or caption in the source now: captions of 6 rows and images of 6" in told


def test_captions_of_a_metadata_file_are_compared_without_reading_images(job, tmp_path, photo, monkeypatch):
    folder = tmp_path / "set"
    folder.mkdir()
    lines = [{"file_name": f"{number}.jpg", "text": f"text {number}"} for number in range(5)]
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(photo(number))
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = job(f"folder:{folder}")
    made.run()
    monkeypatch.setattr(ingest_compare, "COMPARED_IMAGES", 1)
    lines[3]["text"] = "edited"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for number in range(1, 5):
        (folder / f"{number}.jpg").write_bytes(b"")
    work = Work.of(IngestConfig(made.config.source, made.config.store), open_source(made.config.source), made.table)
    assert work.counts == {"already_there": 5, "compared": 5, "compared_images": 1, "differ": 1}


def test_an_edited_caption_replaces_that_column_alone(edited):
    one = edited()
    before, images, captions = one.rows(), one.holders("image"), one.holders("caption_original")
    one.put("1.txt", "two blue stars")
    (one.folder / "2.txt").unlink()
    assert one.update() == {"updated": 2}
    after = one.rows()
    assert {name for name in after if after[name] != before[name]} == {"1.jpg", "2.jpg"}
    assert after["1.jpg"] == {**before["1.jpg"], "caption_original": "two blue stars"}
    assert after["2.jpg"] == {**before["2.jpg"], "caption_original": None}
    assert one.holders("image") == images, "images are neither read nor written"
    assert [a == b for a, b in zip(captions, one.holders("caption_original"))] == [False, True], "one of two fragments"
    assert one.work().counts == {"already_there": 6, "compared": 6, "compared_images": 6, "differ": 0}
    assert one.results() == []


def test_an_edited_image_replaces_all_that_came_with_it(edited, photo):
    one = edited()
    before, new = one.rows(), photo(50, size=(64, 96))
    one.put("5.jpg", new)
    one.put("4.txt", "edited")
    assert one.update() == {"updated": 2}
    after = one.rows()
    look = check_image(new)
    image = {"image": new, "height": look.height, "width": look.width, "image_digest": digest(new)}
    assert after["5.jpg"] == {**before["5.jpg"], **image}
    assert after["4.jpg"] == {**before["4.jpg"], "caption_original": "edited"}
    assert {name for name in after if after[name] != before[name]} == {"4.jpg", "5.jpg"}


def test_a_perceptual_hash_is_made_anew_where_there_was_one(edited, photo):
    one = edited(filters=FiltersConfig(near_duplicates=0))
    one.put("0.jpg", photo(50))
    one.options = {}
    assert one.rows()["0.jpg"]["image_phash"] is not None and one.update() == {"updated": 1}
    assert one.rows()["0.jpg"]["image_phash"] == check_image(photo(50), True, with_phash=True).phash


def test_a_good_row_is_not_given_up_for_a_bad_one(edited, photo):
    """Damage, what a filter refuses, and texts that cannot be kept leave the row as it was, and are told."""
    one = edited()
    before = one.rows()
    one.put("0.jpg", photo(0)[:200])
    one.put("1.jpg", photo(50, size=(16, 16)))
    one.put("2.txt", "x" * (MAX_TEXT_BYTES + 1))
    assert one.update(filters=FiltersConfig(min_side=32)) == {"not_updated": 3, "updated": 0}
    assert one.rows() == before and len(one.summary.examples["not_updated"]) == 3
    told = one.summary
    told.counts |= {"compared": 6, "compared_images": 6, "differ": 3}
    assert "3 rows stay as they were, such as set/0.jpg: " in told.to_text() and "min_side" in told.to_text()
    (one.folder / "0.jpg").unlink()
    one.put("1.jpg", photo(1))
    one.put("2.txt", "text 2")
    assert one.update() == {} and one.rows() == before, "what is gone from the source stays in the table"


def test_a_filtered_caption_is_null_and_no_difference(edited):
    one = edited()
    filters = FiltersConfig(captions=("url",))
    one.put("1.txt", "http://example.org/a.jpg")
    assert one.update(filters=filters) == {"updated": 1} and one.rows()["1.jpg"]["caption_original"] is None
    assert one.work(filters=filters).counts["differ"] == 0
    drop = FiltersConfig(captions=("url",), bad_caption="drop")
    one.put("2.txt", "http://example.org/b.jpg")
    assert one.work(filters=drop).counts["differ"] == 0, "such a row would not be taken, and stays"


def test_a_row_with_an_error_takes_a_good_image(job, tmp_path, photo):
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(2):
        (folder / f"{number}.jpg").write_bytes(b"damaged")
    one = Edited.__new__(Edited)
    one.folder, one.options, one.spec = folder, {}, f"folder:{folder}"
    one.job = job(one.spec)
    one.job.run()
    one.table, one.uri = one.job.table, one.job.config.store
    assert one.update() == {"not_updated": 2}
    one.put("1.jpg", photo(1))
    one.put("1.txt", "mended")
    assert one.update() == {"updated": 1, "not_updated": 1}
    row = one.rows()["1.jpg"]
    assert (row["image"], row["caption_original"], row[ERROR_FIELD.name]) == (photo(1), "mended", None)
    assert one.rows()["0.jpg"][ERROR_FIELD.name]


def test_rows_with_an_error_are_told_by_an_ingest_that_does_not_try_them(edited, photo, monkeypatch):
    one = edited()
    one.put("6.jpg", b"damaged")
    one.job = one.job.__class__(one.folder.parent, one.spec, {})
    one.job.run()
    one.put("6.jpg", photo(6))
    monkeypatch.setattr(ingest_compare, "CAPTION_FILES", 1)
    counts = one.work(update=False).counts
    assert (counts["already_there"], counts["failed_before"], counts["differ"]) == (7, 1, 0)
    assert (
        "1 of these have an error; --update tries them again" in IngestSummary("i", "s", counts=dict(counts)).to_text()
    )
    assert one.update() == {"updated": 1} and one.rows()["6.jpg"]["image"] == photo(6)
    told = IngestSummary("i", "s", counts={"failed_before": 1, "updated": 1}).to_text()
    assert "1 of these had an error, and were tried again" in told
    assert "failed_before" not in one.work().counts


@pytest.mark.parametrize("image", [False, True], ids=["text", "image and text"])
def test_a_new_text_that_is_no_good_one_is_told(edited, photo, image):
    one = edited()
    before = one.rows()
    one.put("1.txt", b"caf\xe9")
    if image:
        one.put("1.jpg", photo(50))
    assert one.work(update=False).counts["differ"] == 1 and one.work().counts["differ"] == 1
    assert one.update() == {"not_updated": 1, "updated": 0} and one.rows() == before
    assert "set/1.jpg: its caption is no good one: 'utf-8' codec" in one.summary.examples["not_updated"][0]


def test_a_text_that_cannot_be_opened_is_no_difference(edited):
    one = edited()
    for number, target in enumerate(("missing.txt", "1.txt")):
        (one.folder / f"{number}.txt").unlink()
        (one.folder / f"{number}.txt").symlink_to(target)
    (one.folder / "2.jpg").unlink()
    (one.folder / "2.jpg").symlink_to("2.jpg")
    assert one.work(update=False).counts == {"already_there": 6, "compared": 3, "compared_images": 3, "differ": 0}


def test_an_image_that_has_become_too_large_is_told(edited, monkeypatch):
    one = edited()
    for module in (ingest_compare, sources_listed):
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 1 << 20)
    one.put("1.jpg", (one.folder / "1.jpg").read_bytes() + bytes(1 << 20))
    assert one.update() == {"not_updated": 1, "updated": 0}
    assert "more than 1,048,576 allowed" in one.summary.examples["not_updated"][0]


def test_captions_stay_where_their_metadata_is_damaged(job, tmp_path, photo):
    """A file that was cut short takes no caption away."""
    below = tmp_path / "set" / "below"
    below.mkdir(parents=True)
    for number in range(2):
        (below / f"{number}.jpg").write_bytes(photo(number))
    lines = "".join(json.dumps({"file_name": f"{n}.jpg", "text": f"text {n}"}) + "\n" for n in range(2))
    (below / "metadata.jsonl").write_text(lines)
    one = Edited.__new__(Edited)
    one.folder, one.options, one.spec = below, {}, f"folder:{tmp_path}/set"
    one.job = job(one.spec)
    one.job.run()
    one.table, one.uri = one.job.table, one.job.config.store
    (below / "metadata.jsonl").write_text(lines[:-20])
    one.put("1.jpg", photo(50))
    assert one.work().counts["differ"] == 1 and one.work().counts["metadata_unreadable"] == 1
    assert one.update() == {"updated": 1}
    rows = one.rows()
    assert [rows[f"{n}.jpg"]["caption_original"] for n in range(2)] == ["text 0", "text 1"]
    assert rows["1.jpg"]["image"] == photo(50)


def test_deleted_rows_keep_their_neighbours(edited, photo):
    one = edited()
    one.table.open().delete("caption_original = 'text 1' OR caption_original = 'text 3'")
    before = one.rows()
    one.put("2.jpg", photo(50))
    one.put("3.jpg", photo(51))
    assert one.work().rows == 2, "deleted rows are new ones"
    one.put("0.txt", "edited")
    assert one.update() == {"updated": 2}
    after = one.rows()
    assert set(after) == set(before) == {"0.jpg", "2.jpg", "4.jpg", "5.jpg"}
    assert {name for name in after if after[name] != before[name]} == {"0.jpg", "2.jpg"}


def test_a_fragment_that_others_changed_is_not_overwritten(edited):
    """The first of two updates counts; rows that a compaction moved are left to the next run."""
    one = edited()
    one.put("1.txt", "first")
    late = one.results()
    one.put("1.txt", "second")
    assert one.update() == {"updated": 1}
    with Run(one.uri, "ingest") as run:
        committer = UpdatePass(
            one.table, run, IngestSummary("ingest", one.uri), {result["name"] for result in late}, rows=1
        )
        committer.take(late[0])
        committer.flush()
        assert committer.unsettled == {"fragment 0"} and one.rows()["1.jpg"]["caption_original"] == "second"
    one.put("1.txt", "third")
    work = one.work()
    one.table.open().optimize.compact_files(target_rows_per_fragment=100)
    assert [(result["gone"], result["file"]) for result in one.results(work)] == [(True, None)]
    assert one.update() == {"updated": 1} and one.rows()["1.jpg"]["caption_original"] == "third"


def test_a_run_that_was_taken_for_dead_updates_nothing(edited):
    one = edited()
    one.put("1.txt", "edited")
    results = one.results()
    with pytest.raises(Fenced), Run(one.uri, "ingest") as run:
        run._mark(run.id, "fence")
        committer = UpdatePass(one.table, run, IngestSummary("ingest", one.uri), {"fragment 0"}, rows=1)
        committer.take(results[0])
        committer.flush()
    assert one.rows()["1.jpg"]["caption_original"] == "text 1"


def test_a_picture_that_kills_its_worker_is_left_as_it_was(edited, photo):
    """Two processes have died on it: it is not tried a third time, and its neighbour is updated."""
    one = edited()
    one.put("0.jpg", photo(50))
    one.put("1.jpg", photo(51))
    config = IngestConfig(one.spec, one.uri, update=True)
    tracker = Tracker()
    (unit,) = units_of(one.work().to_update)
    for process in ("first", "second"):  # each dies on the first picture
        tracker.begin(unit["name"], process)
        tracker.enter(unit["name"], 0, 1)
    result = UpdateWorker(config, one.table.uri, "ingest-2", Near(tracker))(unit)
    assert result["counts"] == {"updated": 1, "not_updated": 1} and ingest_worker.DIED in result["examples"][0]


@pytest.mark.parametrize(
    ("spec", "match"),
    [("webdataset:a.tar", "named by their content, so what was edited there is a new row beside the old one"),
     ("prompts:{}/p.txt", r"expected folder: or coco:; a row of prompts:.* never has another content under its name")],
)  # fmt: skip
@pytest.mark.parametrize("options", [{"update": True}, {"compare": "all"}])
def test_sources_whose_rows_are_named_by_content_are_refused(tmp_path, spec, match, options):
    (tmp_path / "p.txt").write_text("a prompt")
    with pytest.raises(ValueError, match=match):
        ingest.main(IngestConfig(spec.format(tmp_path), str(tmp_path / "store"), **options))
    assert not Table(f"{tmp_path}/store/samples.lance").exists()
