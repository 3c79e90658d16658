"""Makes the demo's store: rendered scenes, described by the demo's tiny vision-language model.

    lidit demo --store ./store
    lidit embed --store ./store --text '[caption,caption_original]'

The same command goes on after a kill, and adds scenes where it is asked for more.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from lidit.runtime.fields import JobConfig, PositiveInt
from lidit.runtime.places import settled
from lidit.store import columns
from pipelines import ingest, recaption
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.summary import Summary
from pipelines.engine.table import samples_of


@dataclass(frozen=True)
class DemoConfig(JobConfig):
    """The demo's store."""

    store: str = "./store"
    """Folder or URI of the feature store; made if it is not there."""
    scenes: PositiveInt = 1000
    """How many scenes it has in the end."""
    actors: ActorsConfig = ActorsConfig()
    """The pool of workers that describe them."""


def main(config: DemoConfig) -> Summary:
    """Ingests the scenes and describes them, as far as that is not done yet.

    Raises:
        ValueError: the store has rows that are none of the demo's.
    """
    config = settled(config)
    if not may_be_ours(config.store):
        raise ValueError(f"store: {config.store} has rows that are none of the demo's; name another folder")
    source = f"scenes:{config.scenes}"
    ingested = ingest.main(ingest.IngestConfig(store=config.store, source=source))
    print(ingested.to_text(), file=sys.stderr)
    summary = recaption.main(recaption.RecaptionConfig(store=config.store, actors=config.actors))
    summary.next = f"lidit embed --store {config.store} --text '[caption,caption_original]'"
    return summary


def may_be_ours(store: str) -> bool:
    """Tells whether the demo's scenes may go into a store: it is empty, or has scenes."""
    samples = samples_of(store)
    return not samples.exists() or columns.TRUTH in samples.open().schema.names
