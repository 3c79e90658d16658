"""Scores generated images: the sample table -> score columns, and a summary with confidence intervals.

    lidit score --store ./generated
    lidit score --store ./generated --metrics '[clip_score, fid]' --clip CLIP --fid_model CLIP --fid_reference ./store

Metrics, one file each: `scenes` (prompts of the demo world, from pixels alone), `clip_score`, `fid`. The first two add columns;
all go into `<store>/scores.json`. A stage like the others: the same command goes on after a kill. docs/score.md explains each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa

from lidit.cli import run
from lidit.images.pixels import ImageError, open_rgb
from lidit.runtime.fields import PositiveInt
from lidit.runtime.files import is_there, replace_file
from lidit.runtime.outage import outlast
from lidit.runtime.places import settled
from lidit.runtime.result import JobResult, table
from lidit.store import columns
from pipelines.engine.plugins import resolve
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.summary import Summary
from pipelines.engine.table import samples_of
from pipelines.engine.worker import ALSO_READS, MAY_BE_NULL, READS, Columns
from pipelines.evaluation.fid import fid, fid_features
from pipelines.evaluation.metric import Metric

FID = "fid"  # measures the whole of the images, and no single one
WINDOW_ROWS = 256
SCORES_FILE = "scores.json"


METRICS = {"scenes": "demo.plugins:SceneMetric", "clip_score": "pipelines.evaluation.clip:ClipScore"}


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(StageConfig):
    """The score job."""

    store: str = "./generated"
    """Folder or URI of the sample table."""
    metrics: Sequence[str] = ("scenes",)
    """What to measure: scenes, clip_score, fid; or a class of your own, package.module:Class."""
    clip: str | None = None
    """CLIP of `clip_score`: folder of transformers, or `owner/name@commit`."""
    fid_model: str | None = None
    """What makes the features of `fid`: a CLIP's folder, or a TorchScript file with its digest (`FILE.pt@sha256:DIGEST`)."""
    fid_reference: str | None = None
    """Store whose images are the real ones."""
    batch_size: PositiveInt = 32
    """Images of a model's forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if not self.metrics or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(
                f"metrics: expected some of {', '.join(METRICS)}, fid, each once, received {list(self.metrics)}"
            )
        _ = self.of_images  # so that a name that is none is told now

    @property
    def of_images(self) -> list[type[Metric]]:
        """The metrics that measure single images."""
        return [resolve(name, {**METRICS, FID: ""}, Metric, "metrics") for name in self.metrics if name != FID]


class ScoreImages:
    """`image`, and what its prompt says -> the metrics' columns."""

    name = "score"
    window_rows = WINDOW_ROWS

    def __init__(self, config: ScoreConfig):
        self.config = config
        device = config.actors.device()
        self.metrics = [metric(config, device) for metric in config.of_images]

    @classmethod
    def writes(cls, config: ScoreConfig) -> list[pa.Field]:
        """The metrics' columns."""
        versions = json.dumps({name: version(name) for name in ("torch", "transformers", "tokenizers", "pillow")})
        fields = []
        for metric in config.of_images:
            metadata = {
                READS: columns.IMAGE,
                ALSO_READS: metric.reads,
                MAY_BE_NULL: "true",
                columns.META_STAGE: cls.name,
                columns.META_FINGERPRINT: json.dumps(metric.fingerprint(config), sort_keys=True),
                columns.META_VERSIONS: versions,
            }
            fields += [pa.field(name, kind, metadata=metadata) for name, kind in metric.fields.items()]
        return fields

    @classmethod
    def bytes_per_row(cls, config: ScoreConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        """About what the longest of them, a description in JSON, takes."""
        return 512.0

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """Decodes every image once; rows without one, or with a damaged one, get nulls and a reason."""
        images: dict[int, np.ndarray] = {}
        errors: dict[int, str] = {}
        for row, data in enumerate(window.column(columns.IMAGE).to_pylist()):
            try:
                if data is not None:
                    images[row] = np.asarray(open_rgb(data))
            except ImageError as error:
                errors[row] = f"image: {error}"
        rows = list(images)
        values: dict[str, list[Any]] = {name: [None] * window.num_rows for name in wanted}
        for metric in self.metrics:
            if not rows or not set(metric.fields) & set(wanted):
                continue
            texts = self._texts(window, metric.reads)
            scores = metric([images[row] for row in rows], [texts[row] for row in rows])
            for name in set(metric.fields) & set(wanted):
                for row, value in zip(rows, scores[name]):
                    values[name][row] = value
        types = {name: kind for metric in self.metrics for name, kind in metric.fields.items()}
        arrays = {name: pa.array(values[name], types[name]) for name in wanted}
        return Columns(arrays, errors, {"images": len(rows)})

    def _texts(self, window: pa.RecordBatch, name: str) -> list[str | None]:
        present = name in window.schema.names
        return list(window.column(name).to_pylist()) if present else [None] * window.num_rows


@dataclass
class ScoreResult(JobResult):
    """Figures of every metric, and the run that made its columns."""

    store: str
    scores: dict[str, Any]
    summary: Summary | None
    ok: bool = True

    def values(self) -> dict[str, Any]:
        """The figures; the run's own values as `run`."""
        run = self.summary.values() if self.summary else None
        return {"job": "score", "store": self.store, "ok": self.ok, "scores": self.scores, "run": run}

    def lines(self) -> Iterator[str]:
        """The run's lines, or its plan, then a table of the figures."""
        yield from self.summary.to_text().splitlines() if self.summary else ()
        rows = [
            [metric, name, *_cells(figure)]
            for metric, figures in self.scores.items()
            for name, figure in figures.items()
        ]
        yield from table(["metric", "figure", ">value", "95 % interval", "of"], rows) if rows else ()


def _cells(figure: Any) -> list[str]:
    """Value, interval and what it was taken from; or words, such as a digest."""
    if isinstance(figure, dict):
        interval, of = "[{low:.3f}, {high:.3f}]", "{prompts:,} prompts, {images:,} images"
        return [f"{figure['value']:.3f}", interval.format(**figure), of.format(**figure)]
    return ["", "", figure] if isinstance(figure, str) else [f"{figure:,.3f}", "", ""]


def main(config: ScoreConfig) -> ScoreResult:
    """Brings the columns up to date, then puts the figures of all rows together.

    Raises:
        ValueError: no table, or a metric lacks what it needs.
    """
    config = settled(config)
    features = fid_features(config) if FID in config.metrics else None
    summary = run_stage(ScoreImages, config) if config.of_images else None
    if summary is not None:
        summary.next = ""
    if config.dry_run:
        return ScoreResult(config.store, {}, summary)
    scores = _summarise(config)
    if features is not None:
        device = config.actors.device()
        scores[FID] = fid(config.store, config, features, device)
    _write_down(config.store, scores)
    return ScoreResult(config.store, scores, summary)


def _write_down(store: str, scores: dict[str, Any]) -> None:
    """Puts the figures into the store, beside those of other metrics."""
    fs, root = fsspec.core.url_to_fs(store.rstrip("/"))
    path = f"{root}/{SCORES_FILE}"

    def replace() -> None:
        before = json.loads(fs.cat_file(path)) if is_there(fs, path) else {}
        replace_file(fs, path, json.dumps({**before, **scores}, indent=2).encode())

    outlast(replace, "writing the scores")


def _summarise(config: ScoreConfig) -> dict[str, Any]:
    if not config.of_images:
        return {}
    dataset = samples_of(config.store).open()
    names = [name for metric in config.of_images for name in (*metric.fields, metric.reads)]
    wanted = [name for name in dict.fromkeys([*names, columns.PROMPT]) if name in dataset.schema.names]
    rows = dataset.to_table(columns=wanted).to_pylist()
    return {metric.name: metric.summarise(rows) for metric in config.of_images}


if __name__ == "__main__":
    run("score")
