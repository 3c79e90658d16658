"""Prometheus counters of a job, exported by Ray on the node's metrics port.

    ray_lidit_rows_total, ray_lidit_errors_total, ray_lidit_tokens_total, ray_lidit_slots_total, ray_lidit_images_total

each with the label `stage`. Rates are Prometheus's to make: rows/s is `rate(ray_lidit_rows_total[5m])`, padding waste
`1 - rate(tokens) / rate(slots)`. Work that a killed process had begun, and another one did again, counts twice: these say
what the machines do; what the table holds the job's summary says. infra/grafana has a dashboard of them.
"""

from __future__ import annotations

from collections.abc import Mapping

COUNTED = {
    "rows": "Rows that a stage has worked on.",
    "errors": "Rows that have nulls and a reason instead of a stage's columns.",
    "tokens": "Tokens that LLMs have read or VLMs written, padding not counted.",
    "slots": "Token slots of the batches, padding counted.",
    "images": "Distinct images that a stage has encoded.",
}


class JobMetrics:
    """Counters of one stage. Only inside a Ray process.

    Args:
        stage: the job's name, the label of what it counts.
    """

    def __init__(self, stage: str):
        from ray.util.metrics import Counter

        self._counters = {
            name: Counter(f"lidit_{name}", text, ("stage",)).set_default_tags({"stage": stage})  # type: ignore[func-returns-value]
            for name, text in COUNTED.items()
        }

    def add(self, counts: Mapping[str, float]) -> None:
        """Adds what a piece of work has counted; other names are not exported."""
        for name, counter in self._counters.items():
            if counts.get(name, 0) > 0:
                counter.inc(counts[name])
