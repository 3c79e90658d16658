"""A caption and a picture of a folder are edited: ingest tells, `--update` takes them, stages make again what they touch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lidit.frozen.text import EncoderConfig, PromptEncoder
from lidit.store.codec import decode
from pipelines import embed, ingest, inspection, latents, verify
from pipelines.embed import EmbedConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import column_holder, field_ids
from pipelines.ingest import IngestConfig
from pipelines.inspection import InspectConfig
from pipelines.latents import LatentsConfig
from pipelines.verify import VerifyConfig

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_here")]
ONE = ActorsConfig(min=1, max=1, num_gpus=0)


def holders(world: Any, name: str) -> list[str | None]:
    """The data file of each fragment that holds the column."""
    number = field_ids(world.table)[name]
    return [column_holder(fragment.metadata, number) for fragment in world.table.get_fragments()]


def changed(before: list[str | None], after: list[str | None]) -> list[int]:
    return [fragment for fragment, (old, new) in enumerate(zip(before, after)) if old != new]


def holding(world: Any, name: str) -> list[int]:
    """The fragment that has a file's row: units are committed in the order in which they are done."""
    fragments = world.table.get_fragments()
    ids = [fragment.to_table(columns=["image_id"])["image_id"].to_pylist() for fragment in fragments]
    return [number for number, those in enumerate(ids) if any(image_id.endswith(f"/{name}") for image_id in those)]


def test_only_what_was_made_of_edited_content_is_made_again(world: Any, photo: Callable[..., bytes]) -> None:
    folder: Path = world.folder / "set"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.jpg").write_bytes(photo(number, size=(64, 64)))
        (folder / f"{number}.txt").write_text(f"a small red circle {number}")
    store = str(world.store)

    def put(**options: Any) -> Any:
        return ingest.main(IngestConfig(f"folder:{folder}", store, rows_per_fragment=3, actors=ONE, **options))

    encoder = EncoderConfig("one", str(world.llms["one"]), template="plain", dtype="fp32", codec="fp32")
    texts = EmbedConfig(store=store, text=("caption_original",), encoders=(encoder,), actors=ONE)
    pictures = LatentsConfig(store=store, actors=ONE)
    assert put().rows == 9 and embed.main(texts).fragments == 3 and latents.main(pictures).fragments == 3
    before, embeds, made = world.rows(), holders(world, "caption_original_embeds_one"), holders(world, "latents")

    (folder / "1.txt").write_text("two blue stars")
    (folder / "8.jpg").write_bytes(photo(50, size=(64, 64)))
    told = put()
    assert told.counts == {"already_there": 9, "compared": 9, "compared_images": 9, "differ": 2, "compared_sizes": 9}
    assert "2 of these have another image or caption" in told.to_text() and "--update" in told.to_text()
    assert world.rows() == before, "without --update nothing changes"
    assert "to update  2 rows" in "\n".join(put(update=True, dry_run=True).plan)

    taken = put(update=True)
    assert (taken.ok, taken.counts["updated"], taken.commits) == (True, 2, 1), taken.to_text()
    assert taken.orphans_removed == 0 and world.orphans() == set()
    rows = world.rows()
    edited = {image_id.rpartition("/")[2]: row for image_id, row in rows.items() if row != before[image_id]}
    assert set(rows) == set(before) and set(edited) == {"1.jpg", "8.jpg"}
    assert edited["1.jpg"]["caption_original"] == "two blue stars" and edited["8.jpg"]["image"] == photo(
        50, size=(64, 64)
    )
    assert put(update=True).counts["differ"] == 0

    facts = inspection.main(InspectConfig(store)).facts
    assert {(stale.stage, stale.fragments, stale.rows) for stale in facts.stale} == {("embed", 1, 3), ("latents", 1, 3)}
    report = verify.main(VerifyConfig(store, sample=9))
    assert report.ok and len(report.stale) == 2, report.to_text()

    for summary in (embed.main(texts), latents.main(pictures)):
        assert (summary.ok, summary.fragments, summary.fragments_stale, summary.rows) == (True, 1, 1, 3)
    assert changed(embeds, holders(world, "caption_original_embeds_one")) == holding(world, "1.jpg")
    assert changed(made, holders(world, "latents")) == holding(world, "8.jpg")
    table = world.table.to_table()
    values = decode(table["caption_original_embeds_one"], table.schema.field("caption_original_embeds_one"))
    for text, value in zip(table["caption_original"].to_pylist(), values):
        assert value is not None
        np.testing.assert_allclose(value, PromptEncoder(encoder, "cpu")([text])[0][0].numpy(), atol=1e-5)
    for image_id, row in world.rows().items():
        assert (row["latents"] == before[image_id]["latents"]) == (row["image"] == before[image_id]["image"])
    assert inspection.main(InspectConfig(store)).facts.stale == []
    report = verify.main(VerifyConfig(store, sample=9))
    assert report.ok and not report.stale, report.to_text()
    assert embed.main(texts).fragments == latents.main(pictures).fragments == 0
