"""What verify says of latents: nothing of good rows, one sentence of each bad one."""

import lance
import numpy as np
import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines.verification.latents import latents_fields, latents_problems

pytestmark = pytest.mark.unit

METADATA = {
    columns.META_STAGE: "latents", columns.META_CODEC: "fp32", columns.META_CHANNELS: "2", columns.META_DOWNSCALE: "8",
}  # fmt: skip
GOOD = np.ones((2, 2, 3), np.float32).tobytes()
BAD = np.array([1, 1, np.nan] * 4, np.float32).tobytes()


def table(folder, rows, name="latents", **metadata):
    """Rows (latents, bucket, error, height) as a Lance table."""
    latents, buckets, errors, heights = (list(values) for values in zip(*rows))
    fields = {
        "image_id": pa.array([str(number) for number in range(len(rows))]),
        "height": pa.array(heights, pa.int32()),
        name: pa.array(latents, pa.large_binary()),
        columns.bucket_of(name): pa.array(buckets, pa.string()),
        "latents_error": pa.array(errors, pa.string()),
    }
    schema = pa.schema(
        [pa.field(key, a.type, metadata={**METADATA, **metadata} if key == name else None) for key, a in fields.items()]
    )
    return lance.write_dataset(pa.table(list(fields.values()), schema=schema), str(folder / "samples.lance"))


def problems(dataset):
    return list(latents_problems(dataset, latents_fields(dataset.schema), dataset.get_fragments()))


def test_good_rows(tmp_path):
    rows = [(GOOD, "16x24", None, 99), (None, None, "damaged", 99), (None, None, None, None)]
    assert problems(table(tmp_path, rows)) == []


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ((BAD, "16x24", None, 99), "NaN or Inf"),
        ((GOOD, "24x24", None, 99), "expected 72 bytes, received 48"),
        ((GOOD, "16 x 24", None, 99), "expected HEIGHTxWIDTH"),
        ((GOOD, None, None, 99), "latents or a bucket, not both"),
        ((None, "16x24", None, 99), "latents or a bucket, not both"),
        ((None, None, None, 99), "null without a reason"),
    ],
)
def test_bad_rows(tmp_path, row, sentence):
    found = problems(table(tmp_path, [(GOOD, "16x24", None, 99), row]))
    assert len(found) == 1 and found[0].startswith("latents of '1': ") and sentence in found[0]


def test_moments_of_a_named_variant(tmp_path):
    rows = [(2 * GOOD, "16x24", None, 9), (GOOD, "16x24", None, 9)]
    found = problems(table(tmp_path, rows, "latent_moments_512", **{columns.META_MOMENTS: "mean,deviation"}))
    assert len(found) == 1 and found[0].startswith("latent_moments_512 of '1': ") and "expected 96 bytes" in found[0]
    assert columns.bucket_of("latent_moments_512") == "bucket_512" and columns.bucket_of("latents") == "bucket"


def test_other_columns_are_not_latents(tmp_path):
    assert (
        latents_fields(pa.schema([pa.field("caption_embeds_one", pa.large_binary(), metadata={"lidit:codec": "bf16"})]))
        == []
    )
