"""Small feature stores, written as the pipelines write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lidit.store import columns
from lidit.store.buckets import parse_bucket
from lidit.store.codec import decode_bytes, encode
from pipelines.embed import ENCODERS_SCHEMA
from pipelines.engine.column_file import UNCOMPRESSED, ColumnFileWriter
from pipelines.engine.table import Table

CHANNELS, DOWNSCALE = 4, 8
PREFIX = {"one": 3, "two": 5}  # instruction tokens of each encoder


@dataclass
class Store:
    """A store and what was written into it: `latents[row]` (C, H, W), `embeds[text, encoder][row]` (L, E) or None."""

    uri: str
    buckets: list[str | None] = field(default_factory=list)
    latents: list[np.ndarray | None] = field(default_factory=list)
    embeds: dict[tuple[str, str], list[np.ndarray | None]] = field(default_factory=dict)
    null_embeds: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def samples(self) -> Table:
        return Table(f"{self.uri}/{columns.SAMPLES_TABLE}")


class Writer:
    """Rows with random values, of the widths, codecs and texts asked for."""

    def __init__(
        self,
        uri: str,
        widths: dict[str, int] | None = None,
        texts: Sequence[str] = (columns.CAPTION,),
        codec: str = "bf16",
        latents_codec: str = "fp32",
        moments: bool = False,
        null_tokens: int = 1,
        longest: int = 12,
        seed: int = 0,
    ):
        self.widths = {"one": 8, "two": 16} if widths is None else widths
        self.texts, self.codec, self.latents_codec, self.moments = tuple(texts), codec, latents_codec, moments
        self.longest, self.rng = longest, np.random.default_rng(seed)
        self.store = Store(uri, embeds={(text, name): [] for text in self.texts for name in self.widths})
        self.store.samples.create(self.schema())
        self.write_encoders(null_tokens)

    def fingerprint(self, name: str) -> str:
        return json.dumps({"model": name, "layer": -3})

    def schema(self) -> pa.Schema:
        shape = {columns.META_CHANNELS: str(CHANNELS), columns.META_DOWNSCALE: str(DOWNSCALE)}
        made = {columns.META_CODEC: self.latents_codec, columns.META_FINGERPRINT: json.dumps({"vae": "tiny"})}
        name = columns.LATENT_MOMENTS if self.moments else columns.LATENTS
        fields = [
            pa.field(columns.IMAGE_ID, pa.string()),
            pa.field(columns.BUCKET, pa.string()),
            pa.field(name, pa.large_binary(), metadata={**shape, **made, **UNCOMPRESSED}),
        ]
        for text, encoder in self.store.embeds:
            made = {columns.META_FINGERPRINT: self.fingerprint(encoder)}
            shape = {columns.META_CODEC: self.codec, columns.META_WIDTH: str(self.widths[encoder])}
            embeds, length = columns.embeds(text, encoder), columns.length(text, encoder)
            fields += [
                pa.field(embeds, pa.large_binary(), metadata={**made, **shape, **UNCOMPRESSED}),
                pa.field(length, pa.int32(), metadata=made),
            ]
        return pa.schema(fields)

    def write_encoders(self, null_tokens: int = 1) -> None:
        """One row per encoder."""
        table = Table(f"{self.store.uri}/{columns.ENCODERS_TABLE}")
        table.create(ENCODERS_SCHEMA)
        for name, width in self.widths.items():
            null = self.rng.standard_normal((null_tokens, width)).astype(np.float32)
            self.store.null_embeds[name] = self.round(null, width)
            row: dict[str, Any] = {
                columns.ENCODER: name,
                columns.FINGERPRINT: self.fingerprint(name),
                columns.ENCODER_CONFIG: json.dumps({"name": name}),
                columns.EMBED_WIDTH: width,
                columns.INSTRUCTION_EMBEDS: np.full((PREFIX.get(name, 2), width), 0.5, np.float32).tobytes(),
                columns.NULL_EMBEDS: null.tobytes(),
            }
            table.upsert(columns.ENCODER, row)

    def fragment(self, buckets: Sequence[str | None], absent: dict[str, Sequence[int]] | None = None) -> None:
        """Appends a fragment, a row per bucket (None: without latents); `absent`: text -> rows of it that are null."""
        store, absent = self.store, absent or {}
        first = len(store.buckets)
        arrays: dict[str, list[Any]] = {columns.IMAGE_ID: [f"image-{first + row}" for row in range(len(buckets))]}
        arrays[columns.BUCKET] = list(buckets)
        latents = [None if bucket is None else self.latent(bucket) for bucket in buckets]
        store.latents += [value and value[0] for value in latents]
        arrays[columns.LATENT_MOMENTS if self.moments else columns.LATENTS] = [value and value[1] for value in latents]
        for text, encoder in store.embeds:
            width, rows = self.widths[encoder], []
            for row in range(len(buckets)):
                gone = row in absent.get(text, ())
                states = self.rng.standard_normal((self.rng.integers(0, self.longest + 1), width)).astype(np.float32)
                data = self.encode(states)
                rows.append(None if gone else data)
                store.embeds[text, encoder].append(None if gone else decode_bytes(data, self.codec, width))
            arrays[columns.embeds(text, encoder)] = rows
            arrays[columns.length(text, encoder)] = [
                None if value is None else len(value) for value in store.embeds[text, encoder][first:]
            ]
        store.buckets += buckets
        schema = self.schema()
        writer = ColumnFileWriter(store.samples.uri, schema, "test-1")
        writer.write(pa.record_batch([pa.array(arrays[f.name], f.type) for f in schema], schema=schema))
        store.samples.append([writer.finish(store.samples.open())])

    def latent(self, bucket: str) -> tuple[np.ndarray, bytes]:
        """(values as stored, their bytes)."""
        height, width = parse_bucket(bucket)
        shape = (CHANNELS * (2 if self.moments else 1), height // DOWNSCALE, width // DOWNSCALE)
        values = torch.from_numpy(self.rng.standard_normal(shape).astype(np.float32))
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.latents_codec]
        stored = values.to(kind)
        return stored.float().numpy(), stored.contiguous().view(torch.uint8).numpy().tobytes()

    def round(self, states: np.ndarray, width: int) -> np.ndarray:
        """As the column's codec keeps them; fp8 columns are read as bf16."""
        codec = "bf16" if self.codec == "fp8_e4m3" else self.codec
        return (
            decode_bytes(encode(torch.from_numpy(states), codec).numpy().tobytes(), codec, width)
            if len(states)
            else states
        )

    def encode(self, states: np.ndarray) -> bytes:
        """(L, E) -> as the column holds it; a prompt of no tokens is no bytes."""
        return encode(torch.from_numpy(states), self.codec).numpy().tobytes() if len(states) else b""
