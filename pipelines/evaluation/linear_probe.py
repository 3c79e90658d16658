"""Linear probes: what a ridge regression, in closed form, reads from vectors. Maths alone; `probe.py` brings the vectors.

Letters: N rows, E width of a vector, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.intervals import wilson

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # times the rows of the training part
SHARES = (0.6, 0.2)  # fractions of the texts to fit with and to choose the penalty with; accuracy is told on the rest


@dataclass(frozen=True)
class Split:
    """Rows for the fit, for the choice of the penalty, and for the accuracy."""

    fit: np.ndarray
    choose: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Reading:
    """Score of one label: how well it is read."""

    right: np.ndarray
    """(test rows,) bool: which of them the probe reads correctly."""
    commonest: float
    """Accuracy of always saying what is most frequent in the rows of the fit."""
    classes: int

    @property
    def accuracy(self) -> float:
        """Fraction of the test rows that the probe reads correctly."""
        return float(self.right.mean())

    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(int(self.right.sum()), len(self.right))


def split_rows(texts: Sequence[str], seed: int) -> Split:
    """Splits rows so that equal texts stay together: a probe is never asked about a text that it was fitted on."""
    distinct = sorted(set(texts))
    drawn = dict(zip(distinct, np.random.default_rng(seed).random(len(distinct)).tolist()))
    values = np.array([drawn[text] for text in texts])
    first, second = SHARES[0], sum(SHARES)
    return Split(
        *(np.flatnonzero(part) for part in (values < first, (values >= first) & (values < second), values >= second))
    )


def read_labels(vectors: Tensor, labels: Sequence[np.ndarray], split: Split) -> list[Reading]:
    """Vectors (N, E) and labels (N,) of whole numbers, several of them -> how well each is read from the vectors.

    One-hot targets, features standardised over the rows of the fit; the penalty is chosen, for each label, by accuracy on the
    rows set aside for it. One decomposition serves all labels and penalties.
    """
    x = vectors.double()
    mean, deviation = x[split.fit].mean(dim=0), x[split.fit].std(dim=0)
    x = (x - mean) / torch.where(deviation > 1e-9, deviation, torch.ones_like(deviation))
    u, s, vh = _svd(x[split.fit])  # n r, r, r E
    asked = {name: x[rows] @ vh.T for name, rows in (("choose", split.choose), ("test", split.test))}  # rows r
    return [_read(u, s, asked["choose"], asked["test"], np.asarray(label), split) for label in labels]


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, E) float64 -> u (n, r), s (r,), vh (r, E), by the smaller of the two Gram matrices: many times faster than an SVD.

    Directions whose singular value is lost in rounding are left out; the least penalty would silence them.
    """
    wide = x.shape[1] > x.shape[0]
    squares, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    kept = squares > 1e-10 * squares[-1]
    s, vectors = squares[kept].sqrt(), vectors[:, kept]
    if wide:
        return vectors, s, (x.T @ vectors / s).T
    return x @ vectors / s, s, vectors.T


def _read(u: Tensor, s: Tensor, choose: Tensor, test: Tensor, label: np.ndarray, split: Split) -> Reading:
    classes, numbers = np.unique(label[split.fit], return_inverse=True)
    targets = torch.nn.functional.one_hot(torch.from_numpy(numbers), len(classes)).double().to(u.device)
    bias = targets.mean(dim=0)  # features have mean 0 over the rows of the fit
    onto = u.T @ (targets - bias)  # r K

    def said(rows: Tensor, penalty: float) -> np.ndarray:
        scores = rows @ ((s / (s**2 + penalty * len(numbers)))[:, None] * onto) + bias  # rows K
        return classes[scores.argmax(dim=1).cpu().numpy()]

    best = max(PENALTIES, key=lambda penalty: (said(choose, penalty) == label[split.choose]).mean())
    commonest = classes[np.bincount(numbers).argmax()]
    return Reading(said(test, best) == label[split.test], float((label[split.test] == commonest).mean()), len(classes))
