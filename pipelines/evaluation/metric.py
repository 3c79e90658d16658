"""Metrics of the score job: your own is a subclass, named `package.module:Class` in `--metrics`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


class Metric(ABC):
    """A measure of single images."""

    name: str
    reads: str
    """Column that the metric reads in addition to the image."""
    fields: dict[str, pa.DataType]
    """Columns that the metric adds, and their types."""

    @abstractmethod
    def __init__(self, config: Any, device: str):
        """Loads the metric's model, if it has one."""

    @classmethod
    @abstractmethod
    def fingerprint(cls, config: Any) -> dict[str, Any]:
        """Names what the values depend on besides image and text. Raises ValueError where the config lacks something."""

    @abstractmethod
    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str | None]) -> dict[str, list[Any]]:
        """Images (height, width, 3) uint8 and the column `reads` -> the columns."""

    @classmethod
    @abstractmethod
    def summarise(cls, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The columns, with `prompt` and `prompt_record`, of all rows -> figures by name."""
