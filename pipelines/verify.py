"""Verifies a store: that `samples.lance` holds what its stages claim, to the byte, and that the embeddings are right.

- **rows**: the table is valid, every `image_id` is there once.
- **complete**: every fragment that has a stage's input has its output.
- **content**: every column of every fragment has the digest that its writer noted: one flipped byte is found.
- **place**: every data file lies in the fragment, beside the rows, that it was made for: exchanged files are found.
- **embeddings**: byte lengths fit the token counts, nulls have a reason, no NaN or Inf.
- **latents**: byte lengths fit the buckets, nulls have a reason, no NaN or Inf.
- **again**: random rows encoded once more by an independent path (plain transformers, one prompt at a time, full depth, no
  shared prefix) agree within the codec's tolerance.

Columns that were made from values which have changed since are named as stale, and not held against the new values.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
from lance.file import LanceFileReader

from lidit.cli import run
from lidit.frozen.loading import load_config, load_model, load_tokenizer
from lidit.frozen.text import DTYPES, ENCODER_ONLY, EncoderConfig
from lidit.frozen.truncation import beginnings
from lidit.runtime.fields import JobConfig
from lidit.runtime.model_files import config_digest, resolve_model, tokenizer_digest, weights_digest
from lidit.runtime.result import JobResult, filled
from lidit.runtime.uris import shown
from lidit.store import columns
from lidit.store.checksum import no_panic
from lidit.store.codec import bytes_per_token, decode, decode_bytes, excess, finite_values
from lidit.store.fingerprints import comparable, warn_unrecorded
from lidit.store.stale import stale_columns
from pipelines.engine.table import Table, encoders_of, samples_of
from pipelines.engine.worker import READS
from pipelines.report.facts import stale_facts
from pipelines.verification.files import Unchecked, wrong_content, wrong_places
from pipelines.verification.latents import latents_fields, latents_problems
from pipelines.verification.scope import draw_rows, fragments_since, fresh_in, scan

READ_ROWS = 256
SHOWN = 5  # problems of one check that are listed
MAKE_AGAIN = "columns of a stage are made again by its job with --overwrite"
PUT_BACK = (
    "columns that came with the rows: put the file back from a copy, or delete the fragment's rows and ingest them again, with "
    "--reread"
)
REMEDIES = {
    "rows": "keep one row of each image_id and delete the others",
    "complete": "run the stage's job: it makes what is missing",
    "content": f"{MAKE_AGAIN}; {PUT_BACK}",
    "place": f"put the files back under their own names; else {MAKE_AGAIN}; {PUT_BACK}",
    "embeddings": "rows without a reason: run lidit embed; others: lidit embed --overwrite",
    "latents": "rows without a reason: run lidit latents; others: lidit latents --overwrite",
    "again": "use the model that the embeddings were made with, or make them again: lidit embed --overwrite",
}


@dataclass(frozen=True)
class VerifyConfig(JobConfig):
    """The verify job."""

    store: str = "./store"
    """Folder or URI of the feature store."""
    sample: int = 64
    """Random rows that are encoded again, per text column and encoder; 0 for none."""
    seed: int = 0
    """Decides which random rows are encoded again."""
    since: str = ""
    """Tag or version of the table: content, embeddings and latents are looked at in fragments that have changed since, and no
    others. Default: in all."""
    download_models: bool = False
    """Fetch encoders that the store names by a hub id and that are not in the local hub cache: the store's author chose
    them."""


@dataclass
class VerifyResult(JobResult):
    """Checks made and problems found; `ok` if there are none."""

    job: str = field(default="verify", init=False)
    store: str
    version: int = 0  # version of the samples table that was looked at
    checks: dict[str, str] = field(default_factory=dict)  # name -> what was looked at
    problems: dict[str, list[str]] = field(default_factory=dict)
    unchecked: list[str] = field(default_factory=list)  # what could not be looked at, which is no problem by itself
    stale: list[str] = field(default_factory=list)  # made from values that have changed since: no problem

    @property
    def ok(self) -> bool:  # type: ignore[override]  # others are told it, this one knows
        """Tells whether no check found a problem."""
        return not any(self.problems.values())

    def lines(self) -> Iterator[str]:
        """A line per check, the problems below it."""
        verdict = "nothing wrong found" if self.ok else "PROBLEMS FOUND"
        verdict += ", not all could be checked" if self.ok and self.unchecked else ""
        yield f"verify {self.store}: {verdict}"
        for name, what in self.checks.items():
            problems = self.problems.get(name, [])
            yield f"  {'FAILED' if problems else 'ok':7} {name:10} {what}"
            yield from (f"            - {problem}" for problem in problems[:SHOWN])
            if len(problems) > SHOWN:
                yield f"            - and {len(problems) - SHOWN:,} more"
            if problems and name in REMEDIES:
                yield f"            what to do: {REMEDIES[name]}"
        yield from filled(["  not     checked    {unchecked}", "  stale   {stale}"], vars(self))


def main(config: VerifyConfig) -> VerifyResult:
    """Runs all checks on the newest version. ValueError where `since` is not there."""
    table = samples_of(config.store)
    dataset = table.open()
    report = VerifyResult(config.store, dataset.version)
    fragments = fragments_since(dataset, config.since)
    stale = stale_columns(LanceFileReader, dataset, table.uri, dataset.schema)
    report.stale = [facts.words for facts in stale_facts(dataset, stale)]
    made = [f for f in dataset.schema if columns.META_FINGERPRINT in columns.metadata_of(f)]
    embeds = [f for f in made if {columns.META_CODEC, columns.META_ENCODER} <= columns.metadata_of(f).keys()]

    def check(name: str, what: str, find: Callable[[], Iterator[str]]) -> None:
        print(f"verify: {name} ...", file=sys.stderr, flush=True)
        report.checks[name] = what
        try:
            with no_panic():
                report.problems[name] = [shown(problem) for problem in find()]
        except (OSError, pa.ArrowInvalid) as error:  # a damaged file: what Lance says of it
            report.problems[name] = [shown(f"could not be read: {error}")]

    check("rows", f"{dataset.count_rows():,} rows, version {dataset.version}", lambda: _rows(dataset))
    check("complete", f"{len(made)} columns of stages", lambda: _complete(table, dataset, made))
    changed = f" changed since {config.since}" if config.since else ""
    what, unchecked = f"digests of every column, {len(fragments):,} fragments{changed}", Unchecked(dataset)
    check("content", what, lambda: wrong_content(table.uri, dataset, fragments, unchecked.add))
    if unchecked.count:
        report.checks["content"] += f"; {unchecked.count:,} files of another tool have none"
        report.unchecked += unchecked.sentences()

    def looked_at(total: int, silent: int) -> None:
        unknown = f"; not checkable are {silent:,}, of an older lidit or another tool" if silent else ""
        report.checks["place"] = f"{total - silent:,} of {total:,} files lie where they were made for{unknown}"

    check("place", "data files", lambda: wrong_places(table.uri, dataset, fragments, looked_at))
    check("embeddings", f"{len(embeds)} columns", lambda: _embeddings(dataset, fragments, embeds, stale))
    if latents := latents_fields(dataset.schema):
        check("latents", f"{len(latents)} columns", lambda: latents_problems(dataset, latents, fragments, stale))
    if config.sample:
        stale_embeds = {fragment for fragment, names in stale.items() if {f.name for f in embeds} & {*names}}
        fresh = [fragment for fragment in fragments if fragment.fragment_id not in stale_embeds]
        sample = draw_rows(dataset, fresh, config.sample, config.seed)
        what = f"{len(sample)} rows of {len(embeds)} columns"
        check("again", what, lambda: _again(config, dataset, embeds, sample))
    return report


def _rows(dataset: lance.LanceDataset) -> Iterator[str]:
    dataset.validate()
    ids = dataset.to_table(columns=[columns.IMAGE_ID]).column(columns.IMAGE_ID)
    if ids.null_count:
        yield f"{ids.null_count:,} rows have no {columns.IMAGE_ID}"
    for entry in pc.value_counts(ids).filter(pc.greater(pc.struct_field(pc.value_counts(ids), "counts"), 1)):
        yield f"{columns.IMAGE_ID} {entry['values'].as_py()!r} is there {entry['counts'].as_py()} times"


def _complete(table: Table, dataset: lance.LanceDataset, made: list[pa.Field]) -> Iterator[str]:
    reads = {f.name: columns.metadata_of(f)[READS] for f in made}
    stages = {f.name: columns.metadata_of(f).get(columns.META_STAGE) or "stage's" for f in made}
    unread = table.missing(sorted(set(reads.values())), dataset)
    for fragment, absent in table.missing(list(reads), dataset).items():
        due = [name for name in absent if reads[name] not in unread.get(fragment, ())]
        if due:
            jobs = sorted({stages[name] for name in due})
            yield f"fragment {fragment} lacks {', '.join(due)}: run the {' and the '.join(jobs)} job"


def _embeddings(
    dataset: lance.LanceDataset,
    fragments: list[lance.LanceFragment],
    embeds: list[pa.Field],
    stale: Mapping[int, Sequence[str]],
) -> Iterator[str]:
    for stored in embeds:
        metadata = columns.metadata_of(stored)
        codec, width = metadata[columns.META_CODEC], int(metadata[columns.META_WIDTH])
        text, encoder = metadata[columns.META_TEXT], metadata[columns.META_ENCODER]
        length, error = columns.length(text, encoder), columns.error(metadata[columns.META_STAGE])
        per_token = bytes_per_token(codec, width)
        read = [text, stored.name, length, error, columns.IMAGE_ID]
        for batch in scan(dataset, fresh_in(fragments, stored.name, stale), read, READ_ROWS):
            values, tokens = batch.column(stored.name), batch.column(length)
            sizes = pc.fill_null(pc.binary_length(values), 0).to_numpy()
            is_null = values.is_null().to_numpy(False)
            unexplained = is_null & batch.column(text).is_valid().to_numpy(False)
            unexplained &= batch.column(error).is_null().to_numpy(False)
            counted = sizes == pc.fill_null(tokens, 0).to_numpy().astype(np.int64) * per_token
            wrong_null = is_null != tokens.is_null().to_numpy(False)
            finite = np.array(
                [not value.is_valid or finite_values(value.as_buffer(), codec, width) for value in values]
            )
            for row in np.flatnonzero(unexplained | ~counted | wrong_null | ~finite).tolist():
                what = "NaN or Inf" if not finite[row] else "null without a reason" if unexplained[row] else ""
                what = what or f"{sizes[row]:,} bytes for {tokens[row].as_py()} tokens of {per_token}"
                yield f"{stored.name} of {batch.column(columns.IMAGE_ID)[row].as_py()!r}: {what}"


def _again(
    config: VerifyConfig, dataset: lance.LanceDataset, embeds: list[pa.Field], sample: np.ndarray
) -> Iterator[str]:
    table = encoders_of(config.store)
    encoders = table.open().to_table().to_pylist() if table.exists() else []
    rows_of = {row[columns.ENCODER]: row for row in encoders}
    by_encoder: dict[str, list[pa.Field]] = {}
    for stored in embeds if len(sample) else ():
        by_encoder.setdefault(columns.metadata_of(stored)[columns.META_ENCODER], []).append(stored)
    for encoder, fields in by_encoder.items():
        if encoder not in rows_of:
            yield f"encoder {encoder!r} has no row in {columns.ENCODERS_TABLE}"
            continue
        try:
            made_by = EncoderConfig(**json.loads(rows_of[encoder][columns.ENCODER_CONFIG]))
            plain = PlainEncoder(made_by, config.download_models)
        except ValueError as error:
            yield f"encoder {encoder!r} cannot be loaded here: {error}"
            continue
        wanted = json.loads(columns.metadata_of(fields[0])[columns.META_FINGERPRINT])
        found = {
            "weights": weights_digest(plain.folder),
            "tokenizer": tokenizer_digest(plain.folder),
            "model_config": config_digest(plain.folder),
        }
        wanted, found, unrecorded = comparable(wanted, found)
        warn_unrecorded(f"encoder {encoder!r}", unrecorded)
        if any(wanted.get(key) != digest for key, digest in found.items()):
            yield f"encoder {encoder!r}: the model in {plain.folder} is not the one that the embeddings were made with"
            continue
        yield from _compare_prefix(plain, rows_of[encoder])
        for stored in fields:
            yield from _compare_rows(plain, dataset, stored, sample, wanted["max_prompt_tokens"])


def _compare_prefix(plain: PlainEncoder, row: dict[str, Any]) -> Iterator[str]:
    stored = decode_bytes(row[columns.INSTRUCTION_EMBEDS], "fp32", row[columns.EMBED_WIDTH])
    again = plain.states(plain.prefix_ids) if plain.prefix_ids else np.zeros_like(stored)
    if stored.shape != again.shape or excess(stored, again, "fp32", plain.config.dtype) > 0:
        yield f"{columns.INSTRUCTION_EMBEDS} of {plain.config.name!r} differ from the model's"


def _compare_rows(
    plain: PlainEncoder, dataset: lance.LanceDataset, stored: pa.Field, sample: np.ndarray, limit: int
) -> Iterator[str]:
    metadata = columns.metadata_of(stored)
    text, codec = metadata[columns.META_TEXT], metadata[columns.META_CODEC]
    taken = dataset.take(sample.tolist(), columns=[columns.IMAGE_ID, text, stored.name])
    values = decode(taken.column(stored.name), dataset.schema.field(stored.name))
    for image_id, prompt, value in zip(taken[columns.IMAGE_ID].to_pylist(), taken[text].to_pylist(), values):
        if prompt is None or value is None:
            continue
        again = plain.encode(prompt, limit)
        if again.shape != value.shape:
            yield f"{stored.name} of {image_id!r}: {value.shape[0]} tokens stored, {again.shape[0]} made again"
        elif again.size and (beyond := excess(value, again, codec, plain.config.dtype)) > 0:
            yield f"{stored.name} of {image_id!r}: {beyond:.2g} of the token's largest value beyond the tolerance of {codec}"


class PlainEncoder:
    """Computes the same states the long way: the whole model with its head, one text at a time, prefix and prompt together."""

    def __init__(self, config: EncoderConfig, download: bool = False):
        self.config = config
        self.folder = resolve_model(config.model, config.revision, download=download)
        self.tokenizer = load_tokenizer(self.folder)
        model_type = load_config(self.folder).model_type
        self.is_decoder = model_type not in ENCODER_ONLY
        loader: Any = transformers.AutoModelForCausalLM if self.is_decoder else ENCODER_ONLY[model_type]
        self.model = load_model(loader, self.folder, whole=False, dtype=DTYPES[config.dtype]).eval()  # heads: not used
        self.prefix_ids = self._prefix() if self.is_decoder else []
        self.index = config.layer_index if config.layer_index is not None else (-3 if self.is_decoder else -1)

    def encode(self, prompt: str, limit: int) -> np.ndarray:
        """(L, E) float32 of the prompt's tokens, at most `limit`."""
        (prompt,) = beginnings(self.tokenizer, [prompt], limit)
        ids = self.tokenizer(prompt, add_special_tokens=not self.is_decoder)["input_ids"]
        if not self.is_decoder and len(ids) > limit:
            ids = ids[: limit - 1] + ids[-1:]
        return self.states(self.prefix_ids + ids[:limit])[len(self.prefix_ids) :]

    def states(self, ids: list[int]) -> np.ndarray:
        """(len(ids), E) float32 of the chosen layer."""
        if not ids:
            return np.zeros((0, self.model.config.get_text_config().hidden_size), np.float32)
        with torch.inference_mode():
            output = self.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
        hidden = output.hidden_states[self.index]
        if not self.is_decoder and self.index == -1:
            hidden = output.last_hidden_state
        return hidden[0].float().numpy()

    def _prefix(self) -> list[int]:
        """Token ids of the prefix: what two conversations that differ in the prompt alone have in common."""
        instruction, tokenizer = self.config.instruction, self.tokenizer
        if self.config.template == "plain":
            ids = tokenizer(instruction + "\n", add_special_tokens=False)["input_ids"] if instruction else []
            return ([tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []) + ids
        system = [{"role": "system", "content": instruction}] if instruction else []
        texts: Any = [
            tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": prompt}], tokenize=False, date_string="26 Jul 2024"
            )
            for prompt in ("0", "1")
        ]
        common = os.path.commonprefix(texts)  # noqa: RUF071 - two texts, not paths
        return tokenizer(common, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    run("verify")
