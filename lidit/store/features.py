"""The pinned feature table: opened at one version, checked, and read by rows. survey.py reads what is in it.

Writers may append and clean up meanwhile: `pin` tags the version, and Lance's clean-up leaves a tagged version alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lance
import numpy as np
import pyarrow as pa

from lidit.runtime.durable import flushed_commit
from lidit.runtime.outage import is_away, outlast
from lidit.store import columns
from lidit.store.buckets import parse_bucket
from lidit.store.checksum import no_panic
from lidit.store.codec import bytes_per_token
from lidit.store.fingerprints import comparable, warn_unrecorded

METADATA_CACHE = 256 << 20  # bytes that Lance may keep of the files' metadata
LATENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class EncoderStates:
    """What the store holds of an encoder once for all rows."""

    width: int  # E
    instruction_embeds: np.ndarray  # (P, E) float32
    null_embeds: np.ndarray  # (L, E) float32, the empty prompt; L may be 0
    fingerprint: dict[str, Any]
    config: dict[str, Any]  # fields of `lidit.frozen.text.EncoderConfig`


@dataclass(frozen=True)
class EmbedsFormat:
    """How a column of prompt embeddings is stored."""

    column: str
    codec: str
    width: int  # E

    @property
    def bytes_per_token(self) -> int:
        """Of the column's codec."""
        return bytes_per_token(self.codec, self.width)


@dataclass(frozen=True)
class LatentsFormat:
    """How the column of latents is stored."""

    column: str
    codec: str
    channels: int  # C
    downscale: int  # pixels along a side of one latent pixel
    moments: bool  # mean and deviation, 2C channels
    fingerprint: dict[str, Any]

    def shape(self, bucket: str) -> tuple[int, int, int]:
        """(C or 2C, H, W) of a value in that bucket."""
        height, width = parse_bucket(bucket)
        return self.channels * (2 if self.moments else 1), height // self.downscale, width // self.downscale

    def size(self, bucket: str) -> int:
        """Bytes of a value in that bucket."""
        return int(np.prod(self.shape(bucket))) * LATENT_BYTES[self.codec]


