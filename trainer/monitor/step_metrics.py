"""Per-step metrics, all-reduced once before `optimizer.step()`.

Loss and gradient norm decide whether the step is taken at all: a NaN on any rank is a NaN in the sum, so all ranks see it and
decide alike. The same message carries what else the metrics need, and whether some rank was told to stop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lidit.diffusion import BINS, timestep_bins
from trainer.data.assemble import Batch
from trainer.engine.ranks import Ranks

_SCALARS = ("loss", "samples", "bad_losses", "squared_norm", "wait_seconds", "stop", "terminated", "draining")


@dataclass(frozen=True)
class Totals:
    """Sums over all ranks and microbatches of a step."""

    loss: float
    """Sum of the samples' losses."""
    samples: int
    """Number of samples."""
    bad_losses: int
    """Number of samples whose loss is not finite."""
    grad_norm: float
    """Norm of the gradient of the mean loss, before clipping."""
    wait_seconds: float
    """Seconds that ranks waited for data, summed over ranks."""
    stop: bool
    """Somebody asked the run to stop."""
    terminated: int
    """Number of ranks that got SIGTERM."""
    draining: bool
    """Ray is about to take a node away."""
    prompt_tokens: list[float]
    """Real prompt tokens, by encoder."""
    bins: np.ndarray
    """(2, BINS): sums of losses and samples by timestep."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite, so that the optimizer may step."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepMetrics:
    """This rank's sums of a step, on its device."""

    def __init__(self, encoders: Sequence[str], device: torch.device):
        self.encoders = list(encoders)
        self.values = torch.zeros(len(_SCALARS) + len(self.encoders) + 2 * BINS, dtype=torch.float64, device=device)

    def add(self, batch: Batch, loss: Tensor) -> None:
        """Adds a microbatch and its losses (B,)."""
        assert batch.timestep is not None
        loss = loss.detach().double()
        self._scalar("loss").add_(loss.sum())
        self._scalar("samples").add_(len(loss))
        self._scalar("bad_losses").add_((~loss.isfinite()).sum())
        for place, name in enumerate(self.encoders, start=len(_SCALARS)):
            self.values[place] += batch.prompt_mask[name].sum()
        self.values[-2 * BINS :] += timestep_bins(loss, batch.timestep).flatten()

    def all_reduce(
        self, ranks: Ranks, squared_norm: Tensor, wait_seconds: float, stop: bool, terminated: bool, draining: bool
    ) -> Totals:
        """Sums the metrics over all ranks: the one time in a step that the host waits for the device.

        Args:
            squared_norm: of this rank's part of the gradient.
        """
        self._scalar("squared_norm").copy_(squared_norm)
        own = (("wait_seconds", wait_seconds), ("stop", stop), ("terminated", terminated), ("draining", draining))
        for name, value in own:
            self._scalar(name).fill_(float(value))
        summed = ranks.sum(self.values).tolist()
        scalars = dict(zip(_SCALARS, summed))
        norm = math.sqrt(scalars["squared_norm"]) if scalars["squared_norm"] >= 0 else math.nan
        return Totals(
            loss=scalars["loss"],
            samples=round(scalars["samples"]),
            bad_losses=round(scalars["bad_losses"]),
            grad_norm=norm,
            wait_seconds=scalars["wait_seconds"],
            stop=scalars["stop"] > 0,
            terminated=round(scalars["terminated"]),
            draining=scalars["draining"] > 0,
            prompt_tokens=summed[len(_SCALARS) : -2 * BINS],
            bins=np.array(summed[-2 * BINS :]).reshape(2, BINS),
        )

    def _scalar(self, name: str) -> Tensor:
        return self.values[_SCALARS.index(name)]
