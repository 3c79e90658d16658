"""Probes encoders: what can be read, linearly, from the states that a text encoder gives of texts whose truth is known?

    lidit probe --texts truth.jsonl --layers all --instructions both
    lidit probe --texts truth.jsonl --config embed.yaml --encoders llama3     # the encoders of a file, one of them

`--texts`: JSON Lines or Parquet, a row for each text: `text`, and columns of truth (words, whole numbers, true or false),
such as the colour of the first object. With `--at COLUMN`, the states of a part of each text are read too: the column has
[first, last) characters. Ranks ways to use an encoder (layer, average of layers, instruction, norm) without training a model
on any. A control, `words`, is read from the same tokens' identities without the encoder. What it cannot tell: docs/probe.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lidit.cli import run
from lidit.frozen.text import DEMO_ENCODERS, EncoderConfig
from lidit.runtime.fields import JobConfig, PositiveInt
from lidit.runtime.result import JobResult, table
from pipelines.evaluation.intervals import NORMAL
from pipelines.evaluation.linear_probe import Reading, Split, read_labels, split_rows
from pipelines.evaluation.probe_states import Pooled, Way, pooled_states, ways_of

FEWEST = 50  # rows that accuracy is told on
MOST_CLASSES = 64


@dataclass(frozen=True)
class ProbeConfig(JobConfig):
    """The probe job: labels of texts, and the states that they are read from."""

    texts: str
    """File of texts and their truth: .jsonl or .parquet."""
    text: str = "text"
    """Column of the texts."""
    labels: Sequence[str] = ()
    """Columns of truth to read; default: all others with 2 to 64 different words, whole numbers or truth values."""
    at: str | None = None
    """Column with [first, last) characters of each text, whose tokens' states are read too."""
    encoders: Sequence[EncoderConfig] = DEMO_ENCODERS
    """The encoders. On the command line, `--encoders NAME ...` takes some of the config's, by name."""
    layers: Sequence[int] | Literal["all", "own"] = "own"
    """Hidden states to try, counted as `layer_index` of an encoder; `all`; or `own`, the one that the encoder's config
    names."""
    averages: Sequence[Sequence[int]] = ()
    """Sets of hidden states whose mean is tried too, such as [[-3, -2, -1]]; each token scaled to mean square 1 before."""
    instructions: Literal["own", "both"] = "own"
    """`both`: decoder-only LLMs are tried with the encoder's instruction and without any."""
    norms: Literal["none", "both"] = "none"
    """`both`: states are also tried with each token scaled to mean square 1, as the refiner's first norm does."""
    rows: PositiveInt = 4000
    """Texts read at most, the file's first ones."""
    batch_tokens: PositiveInt = 8192
    """Prompt tokens of one forward pass, padding included."""
    seed: int = 0
    """Decides which texts a probe is fitted on and which it is asked about."""
    device: str | None = None
    """Where the encoders run; default: the GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoders or len({encoder.name for encoder in self.encoders}) < len(self.encoders):
            raise ValueError("encoders: expected at least one, each with a name of its own")
        if any(len(average) < 2 for average in self.averages):
            raise ValueError(f"averages: expected sets of two hidden states or more, received {list(self.averages)}")

    def only(self, names: list[str]) -> ProbeConfig:
        """The same probes of some of its encoders."""
        known = {encoder.name: encoder for encoder in self.encoders}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"--encoders {' '.join(unknown)}: not in the config, which has {', '.join(known)}")
        return dataclasses.replace(self, encoders=tuple(known[name] for name in known if name in names))


@dataclass(frozen=True)
class Truth:
    """Texts, what is true of them, and which part of each is asked about."""

    texts: list[str]
    labels: dict[str, np.ndarray]
    """Name -> (N,) whole numbers, one for each different value."""
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True)
class Line:
    """Scores of one way to use an encoder, by one pooling of its tokens."""

    way: Way
    pooling: str
    readings: dict[str, Reading]

    @property
    def mean(self) -> float:
        """Accuracy, mean over labels."""
        return float(np.mean([reading.accuracy for reading in self.readings.values()]))

    @property
    def half_width(self) -> float:
        """Half of the mean's 95 % interval: over texts, whose labels are not independent."""
        texts = np.mean([reading.right for reading in self.readings.values()], axis=0)
        return float(NORMAL * texts.std(ddof=1) / len(texts) ** 0.5)

    def values(self) -> dict[str, Any]:
        """For a JSON: the way, and its figures rounded."""
        return {
            **dataclasses.asdict(self.way),
            "pooling": self.pooling,
            "mean": round(self.mean, 4),
            "half_width": round(self.half_width, 4),
            "labels": {name: _figures(reading) for name, reading in self.readings.items()},
        }

    def cells(self) -> list[str]:
        """For a table: pooling, way, mean, and the accuracy of every label."""
        mean = f"{self.mean:.3f} ± {self.half_width:.3f}"
        return [self.pooling, str(self.way), mean, *(f"{reading.accuracy:.3f}" for reading in self.readings.values())]


