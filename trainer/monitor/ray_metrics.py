"""A run's figures as Prometheus gauges that Ray exports on the node's metrics port: `ray_lidit_train_<figure>{run=...}`.

Only numbers that a dashboard draws: loss, gradient norm, samples/s, tokens/s, the share of the time that ranks waited for
data, memory, MFU, skipped steps, the step itself, and the held-out loss. metrics.jsonl has all of them, at every step.
"""

from __future__ import annotations

import math
import sys
from typing import Any

EXPORTED = {
    "train": {
        "loss": "Mean loss over samples since the last line.",
        "grad_norm": "Gradient norm before clipping.",
        "samples_per_second": "Samples a second, all ranks together.",
        "tokens_per_second": "Image and prompt tokens a second, all ranks together.",
        "data_wait": "Share of the time that ranks waited for data, 0 to 1.",
        "memory_gb": "Most memory in use on rank 0, GB.",
        "mfu": "Model FLOPs as a share of the devices' peak, 0 to 1.",
        "skipped": "Steps since the last line whose loss or gradient was not finite.",
    },
    "validation": {"loss": "Held-out loss.", "ema_loss": "Held-out loss of the averaged weights."},
}
STEP = "lidit_train_step"


class RayGauges:
    """The gauges of one run, on rank 0.

    Args:
        run: name of the run, the label of its figures.
    """

    def __init__(self, run: str):
        from ray.util.metrics import Gauge

        def gauge(name: str, text: str) -> Any:
            made = Gauge(name, text, ("run",))
            made.set_default_tags({"run": run})
            return made

        self._step = gauge(STEP, "Steps done.")
        self._gauges = {
            (kind, name): gauge(f"lidit_{kind}_{name}", text)
            for kind, names in EXPORTED.items()
            for name, text in names.items()
        }

    @classmethod
    def here(cls, run: str) -> RayGauges | None:
        """The gauges where this process belongs to a Ray, else None."""
        ray = sys.modules.get("ray")
        return cls(run) if ray is not None and ray.is_initialized() else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Figures of a line; what is not a finite number, or not exported, is left out."""
        self._step.set(step)
        for name, value in values.items():
            gauge = self._gauges.get((kind, name))
            if gauge is not None and isinstance(value, (int, float)) and math.isfinite(value):
                gauge.set(value)