class Features:
    """The samples table of a store at one version.

    Args:
        store: folder or URI.
        encoders: names, in the order that the model has them.
        text_mix: text column -> share of the draws.
        latents, bucket: names of the columns.
        version: of the table; None: the newest.

    Raises:
        ValueError: no such table or version, columns missing, or embeddings and encoders table that do not belong together.
    """

    def __init__(
        self,
        store: str,
        encoders: Sequence[str],
        text_mix: Mapping[str, float],
        latents: str = columns.LATENTS,
        bucket: str = columns.BUCKET,
        version: int | None = None,
    ):
        self.store, self.bucket = store.rstrip("/"), bucket
        self.texts = tuple(sorted(text_mix))  # the order in the YAML must not change what is drawn
        self.shares = np.array([text_mix[text] for text in self.texts]) / sum(text_mix.values())
        self.table = _open(f"{self.store}/{columns.SAMPLES_TABLE}", version)
        self.version: int = self.table.version
        embeds = [columns.embeds(text, name) for text in self.texts for name in encoders]
        self._check_columns([*embeds, latents, bucket])
        lengths = [columns.length(text, name) for text in self.texts for name in encoders]
        self.columns = (*embeds, *lengths, latents, bucket)  # all that a run reads
        self.encoders = self._read_encoders(encoders)
        self.embeds = {text: {name: self._embeds_format(text, name) for name in encoders} for text in self.texts}
        self.latents = self._latents_format(latents)
        self._fragments = self.table.get_fragments()
        self._ends = np.cumsum([fragment.count_rows() for fragment in self._fragments], dtype=np.int64)

    # -- pinning ------------------------------------------------------------------------------------------------------

    def pin(self, tag: str, move: bool = False) -> str | None:
        """Tags the version, so that a clean-up keeps it for as long as the tag is there.

        Args:
            tag: a name that belongs to this run alone.
            move: a tag of that name that keeps another version is moved to this one.

        Returns:
            Why the store takes no tag, where it does not (it may be read-only): a clean-up may then end the run.

        Raises:
            ValueError: a tag of that name keeps another version, and is not to be moved.
        """
        try:
            there = self.tagged(tag)
            with flushed_commit(self.table.uri):
                if there is None:
                    outlast(lambda: self.table.tags.create(tag, self.version), f"making the tag {tag}")
                elif there != self.version and move:
                    outlast(lambda: self.table.tags.update(tag, self.version), f"moving the tag {tag}")
        except Exception as error:
            if is_away(error):
                raise
            made = self.keeps(tag)  # by a first try whose answer was lost
            return None if made else f"{self.table.uri} takes no tag ({_first_line(error)})"
        if there not in (None, self.version) and not move:
            raise ValueError(
                f"{self.table.uri}: the tag {tag} keeps version {there}, and this run is to begin at version {self.version}. "
                f"Was the run's tables.json lost? Put it back, or delete the tag, or train under another `name`"
            )
        return None

    def unpin(self, tag: str) -> str | None:
        """Takes the tag away, if it is there and keeps this version. Returns why the store does not allow it, if so."""
        try:
            if self.tagged(tag) == self.version:
                outlast(lambda: self.table.tags.delete(tag), f"removing the tag {tag}")
        except Exception as error:
            if self.keeps(tag):
                return f"{self.table.uri} keeps the tag {tag} ({_first_line(error)})"
        return None

    def keeps(self, tag: str) -> bool:
        """Whether a tag is known to keep this version."""
        try:
            return self.tagged(tag) == self.version
        except Exception:  # it cannot be read: nothing is known
            return False

    def tagged(self, tag: str) -> int | None:
        """The version that a tag keeps; None where there is no such tag."""
        found = outlast(lambda: self.table.tags.list().get(tag), "reading the table's tags")
        return None if found is None else int(found["version"])

    # -- what it is ---------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        """What the features were made with, as JSON; `check_same` compares two."""
        return {
            "encoders": {name: states.fingerprint for name, states in self.encoders.items()},
            "latents": self.latents.fingerprint,
        }

    def check_same(self, saved: Mapping[str, Any]) -> None:
        """Raises ValueError, naming what differs, where a checkpoint was trained on other features than these."""
        saved, now, unrecorded = comparable(saved, self.fingerprint())
        warn_unrecorded(f"the checkpoint and {self.store}", unrecorded)
        if differences := _differences(saved, now):
            raise ValueError(
                f"the features in {self.table.uri}, version {self.version}, are not those that the checkpoint was trained "
                f"on: {'; '.join(differences[:5])}. Train under another `name`, or restore the columns"
            )

    def check_resolution(self, buckets: Sequence[str], resolution: int) -> None:
        """Raises ValueError where a bucket has less than half or more than twice the pixels of `resolution`^2."""
        for bucket in buckets:
            height, width = parse_bucket(bucket)
            if not 0.5 <= height * width / resolution**2 <= 2:
                raise ValueError(
                    f"column {self.bucket!r} of {self.table.uri} has {bucket}, but the phase trains at {resolution} px: "
                    f"set the phase's `resolution`, or its `latents` and `bucket` columns"
                )

    @property
    def total(self) -> int:
        """Rows of the table."""
        return int(self._ends[-1]) if len(self._ends) else 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows (...) of the table -> (which fragment, which of its rows)."""
        fragment = np.searchsorted(self._ends, rows, side="right")
        return fragment, rows - np.concatenate([[0], self._ends])[fragment]

    def take(self, fragment: int, rows: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Columns of ascending rows of a fragment, as `locate` gives them. Rows that are neighbours cost one request."""
        try:
            with no_panic():
                return self._fragments[fragment].take(rows.tolist(), columns=list(names))
        except (OSError, ValueError) as error:
            raise RuntimeError(
                f"cannot read version {self.version} of {self.table.uri}: {str(error).splitlines()[0]}. Were its files "
                f"removed by a clean-up? A run that is pinned by a tag keeps them. Or damaged? `lidit verify` finds which"
            ) from error

    # -- inside -------------------------------------------------------------------------------------------------------

    def _check_columns(self, names: Sequence[str]) -> None:
        absent = [name for name in names if name not in self.table.schema.names]
        if absent:
            raise ValueError(
                f"{self.table.uri}, version {self.version}, lacks {', '.join(absent)}: run `lidit embed` and `lidit latents` "
                f"on it, or change data.encoders, data.text_mix or the phase's columns. It has "
                f"{', '.join(self.table.schema.names)}"
            )

    def _read_encoders(self, names: Sequence[str]) -> dict[str, EncoderStates]:
        uri = f"{self.store}/{columns.ENCODERS_TABLE}"
        present = {row[columns.ENCODER]: row for row in _open(uri, None).to_table().to_pylist()}
        encoders = {}
        for name in names:
            if name not in present:
                raise ValueError(f"{uri} has no encoder {name!r}, but {', '.join(sorted(present)) or 'none at all'}")
            row = present[name]
            width = row[columns.EMBED_WIDTH]
            encoders[name] = EncoderStates(
                width,
                instruction_embeds=np.frombuffer(row[columns.INSTRUCTION_EMBEDS], "<f4").reshape(-1, width),
                null_embeds=np.frombuffer(row[columns.NULL_EMBEDS], "<f4").reshape(-1, width),
                fingerprint=json.loads(row[columns.FINGERPRINT]),
                config=json.loads(row[columns.ENCODER_CONFIG] or "{}"),
            )
        return encoders

    def _embeds_format(self, text: str, name: str) -> EmbedsFormat:
        column = columns.embeds(text, name)
        metadata = self._metadata(column, columns.META_CODEC, columns.META_WIDTH, columns.META_FINGERPRINT)
        made_with = json.loads(metadata[columns.META_FINGERPRINT])
        encoder, made_with, unrecorded = comparable(self.encoders[name].fingerprint, made_with)
        warn_unrecorded(f"column {column!r} of {self.store} and its encoder", unrecorded)
        if differences := _differences(encoder, made_with):
            raise ValueError(
                f"column {column!r} and encoder {name!r} of {self.store}/{columns.ENCODERS_TABLE} were made differently: "
                f"{'; '.join(differences[:5])}. Embed the column again with `--overwrite`"
            )
        return EmbedsFormat(column, metadata[columns.META_CODEC], int(metadata[columns.META_WIDTH]))

    def _latents_format(self, column: str) -> LatentsFormat:
        metadata = self._metadata(
            column, columns.META_CODEC, columns.META_CHANNELS, columns.META_DOWNSCALE, columns.META_FINGERPRINT
        )
        codec = metadata[columns.META_CODEC]
        if codec not in LATENT_BYTES:
            raise ValueError(f"column {column!r}: expected codec {', '.join(LATENT_BYTES)}, received {codec!r}")
        return LatentsFormat(
            column,
            codec,
            channels=int(metadata[columns.META_CHANNELS]),
            downscale=int(metadata[columns.META_DOWNSCALE]),
            moments=column.startswith(columns.LATENT_MOMENTS),
            fingerprint=json.loads(metadata[columns.META_FINGERPRINT]),
        )

    def _metadata(self, column: str, *keys: str) -> dict[str, str]:
        found = columns.metadata_of(self.table.schema.field(column))
        if absent := [key for key in keys if key not in found]:
            raise ValueError(f"column {column!r} of {self.table.uri}: expected field metadata {', '.join(absent)}")
        return found


def _open(uri: str, version: int | None) -> lance.LanceDataset:
    """Raises ValueError where there is no table, or that version of it is gone."""
    try:
        return lance.dataset(uri, version=version, metadata_cache_size_bytes=METADATA_CACHE)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        if version is None:
            raise ValueError(f"no table at {uri}: {reason}. Make one: `lidit ingest`, `embed`, `latents`") from error
        raise ValueError(
            f"version {version} of {uri} cannot be opened: {reason}. If a clean-up removed it, this run cannot go on as it "
            f"was; start one of another `name` on the newest version"
        ) from error


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Where two JSON values differ, as `a.b: x became y`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [item for key in keys for item in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where}: {_short(old)} became {_short(new)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
