"""The pinned table: what it takes, what it refuses and in which words, and that a clean-up leaves it alone."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import lance
import numpy as np
import pytest

from lidit.store import columns
from lidit.store.features import Features
from pipelines.engine.table import Table

pytestmark = pytest.mark.unit

MIX = {columns.CAPTION: 1.0}
BOTH = {columns.CAPTION: 0.75, columns.CAPTION_ORIGINAL: 0.25}


def test_the_store_says_what_the_model_needs(store: Any) -> None:
    features = Features(store.uri, ["two", "one"], BOTH)
    assert list(features.encoders) == ["two", "one"]  # the order asked for: that of the model's branches
    assert {name: states.width for name, states in features.encoders.items()} == {"one": 8, "two": 16}
    assert features.encoders["one"].instruction_embeds.shape == (3, 8)
    assert features.encoders["two"].instruction_embeds.shape == (5, 16)
    assert features.latents.channels == 4 and features.latents.shape("48x80") == (4, 6, 10)
    assert features.texts == (columns.CAPTION, columns.CAPTION_ORIGINAL)
    assert features.shares.tolist() == [0.75, 0.25]
    assert features.total == 90
    assert features.version == lance.dataset(features.table.uri).version


def test_rows_are_found_in_their_fragments(store: Any) -> None:
    features = Features(store.uri, ["one"], MIX)
    fragments, places = features.locate(np.array([0, 19, 20, 29, 30, 60, 61, 89]))
    assert fragments.tolist() == [0, 0, 1, 1, 2, 3, 4, 4]
    assert places.tolist() == [0, 19, 0, 9, 0, 0, 0, 28]
    taken = features.take(2, np.array([0, 1, 29]), [columns.IMAGE_ID])
    assert taken.column(0).to_pylist() == ["image-30", "image-31", "image-59"]


def test_deleted_rows_do_not_shift_what_is_read(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"] * 6)
    writer.fragment(["64x64"] * 6)
    lance.dataset(writer.store.samples.uri).delete("image_id IN ('image-1', 'image-4', 'image-7')")
    features = Features(writer.store.uri, ["one"], MIX)
    assert features.total == 9
    left = [f"image-{row}" for row in range(12) if row not in (1, 4, 7)]
    for row in range(9):
        (fragment,), (place,) = features.locate(np.array([row]))
        assert features.take(int(fragment), np.array([place]), [columns.IMAGE_ID]).column(0).to_pylist() == [left[row]]


def test_a_pinned_version_outlives_a_cleanup(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"] * 4)
    features = Features(writer.store.uri, ["one"], MIX)
    features.pin("run-a")
    features.pin("run-a")  # once more changes nothing
    writer.fragment(["64x64"] * 4)
    newest = lance.dataset(features.table.uri)
    newest.optimize.compact_files()
    cleanup(newest.uri)
    again = Features(writer.store.uri, ["one"], MIX, version=features.version)
    assert again.total == 4
    assert again.take(0, np.arange(4), [columns.IMAGE_ID]).num_rows == 4
    again.unpin("run-a")
    again.unpin("run-a")
    cleanup(newest.uri)
    with pytest.raises(ValueError, match=r"version \d+ of .* cannot be opened.*another `name`"):
        Features(writer.store.uri, ["one"], MIX, version=features.version)


def cleanup(uri: str) -> None:
    lance.dataset(uri).cleanup_old_versions(
        older_than=datetime.timedelta(0), delete_unverified=True, error_if_tagged_old_versions=False
    )


def test_a_tag_at_another_version_is_moved_only_when_told(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"])
    first = Features(writer.store.uri, ["one"], MIX)
    first.pin("run")
    writer.fragment(["64x64"])
    second = Features(writer.store.uri, ["one"], MIX)
    with pytest.raises(ValueError, match="the tag run keeps version"):
        second.pin("run")
    second.unpin("run")
    assert lance.dataset(second.table.uri).tags.list()["run"]["version"] == first.version
    assert second.pin("run", move=True) is None
    assert lance.dataset(second.table.uri).tags.list()["run"]["version"] == second.version > first.version


def test_files_that_vanish_while_reading_are_named(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"] * 4)
    features = Features(writer.store.uri, ["one"], MIX)
    cleanup_files(features.table.uri)
    with pytest.raises(RuntimeError, match=r"cannot read version \d+ of .*samples.lance.*clean-up.*tag"):
        features.take(0, np.arange(4), [columns.LATENTS])


def cleanup_files(uri: str) -> None:
    from pathlib import Path

    for path in Path(uri, "data").iterdir():
        path.unlink()


def test_no_table_no_column_no_encoder(store: Any, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=r"no table at .*samples.lance.*lidit ingest"):
        Features(str(tmp_path), ["one"], MIX)
    with pytest.raises(ValueError, match=r"lacks caption_embeds_three, latents_512, bucket_512: .*It has image_id"):
        Features(store.uri, ["three"], MIX, latents="latents_512", bucket="bucket_512")
    with pytest.raises(ValueError, match=r"version 99999 of .* cannot be opened"):
        Features(store.uri, ["one"], MIX, version=99999)


def test_an_encoder_that_the_encoders_table_lacks(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"])
    lance.dataset(f"{writer.store.uri}/{columns.ENCODERS_TABLE}").delete("encoder = 'one'")
    with pytest.raises(ValueError, match="has no encoder 'one', but two"):
        Features(writer.store.uri, ["one"], MIX)


def test_states_of_another_encoder_are_refused(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"])
    table = Table(f"{writer.store.uri}/{columns.ENCODERS_TABLE}")
    (row,) = table.open().to_table(filter="encoder = 'two'").to_pylist()
    table.upsert(columns.ENCODER, row | {columns.FINGERPRINT: json.dumps({"model": "two", "layer": -2})})
    with pytest.raises(ValueError, match=r"'caption_embeds_two'.*made differently: layer: -2 became -3.*--overwrite"):
        Features(writer.store.uri, ["one", "two"], MIX)
    Features(writer.store.uri, ["one"], MIX)  # the other one is as it was


def test_features_other_than_the_checkpoints_are_named(store: Any) -> None:
    features = Features(store.uri, ["one"], MIX)
    saved = json.loads(json.dumps(features.fingerprint()))
    features.check_same(saved)
    saved["encoders"]["one"]["layer"] = -1
    saved["latents"]["vae"] = "large"
    with pytest.raises(ValueError, match=r"encoders.one.layer: -1 became -3; latents.vae: \"large\" became \"tiny\""):
        features.check_same(saved)
    with pytest.raises(ValueError, match=r"encoders.two: .* became null"):
        Features(store.uri, ["one"], MIX).check_same(Features(store.uri, ["one", "two"], MIX).fingerprint())


def test_a_key_that_one_side_did_not_record_is_said_and_hides_nothing_else(store: Any) -> None:
    """A checkpoint of an earlier version, a store that was brought up to date since; or the other way round."""
    features = Features(store.uri, ["one"], MIX)
    saved = json.loads(json.dumps(features.fingerprint()))
    saved["encoders"]["one"]["model_config"] = "abc"
    with pytest.warns(UserWarning, match=r"encoders.one.model_config could not be compared"):
        features.check_same(saved)
    saved["encoders"]["one"]["layer"] = -1
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="layer: -1 became -3"):
        features.check_same(saved)
    saved = {**features.fingerprint(), "encoders": {"one": {"model": "one"}}}
    with pytest.raises(ValueError, match="layer: null became -3"):
        features.check_same(saved)


def test_a_phase_of_another_resolution_is_refused(store: Any) -> None:
    features = Features(store.uri, ["one"], MIX)
    features.check_resolution(["64x64", "48x80"], 64)
    with pytest.raises(ValueError, match=r"'bucket' of .* has 64x64, but the phase trains at 256 px"):
        features.check_resolution(["64x64"], 256)


def test_columns_without_their_metadata_are_refused(make_writer: Callable[..., Any]) -> None:
    writer = make_writer()
    writer.fragment(["64x64"])
    with pytest.raises(ValueError, match=r"column 'image_id' .*expected field metadata lidit:codec, lidit:channels"):
        Features(writer.store.uri, ["one"], MIX, latents=columns.IMAGE_ID)
