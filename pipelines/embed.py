"""Embeds prompts: text columns of `samples.lance` -> ragged multi-LLM prompt embeddings beside them.

`<text>` -> `<text>_embeds_<encoder>`, `<text>_length_<encoder>`, `<text>_truncated_<encoder>` for every text column and
encoder of the config, and one row per encoder in `encoders.lance` (its fingerprint, `instruction_embeds`, `null_embeds`).
All encoders ride one read of the text and are committed together: the fused feature row. Run again to resume.
With no argument at all it embeds the demo's store with the two tuned LLMs of `demo/encoders`, and makes that store first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import pyarrow as pa

from lidit.cli import run
from lidit.frozen.text import DEMO_ENCODERS, EncoderConfig, PromptEncoder
from lidit.runtime.fields import PositiveInt
from lidit.store import columns
from lidit.store.codec import bytes_per_token, decode_bytes, excess
from lidit.store.fingerprints import comparable
from pipelines.engine.column_file import UNCOMPRESSED
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.summary import Summary
from pipelines.engine.table import Table, encoders_of
from pipelines.engine.worker import READS, Columns

WINDOW_BYTES = 512 << 20  # of embeddings that one window may make, at `TYPICAL_TOKENS` a prompt
TYPICAL_TOKENS = 64
WINDOW_ROWS = (256, 8192)  # at least, at most


@dataclass(frozen=True)
class EmbedConfig(StageConfig):
    """The embedding job."""

    text: Sequence[str] = (columns.CAPTION,)
    """Text columns to embed."""
    encoders: Sequence[EncoderConfig] = DEMO_ENCODERS
    """The frozen LLMs. On the command line, `--encoders NAME ...` runs a subset of the config's, by name."""
    batch_tokens: PositiveInt = 8192
    """Prompt tokens of one forward pass, padding included. Lower it if a GPU runs out of memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [encoder.name for encoder in self.encoders]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"encoders: expected at least one, each with a name of its own, received {names}")
        if not self.text or len(set(self.text)) < len(self.text):
            raise ValueError(f"text: expected at least one column, each once, received {list(self.text)}")

    def only(self, names: list[str]) -> EmbedConfig:
        """The same job with some of its encoders."""
        known = {encoder.name: encoder for encoder in self.encoders}
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"--encoders {' '.join(unknown)}: not in the config, which has {', '.join(known)}")
        return dataclasses.replace(self, encoders=tuple(known[name] for name in known if name in names))


class EmbedPrompts:
    """`<text>` -> `<text>_embeds_<encoder>`, `<text>_length_<encoder>`, `<text>_truncated_<encoder>`."""

    name = "embed"

    def __init__(self, config: EmbedConfig, publish: bool = True):
        self.config = config
        device = config.actors.device()
        self.encoders = [PromptEncoder(encoder, device) for encoder in config.encoders]
        self.window_rows = window_rows(config, self.encoders)
        table = _encoders_table(config)
        table.create(ENCODERS_SCHEMA)
        for encoder in self.encoders if publish else ():
            _publish(table, encoder)

    @classmethod
    def for_stamp(cls, config: EmbedConfig) -> EmbedPrompts:
        """The stage, nothing published. ValueError where an encoder's row, but for its age, is not what the encoder gives."""
        stage = cls(config, publish=False)
        for encoder in stage.encoders:
            row = _published(_encoders_table(config), encoder.config.name)
            if row is not None:
                _check_row(row, encoder)
        return stage

    @classmethod
    def stamped(cls, config: EmbedConfig) -> None:
        """Brings the encoders' rows up to date, each after a check."""
        for encoder in map(PromptEncoder, config.encoders):
            _publish(_encoders_table(config), encoder)

    @classmethod
    def writes(cls, config: EmbedConfig) -> list[pa.Field]:
        """Three fields per text and encoder, with all that a reader needs in their metadata."""
        versions = json.dumps({name: version(name) for name in ("transformers", "tokenizers", "torch")})
        fields = []
        for encoder in map(PromptEncoder, config.encoders):
            fingerprint = json.dumps(encoder.fingerprint(), sort_keys=True)
            for text in config.text:
                metadata = {
                    READS: text,
                    columns.META_STAGE: cls.name,
                    columns.META_TEXT: text,
                    columns.META_ENCODER: encoder.config.name,
                    columns.META_FINGERPRINT: fingerprint,
                    columns.META_VERSIONS: versions,
                }
                shape = {columns.META_CODEC: encoder.config.codec, columns.META_WIDTH: str(encoder.width)}
                name = encoder.config.name
                fields += [
                    pa.field(
                        columns.embeds(text, name), pa.large_binary(), metadata={**metadata, **shape, **UNCOMPRESSED}
                    ),
                    pa.field(columns.length(text, name), pa.int32(), metadata=metadata),
                    pa.field(columns.truncated(text, name), pa.int32(), metadata=metadata),
                ]
        return fields

    @classmethod
    def bytes_per_row(cls, config: EmbedConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        """Mean tokens of the sample times bytes per token, over all texts and encoders."""
        total = 0.0
        for encoder in map(PromptEncoder, config.encoders):
            for text in config.text:
                ids, _ = encoder.tokenize([value or "" for value in sample[text].to_pylist()])
                tokens = np.mean([len(row) for row in ids]) if ids else 0.0
                total += float(tokens) * bytes_per_token(encoder.config.codec, encoder.width) + 8
        return total

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """Encodes every distinct text of the window once per encoder."""
        made = Columns({})
        values = {text: window.column(text).to_pylist() for text in self.config.text if text in window.schema.names}
        for encoder in self.encoders:
            name = encoder.config.name
            texts = [text for text in values if columns.embeds(text, name) in wanted]
            if not texts:
                continue
            prompts = list(dict.fromkeys(value for text in texts for value in values[text] if value is not None))
            place = {prompt: index for index, prompt in enumerate(prompts)}
            encoded = _Encoded(encoder, prompts, self.config.batch_tokens)
            for text in texts:
                rows = np.array([-1 if value is None else place[value] for value in values[text]], np.int64)
                embeds, length, truncated, bad = encoded.columns(rows)
                made.arrays[columns.embeds(text, name)] = embeds
                made.arrays[columns.length(text, name)] = length
                made.arrays[columns.truncated(text, name)] = truncated
                for row in bad.tolist():
                    reason = f"{columns.embeds(text, name)}: NaN or Inf in the LLM's states"
                    made.errors[row] = f"{made.errors[row]}; {reason}" if row in made.errors else reason
                made.counts["truncated"] = made.counts.get("truncated", 0) + int((truncated.to_numpy(False) > 0).sum())
            made.counts["tokens"] = made.counts.get("tokens", 0) + encoded.tokens
            made.counts["slots"] = made.counts.get("slots", 0) + encoded.slots
        return made


class _Encoded:
    """The distinct prompts of a window, encoded: gathers rows of them into columns."""

    def __init__(self, encoder: PromptEncoder, prompts: list[str], batch_tokens: int):
        ids, self.excess = encoder.tokenize(prompts)
        self.length = np.array([len(tokens) for tokens in ids], np.int32)
        self.bytes_per_token = bytes_per_token(encoder.config.codec, encoder.width)
        self.packed: list[np.ndarray] = [np.empty(0, np.uint8)] * len(prompts)
        self.finite = np.ones(len(prompts), bool)
        self.tokens = self.slots = 0
        for batch in encoder.encode(ids, batch_tokens):
            ends = np.cumsum(batch.lengths)
            for row, end, count in zip(batch.rows.tolist(), ends.tolist(), batch.lengths.tolist()):
                self.packed[row] = batch.packed[end - count : end].reshape(-1)
            self.finite[batch.rows] = batch.finite
            self.tokens += int(batch.lengths.sum())
            self.slots += batch.slots

    def columns(self, rows: np.ndarray) -> tuple[pa.Array, pa.Array, pa.Array, np.ndarray]:
        """Indices of prompts (-1 = null text) -> embeds, length, truncated, and the rows whose states are not finite."""
        known = rows >= 0
        bad = np.flatnonzero(known)[~self.finite[rows[known]]]
        valid = known.copy()
        valid[bad] = False
        length, excess = np.zeros(len(rows), np.int32), np.zeros(len(rows), np.int32)
        length[valid], excess[valid] = self.length[rows[valid]], self.excess[rows[valid]]
        offsets = np.concatenate([[0], np.cumsum(length.astype(np.int64) * self.bytes_per_token)])
        data = np.empty(offsets[-1], np.uint8)
        for row in np.flatnonzero(valid).tolist():
            data[offsets[row] : offsets[row + 1]] = self.packed[rows[row]]
        validity = pa.py_buffer(np.packbits(valid, bitorder="little"))
        buffers = [validity, pa.py_buffer(offsets.astype(np.int64)), pa.py_buffer(data)]
        embeds = pa.Array.from_buffers(pa.large_binary(), len(rows), buffers)
        return embeds, pa.array(length, mask=~valid), pa.array(excess, mask=~valid), bad


ENCODERS_SCHEMA = pa.schema(
    [
        pa.field(
            columns.ENCODER, pa.string(), nullable=False, metadata={"lance-schema:unenforced-primary-key": "true"}
        ),
        pa.field(columns.FINGERPRINT, pa.string()),
        pa.field(columns.ENCODER_CONFIG, pa.string()),
        pa.field(columns.EMBED_WIDTH, pa.int32()),
        pa.field(columns.INSTRUCTION_EMBEDS, pa.large_binary()),
        pa.field(columns.NULL_EMBEDS, pa.large_binary()),
    ]
)


def window_rows(config: EmbedConfig, encoders: Sequence[PromptEncoder]) -> int:
    """Rows of a window such that its embeddings, at a typical length, stay within `WINDOW_BYTES`."""
    per_token = sum(bytes_per_token(encoder.config.codec, encoder.width) for encoder in encoders) * len(config.text)
    return int(np.clip(WINDOW_BYTES // (per_token * TYPICAL_TOKENS), *WINDOW_ROWS))


def _encoders_table(config: EmbedConfig) -> Table:
    return encoders_of(config.store)


def _published(table: Table, name: str) -> dict[str, Any] | None:
    """The row of the encoder of that name, if there is one."""
    if not table.exists():
        return None
    rows = table.open().to_table(filter=f"{columns.ENCODER} = '{name}'").to_pylist()
    return rows[0] if rows else None


def _publish(table: Table, encoder: PromptEncoder) -> None:
    """Puts the encoder's row into the encoders table, unless it is there.

    A row that differs by what it does not record alone keeps its states, after a check (ValueError where they differ).
    """
    fingerprint = json.dumps(encoder.fingerprint(), sort_keys=True)
    present = _published(table, encoder.config.name)
    if present is not None and present[columns.FINGERPRINT] == fingerprint:
        return
    if present is not None and _check_row(present, encoder):
        table.upsert(columns.ENCODER, {**present, columns.FINGERPRINT: fingerprint})
        return
    row: dict[str, Any] = {
        columns.ENCODER: encoder.config.name,
        columns.FINGERPRINT: fingerprint,
        columns.ENCODER_CONFIG: json.dumps(dataclasses.asdict(encoder.config)),
        columns.EMBED_WIDTH: encoder.width,
        columns.INSTRUCTION_EMBEDS: encoder.instruction_embeds.tobytes(),
        columns.NULL_EMBEDS: encoder.null_embeds.tobytes(),
    }
    table.upsert(columns.ENCODER, row)


def _check_row(row: dict[str, Any], encoder: PromptEncoder) -> bool:
    """Whether a row is this encoder's but for what it does not record.

    Raises:
        ValueError: it is, and its states are not those that the encoder gives.
    """
    old, new, unrecorded = comparable(json.loads(row[columns.FINGERPRINT]), encoder.fingerprint())
    if old != new or not unrecorded:
        return False
    for name, again in (
        (columns.INSTRUCTION_EMBEDS, encoder.instruction_embeds),
        (columns.NULL_EMBEDS, encoder.null_embeds),
    ):
        stored = decode_bytes(row[name], "fp32", row[columns.EMBED_WIDTH])
        if stored.shape != again.shape or excess(stored, again, "fp32", encoder.config.dtype) > 0:
            raise ValueError(
                f"encoder {encoder.config.name!r}: its {name} in {columns.ENCODERS_TABLE} were made before "
                f"{', '.join(unrecorded)} was recorded, and are not what the model in {encoder.folder} gives now: put the "
                f"model's right files back, or give the encoder another name"
            )
    return True


def main(config: EmbedConfig) -> Summary:
    """Runs the job."""
    return run_stage(EmbedPrompts, config)


if __name__ == "__main__":
    run("embed")
