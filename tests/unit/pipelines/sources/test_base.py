"""What all sources share: identities, records that become rows."""

import pytest

from lidit.store import columns
from pipelines.sources.base import Record, error_row, make_row
from pipelines.sources.image_check import Unwanted

pytestmark = pytest.mark.unit


def test_identity_is_of_content_not_of_place():
    first = Record("a.tar#1", b"image", "text")
    assert first.identify() == Record("b.tar#2", b"image", "text", score=3.0).identify() == first.image_id
    assert first.digest and first.image_id.startswith(first.digest + "-") and len(first.image_id) == 49
    others = [Record("a.tar#1", b"image", other).identify() for other in (None, "", "Text", "text ")]
    others += [Record("a.tar#1", b"other", "text").identify(), Record("a.tar#1", None, "text").identify()]
    assert len({first.image_id, *others}) == 7
    same_image = [other for other in others if other.startswith(first.digest)]
    assert len(same_image) == 4, "rows of one image share the first half"


def test_identity_without_an_image_is_of_the_place():
    ids = [Record(place, None, "text", error="gone").identify() for place in ("a#1", "a#2", "a#1")]
    assert ids[0] == ids[2] != ids[1]


def test_identity_of_the_source_is_kept():
    record = Record("f/a.jpg", b"image", image_id="f/a.jpg")
    assert record.identify() == "f/a.jpg" and record.digest is not None


def test_row(photo):
    image = photo(1)
    row = make_row(Record("a.tar#1.jpg", image, "text", values={"truth": "{}"}), has_image=True, with_phash=True)
    assert row[columns.IMAGE] is image, "never re-encoded"
    assert (row[columns.HEIGHT], row[columns.WIDTH]) == (64, 96)
    assert row[columns.CAPTION_ORIGINAL] == "text" and row[columns.SOURCE] == "a.tar#1.jpg" and row["truth"] == "{}"
    assert row[columns.IMAGE_DIGEST] == row[columns.IMAGE_ID][:32] and row[columns.IMAGE_PHASH] is not None
    assert columns.error("ingest") not in row


def test_row_that_is_not_wanted(photo):
    with pytest.raises(Unwanted, match="min_side"):
        make_row(Record("a", photo(1)), True, size_filter=lambda height, width: None if height > 64 else "min_side")
    row = make_row(Record("a", photo(1)), True, size_filter=lambda height, width: None if height >= 64 else "min_side")
    assert row["height"] == 64


@pytest.mark.parametrize(
    "record, reason",
    [
        (Record("a", None, "text"), "there is no image"),
        (Record("a", b"text", "text"), "text, not an image"),
        (Record("a", b"", None), "0 bytes"),
        (Record("a", None, None, error="not followed"), "not followed"),
    ],
)
def test_row_with_a_reason_has_nothing_else(record, reason):
    row = make_row(record, has_image=True)
    assert row == error_row(record, row[columns.error("ingest")]) and reason in row[columns.error("ingest")]
    assert set(row) == {columns.IMAGE_ID, columns.SOURCE, columns.error("ingest")}


def test_prompts_need_no_image():
    assert make_row(Record("p", values={"caption": "x"}, image_id="p:1"), False) == {"image_id": "p:1", "caption": "x"}
