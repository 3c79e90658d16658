"""Names of the store."""

import pytest

from lidit.store import columns

pytestmark = pytest.mark.unit


def test_names():
    assert columns.embeds("caption", "llama3") == "caption_embeds_llama3"
    assert columns.length("caption_original", "qwen15") == "caption_original_length_qwen15"
    assert columns.truncated("caption", "llama3") == "caption_truncated_llama3"
    assert columns.error("embed") == "embed_error"


def test_names_never_meet():
    names = [
        make(text, encoder)
        for make in (columns.embeds, columns.length, columns.truncated)
        for text in (columns.CAPTION, columns.CAPTION_ORIGINAL)
        for encoder in ("a", "b")
    ] + [columns.IMAGE_ID, columns.IMAGE, columns.HEIGHT, columns.WIDTH, columns.CAPTION, columns.error("embed")]
    assert len(set(names)) == len(names)


def test_names_of_variants():
    assert columns.variant("latents", "") == "latents" and columns.variant("latents", "512") == "latents_512"
    for name in ("", "512", "sdxl"):
        for kind in (columns.LATENTS, columns.LATENT_MOMENTS):
            assert columns.bucket_of(columns.variant(kind, name)) == columns.variant(columns.BUCKET, name)
