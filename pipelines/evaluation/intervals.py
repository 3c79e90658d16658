"""Means with confidence intervals: bootstrap over prompts, since images of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0
NORMAL = 1.96  # standard deviations that hold `LEVEL` of a normal variable


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that holds the true one in 95 of 100 cases."""

    value: float
    low: float
    high: float
    prompts: int
    images: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


Groups = Mapping[str, Sequence[float]]
"""prompt -> value of each of its images"""


def estimate(groups: Groups) -> Estimate:
    """Mean over images, with its interval.

    Raises:
        ValueError: there are no images.
    """
    means, counts = _means(groups)
    low, high = np.quantile(_resampled(means, counts, 0), _tails())
    if means.min() == means.max() and means[0] in (0.0, 1.0):
        # resampling what is all alike would say that there is no doubt at all
        low, high = wilson(round(means[0] * len(means)), len(means))
    return Estimate(float(means @ counts / counts.sum()), float(low), float(high), len(means), int(counts.sum()))


def mean_of_means(tasks: Mapping[str, Groups]) -> Estimate:
    """The mean of the tasks' means (GenEval's overall score), prompts resampled within each task."""
    parts = [_means(groups) for groups in tasks.values()]
    drawn = np.mean([_resampled(means, counts, number) for number, (means, counts) in enumerate(parts)], axis=0)
    low, high = np.quantile(drawn, _tails())
    return Estimate(
        float(np.mean([means @ counts / counts.sum() for means, counts in parts])),
        float(low),
        float(high),
        sum(len(means) for means, _ in parts),
        int(sum(counts.sum() for _, counts in parts)),
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of the share `right` of `count`."""
    share, square = right / count, NORMAL**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    half = NORMAL / (1 + square / count) * np.sqrt(share * (1 - share) / count + square / (4 * count**2))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def _means(groups: Groups) -> tuple[np.ndarray, np.ndarray]:
    """Averages each prompt's images: (mean of every prompt, number of its images)."""
    if not groups:
        raise ValueError("expected at least one image to take a mean of, received none")
    return (
        np.array([np.mean(values) for values in groups.values()], np.float64),
        np.array([len(values) for values in groups.values()], np.float64),
    )


def _resampled(means: np.ndarray, counts: np.ndarray, stream: int) -> np.ndarray:
    """Draws as many prompts with replacement, `RESAMPLES` times; returns the mean over images of each draw."""
    rows = np.random.default_rng([SEED, stream]).integers(0, len(means), (RESAMPLES, len(means)))
    return (means[rows] * counts[rows]).sum(axis=1) / counts[rows].sum(axis=1)


def _tails() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2
