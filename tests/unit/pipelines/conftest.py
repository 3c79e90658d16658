"""A tiny LLM and a table of prompts, for tests that drive a stage without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from pipelines.sources import open_source
from pipelines.table import ColumnFileWriter, Table


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """The models are so small that threads only wait for each other."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def fill(tmp_path: Path) -> Any:
    """`fill([[prompt, ...], ...])`: a store in `tmp_path` with one fragment per list; returns its samples table."""

    def make(fragments: list[list[str | None]]) -> Table:
        path = tmp_path / "prompts.txt"
        path.write_text("x")
        source = open_source(f"prompts:{path}")
        table = Table(str(tmp_path / "store" / "samples.lance"))
        table.create(source.schema)
        for number, prompts in enumerate(fragments):
            writer = ColumnFileWriter(table.uri, source.schema, "ingest-1")
            items = [{"image_id": f"{number}-{row}", "text": prompt} for row, prompt in enumerate(prompts)]
            writer.write(source.batch(items))
            table.append([writer.finish(table.open())])
        return table

    return make
