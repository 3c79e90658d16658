"""The metric `scenes`: what a generated scene shows, from pixels alone, against what its prompt asked for.

For prompts of the demo world with GenEval's metadata (`tag`, `include`, `exclude`; see `demo.world.prompts`). Columns:
`scenes_correct` (GenEval's rule), `scenes_strict` (and nothing else is there), `scenes_found` (JSON: for every object asked
for, whether it is there) and `scenes_seen` (JSON: what is there). Where a prompt asks for no such thing, the last alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from lidit.store import columns
from pipelines.evaluation.intervals import estimate, mean_of_means

RULES = 1  # goes into the fingerprint: count it up where the judgement changes
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
QUARTERS = 4
CORRECT, STRICT, FOUND, SEEN = "scenes_correct", "scenes_strict", "scenes_found", "scenes_seen"


class Scenes:
    """Looks at every image; needs no model."""

    name = "scenes"
    reads = columns.PROMPT_RECORD
    fields = {CORRECT: pa.bool_(), STRICT: pa.bool_(), FOUND: pa.string(), SEEN: pa.string()}

    def __init__(self, config: Any, device: str):
        pass

    @classmethod
    def fingerprint(cls, config: Any) -> dict[str, Any]:
        """What the values depend on besides the images."""
        return {"rules": RULES}

    def __call__(self, images: Sequence[np.ndarray], texts: Sequence[str | None]) -> dict[str, list[Any]]:
        """Images (height, width, 3) uint8 and what their prompts ask for -> the columns."""
        from demo.world.judge import judge_view
        from demo.world.sight import look

        made: dict[str, list[Any]] = {name: [] for name in self.fields}
        for pixels, text in zip(images, texts):
            view, record = look(pixels), json.loads(text or "{}")
            judged = judge_view(view, record) if record.get("include") else None
            made[CORRECT].append(None if judged is None else judged.correct)
            made[STRICT].append(None if judged is None else judged.strict)
            made[FOUND].append(None if judged is None else json.dumps(judged.found))
            made[SEEN].append(json.dumps(asdict(view)))
        return made

    @classmethod
    def summarise(cls, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy of every task, GenEval's mean over its six, the same by the strict rule, and position bias if probed."""
        tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        strict: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        places: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row[CORRECT] is None:
                continue
            record = json.loads(row[columns.PROMPT_RECORD])
            task, prompt = record.get("tag", "untagged"), record["prompt"]
            tasks[task][prompt].append(row[CORRECT])
            strict[task][prompt].append(row[STRICT])
            if task == "position_bias":
                found = json.loads(row[FOUND])
                for place, there in enumerate(found):
                    places[f"quarter {place * QUARTERS // len(found) + 1}"][prompt].append(there)
        figures = {task: estimate(groups) for task, groups in sorted(tasks.items())}
        figures |= {f"{task} (strict)": estimate(groups) for task, groups in sorted(strict.items())}
        figures |= {f"position_bias, {place}": estimate(groups) for place, groups in sorted(places.items())}
        if set(TASKS) <= tasks.keys():
            figures["overall"] = mean_of_means({task: tasks[task] for task in TASKS})
            figures["overall (strict)"] = mean_of_means({task: strict[task] for task in TASKS})
        return {name: asdict(figure) for name, figure in figures.items()}
