"""Shards that end the process which reads them: the job sets them aside, takes all others, and tries them again."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from lidit.store import columns
from pipelines import ingest
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.table import Table
from pipelines.ingest import IngestConfig
from pipelines.ingestion import worker as ingest_worker
from pipelines.sources.base import Piece, Record

pytestmark = [pytest.mark.faults]

SHARDS, ROWS, KILLS = 6, 5, 3  # rows of a shard, and before which of them a process dies


class FragileReader(ingest_worker.IngestWorker):
    """Its process dies within every shard called `kills`."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        read = self.source.read  # type: ignore[attr-defined]

        def fatal(piece: Piece) -> Iterator[Record]:
            for number, record in enumerate(read(piece)):
                if number == KILLS and "kills" in piece["place"]:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield record

        self.source.read = fatal  # type: ignore[attr-defined]


@pytest.fixture
def shards(tmp_path: Path, photo: Callable[..., bytes]) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(SHARDS):
        images = [photo(shard * ROWS + row) for row in range(ROWS)]
        captions = [f"{shard}-{row}" for row in range(ROWS)]
        name = f"{shard}-kills" if shard in (1, 4) else f"{shard}"
        pq.write_table(pa.table({"image": images, "caption": captions}), folder / f"{name}.parquet")
    return folder


def test_shards_that_kill_their_readers(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one unit: the rows before the place are taken, the others of the unit too, and nothing is there twice."""
    config = IngestConfig(f"parquet:{shards}", str(tmp_path / "store"), actors=ActorsConfig(max=1, num_gpus=0.0))
    with monkeypatch.context() as patch:
        patch.setattr(ingest, "IngestWorker", FragileReader)
        summary = ingest.main(config)
    places = ["shards/1-kills.parquet:0", "shards/4-kills.parquet:0"]
    assert (summary.ok, summary.errors, summary.counts["unread"], summary.examples["unread"]) == (True, 2, 2, places)
    assert summary.rows == SHARDS * ROWS - 2 * (ROWS - KILLS) + 2
    again = ingest.main(config)
    ray.shutdown()
    assert (again.ok, again.errors, again.counts["shards_done_before"]) == (True, 0, SHARDS - 2)
    assert again.counts["already_there"] == 2 * KILLS and again.rows == 2 * (ROWS - KILLS)
    rows = Table(f"{config.store}/{columns.SAMPLES_TABLE}").open().to_table().to_pylist()
    captions = sorted(row["caption_original"] for row in rows if row["caption_original"])
    assert captions == [f"{shard}-{row}" for shard in range(SHARDS) for row in range(ROWS)]
    told = {row["source"]: row["ingest_error"] for row in rows if row["ingest_error"]}
    assert told == {f"{place}#unread": ingest_worker.DIED_READING for place in places}
