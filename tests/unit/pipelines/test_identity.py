"""Which row is which: what lies elsewhere or says something else is another row, what was there before is not added again."""

import hashlib
import json

import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines.engine.column_file import ColumnFileWriter
from pipelines.engine.table import Table
from pipelines.ingest import IngestConfig
from pipelines.ingestion.summary import IngestSummary
from pipelines.ingestion.work import Work
from pipelines.sources.registry import open_source

pytestmark = pytest.mark.unit

SAME = {"already_there": 1, "compared": 1, "compared_images": 1, "differ": 0}  # one row, which the source has as it is


class Store:
    """A table that sources are added to as an ingest adds them."""

    def __init__(self, folder):
        self.uri = str(folder / "store")
        self.table = Table(f"{self.uri}/{columns.SAMPLES_TABLE}")

    def add(self, spec, ids=None):
        """Adds what is new; `ids` names the rows otherwise, as an older ingest did. What there was to do."""
        source = open_source(spec)
        work = Work.of(IngestConfig(spec, self.uri), source, self.table)
        self.table.create(source.schema)
        parts = [part for unit in work.units for part in unit["parts"]]
        if parts:
            rows = source.batch(parts).to_pylist()
            for row, image_id in zip(rows, ids or ()):
                row[columns.IMAGE_ID] = image_id
            writer = ColumnFileWriter(self.table.uri, source.schema, "ingest-1")
            writer.write(pa.RecordBatch.from_pylist(rows, schema=source.schema))
            self.table.append([writer.finish(self.table.open())])
        return work

    def rows(self):
        return self.table.open().to_table().to_pylist()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_folder(tmp_path, photo, year, seed):
    put(tmp_path / year / "images/1.jpg", photo(seed))
    put(tmp_path / year / "images/1.txt", f"of {year}")
    return f"folder:{tmp_path}/{year}/images"


def put_coco(tmp_path, photo, part, seed):
    put(tmp_path / part / "set/images/1.jpg", photo(seed))
    about = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": part}]}
    put(tmp_path / part / "set/captions.json", json.dumps(about))
    return f"coco:{tmp_path}/{part}/set"


@pytest.mark.parametrize("make", [put_folder, put_coco])
def test_two_sets_of_the_same_name_are_other_rows(store, tmp_path, photo, make):
    for seed, part in enumerate(("2023", "2024")):
        store.add(make(tmp_path, photo, part, seed))
    assert {row["image"] for row in store.rows()} == {photo(0), photo(1)}
    assert len({row["caption_original"] for row in store.rows()}) == 2
    for seed, part in enumerate(("2023", "2024")):
        assert store.add(make(tmp_path, photo, part, seed)).counts == SAME


@pytest.mark.parametrize(("make", "earlier"), [(put_folder, "images/1.jpg"), (put_coco, "coco-1-1")])
def test_rows_with_ids_of_before_are_not_added_again(store, tmp_path, photo, make, earlier):
    store.add(make(tmp_path, photo, "2023", 0), [earlier])
    again = store.add(make(tmp_path, photo, "2023", 0))
    assert (again.units, again.counts, again.examples) == ([], SAME, {})
    other = store.add(make(tmp_path, photo, "2024", 1))
    assert other.counts == {**SAME, "differ": 1, "unnamed": 1} and len(other.examples["differ"]) == 1
    assert other.to_update == [], "it may well be another folder of that name"
    told = IngestSummary("ingest", "s", counts=dict(other.counts), examples=other.examples).to_text()
    assert "1 of these have another image or caption in the source now, such as " in told
    assert "captions of 1 rows and images of 1 were compared" in told and "--update leaves them" in told
    put(tmp_path / "2023/images/2.jpg", photo(7))
    if make is put_folder:
        assert store.add(f"folder:{tmp_path}/2023/images").rows == 1, "what comes later is added"
        assert store.add(f"folder:{tmp_path}/2023/images").rows == 0


def test_a_caption_that_was_changed_is_told(store, tmp_path, photo):
    spec = put_folder(tmp_path, photo, "2023", 0)
    store.add(spec)
    put(tmp_path / "2023/images/1.txt", "better")
    assert store.add(spec).counts["differ"] == 1
    assert [row["caption_original"] for row in store.rows()] == ["of 2023"]


@pytest.mark.parametrize("after", ["new\na\nb\nc\n", "c\nb\na\nnew\n", "c\nnew\na\n\nb"])
def test_prompts_are_known_wherever_they_stand(store, tmp_path, after):
    put(tmp_path / "p.txt", "a\nb\nc\n")
    store.add(f"prompts:{tmp_path}/p.txt")
    put(tmp_path / "p.txt", after)
    assert store.add(f"prompts:{tmp_path}/p.txt").rows == 1
    assert sorted(row["caption"] for row in store.rows()) == ["a", "b", "c", "new"]


def test_prompts_with_ids_of_before_are_not_added_again(store, tmp_path):
    def earlier(texts):
        return [f"it's.txt:{n:07d}:{hashlib.sha256(text.encode()).hexdigest()[:8]}" for n, text in enumerate(texts)]

    path = tmp_path / "it's.txt"
    put(path, "a\nb\nb\nc\n")
    store.add(f"prompts:{path}", earlier("abbc"))
    assert store.add(f"prompts:{path}").counts == {"already_there": 4}
    put(path, "new\nb\na\nb\nb\nc\n")
    assert store.add(f"prompts:{path}").rows == 2, "the new one, and a third of the same text"
    assert store.add(f"prompts:{path}").rows == 0
    assert sorted(row["caption"] for row in store.rows()) == ["a", "b", "b", "b", "c", "new"]
