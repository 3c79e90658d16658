"""The ingest job's config: `lidit ingest --help` shows these words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lidit.runtime.fields import Fraction, JobConfig, PositiveInt
from pipelines.engine.pool import ActorsConfig
from pipelines.ingestion.filters import FiltersConfig
from pipelines.sources.base import ColumnsConfig


@dataclass(frozen=True)
class IngestConfig(JobConfig):
    """The ingest job."""

    source: str
    """Where rows come from: scenes:N, folder:URI, coco:URI, prompts:FILE, webdataset:URI, parquet:URI, lance:URI, hf:PATH or
    img2dataset:PATH; or a class of your own, package.module:Class?argument. Credentials of object stores come from the
    environment."""
    store: str = "./store"
    """Folder or URI of the feature store; made if it is not there."""
    rows_per_fragment: PositiveInt = 1024
    """Rows of a fragment, the unit of work of every later stage; the last one of a shard may have fewer."""
    actors: ActorsConfig = ActorsConfig(num_gpus=0.0)
    """The pool of workers that read, look at images and write; `num_cpus` of each decode at the same time."""
    columns: ColumnsConfig = ColumnsConfig()
    """Which column or file holds what; for webdataset, parquet, lance, hf and img2dataset."""
    filters: FiltersConfig = FiltersConfig()
    """Which rows are wanted; all by default."""
    check: Literal["decode", "header"] = "decode"
    """How an image is looked at. `decode`: decoded once, so that damage is found here. `header`: only its header and that its
    end is there, many times faster; damage inside is then the next stage's to find."""
    max_error_rate: Fraction = 0.5
    """Share of rows that may be damaged (0 to 1); above it the job stops, for then the columns are probably named wrongly."""
    compare: Literal["auto", "quick", "all"] = "auto"
    """How rows that are in the table are held against a folder or a COCO set. `quick`: captions (of those in files of their
    own, 100,000 at most), sizes of images where they are known, images of 32 rows and where the size is another one. `all`:
    caption and image of every row, which reads the whole source. `auto`: all with `update`, else quick."""
    update: bool = False
    """Give rows whose source has another caption or image now that one, under the same `image_id` (`folder:`, `coco:`)."""
    reread: bool = False
    """Read shards again that were taken in whole by an earlier run; rows that were deleted from the table since come back."""
    dry_run: bool = False
    """Print the plan (shards, rows, bytes, workers) and exit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.filters.min_score is not None and self.columns.score is None:
            raise ValueError("filters.min_score: expected with --columns.score, which says what to hold it against")

    @property
    def compares_all(self) -> bool:
        """Tells whether every row that is there is compared with its source."""
        return self.compare == "all" or (self.compare == "auto" and self.update)