@dataclass
class ProbeResult(JobResult):
    """Accuracy of every way to use an encoder, the best way of every pooling first."""

    texts: str
    rows: int
    test_rows: int
    ways: list[Line] = field(default_factory=list)
    ok: bool = False

    def values(self) -> dict[str, Any]:
        """The ways with their figures rounded."""
        return {**vars(self), "ways": [line.values() for line in self.ways]}

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{self.texts}: {self.rows:,} texts, accuracy on {self.test_rows:,} that no probe was fitted on"
        if self.ways:
            commonest = [f"{reading.commonest:.3f}" for reading in self.ways[0].readings.values()]
            rows = [*(line.cells() for line in self.ways), ["", "the commonest answer", "", *commonest]]
            yield from (
                "",
                *table(["states of", "way", ">mean", *(f">{name}" for name in self.ways[0].readings)], rows),
            )


def main(config: ProbeConfig) -> ProbeResult:
    """Reads every label from every way to use the encoders, and ranks the ways.

    Raises:
        ValueError: the file lacks columns or texts, or an encoder or a layer does not exist.
    """
    truth = read_truth(config)
    split = split_rows(truth.texts, config.seed)
    if min(map(len, (split.fit, split.choose, split.test))) < FEWEST:
        raise ValueError(
            f"{config.texts}: expected texts enough for {FEWEST} to be asked about (a fifth of the different ones), received "
            f"{len(truth.texts)}, of them {len(set(truth.texts))} different"
        )
    lines = []
    for encoder in config.encoders:
        for pooled in _states(config, encoder, truth):
            lines += [
                Line(pooled.way, pooling, _readings(vectors, truth, split))
                for pooling, vectors in pooled.vectors.items()
            ]
        print(f"probe: {encoder.name} done", file=sys.stderr)
    lines.sort(key=lambda line: (line.pooling, -line.mean))
    return ProbeResult(config.texts, len(truth.texts), len(split.test), lines, ok=True)


def read_truth(config: ProbeConfig) -> Truth:
    """The file of texts. Raises ValueError where columns are missing or hold what cannot be read."""
    table = _read_table(config.texts).slice(0, config.rows)
    wanted = [config.text, *config.labels, *([config.at] if config.at else [])]
    if absent := [name for name in wanted if name not in table.column_names]:
        raise ValueError(f"{config.texts}: expected columns {', '.join(absent)}, found {', '.join(table.column_names)}")
    table = table.filter(table[config.text].is_valid())
    texts = table[config.text].to_pylist()
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{config.texts}: column {config.text!r} must hold text, it has {table[config.text].type}")
    labels = {name: _numbers(table[name]) for name in _label_columns(config, table)}
    if not labels:
        raise ValueError(
            f"{config.texts}: expected columns of truth beside {config.text!r} (2 to {MOST_CLASSES} different words, whole "
            f"numbers or truth values, no nulls), found none in {', '.join(table.column_names)}; name them with --labels"
        )
    return Truth(texts, labels, None if config.at is None else _spans(config, table))


def _read_table(path: str) -> pa.Table:
    if not Path(path).is_file():
        raise ValueError(f"texts: no file {path}")
    try:
        if Path(path).suffix == ".parquet":
            return pq.read_table(path)
        if Path(path).suffix == ".jsonl":
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
            return pa.Table.from_pylist([json.loads(line) for line in lines if line.strip()])
    except (ValueError, pa.ArrowException) as error:
        raise ValueError(f"texts: {path} cannot be read: {str(error).splitlines()[0]}") from error
    raise ValueError(f"texts: expected a .jsonl or .parquet file, received {path}")


def _label_columns(config: ProbeConfig, table: pa.Table) -> list[str]:
    if config.labels:
        for name in config.labels:
            if not _is_label(table[name]):
                raise ValueError(
                    f"{config.texts}: label {name!r} must have 2 to {MOST_CLASSES} different words, whole numbers or truth "
                    f"values and no nulls; it has {len(table[name].unique())} of {table[name].type} and "
                    f"{table[name].null_count} nulls"
                )
        return list(config.labels)
    return [name for name in table.column_names if name not in (config.text, config.at) and _is_label(table[name])]


def _is_label(column: pa.ChunkedArray) -> bool:
    kinds = (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    return (
        any(kind(column.type) for kind in kinds) and not column.null_count and 2 <= len(column.unique()) <= MOST_CLASSES
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.unique(np.array(column.to_pylist()), return_inverse=True)[1]


def _spans(config: ProbeConfig, table: pa.Table) -> list[tuple[int, int]]:
    spans = []
    for text, span in zip(table[config.text].to_pylist(), table[config.at].to_pylist()):
        if not (isinstance(span, list) and len(span) == 2 and 0 <= span[0] < span[1] <= len(text)):
            raise ValueError(
                f"{config.texts}: {config.at} must be [first, last) characters inside the text, received {span} of {text!r}"
            )
        spans.append((span[0], span[1]))
    return spans


def _states(config: ProbeConfig, encoder: EncoderConfig, truth: Truth) -> Iterator[Pooled]:
    ways = ways_of(
        encoder, config.layers, config.averages, config.instructions == "both", config.norms == "both", config.device
    )
    yield from pooled_states(encoder, ways, truth.texts, truth.spans, config.batch_tokens, config.device)


def _readings(vectors: Tensor, truth: Truth, split: Split) -> dict[str, Reading]:
    return dict(zip(truth.labels, read_labels(vectors, list(truth.labels.values()), split)))


def _figures(reading: Reading) -> dict[str, Any]:
    low, high = reading.interval()
    return {
        "accuracy": round(reading.accuracy, 4),
        "low": round(low, 4),
        "high": round(high, 4),
        "commonest": round(reading.commonest, 4),
        "classes": reading.classes,
    }


if __name__ == "__main__":
    run("probe")
