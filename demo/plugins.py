"""The demo world as the jobs take it: the source `scenes:N` of `lidit ingest`, and the metric `scenes` of `lidit score`.

Both are plugins like anybody's: a subclass of `Listed` or `Sharded`, and one of `Metric`, named by import strings.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from demo.world import scenes
from demo.world.judge import judge_view
from demo.world.sight import look
from lidit.store import columns
from pipelines.evaluation.intervals import estimate, mean_of_means
from pipelines.evaluation.metric import Metric
from pipelines.sources.base import IMAGE_FIELDS, Item, Listed, Record

RULES = 1  # goes into the fingerprint: count it up where the judgement changes
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
QUARTERS = 4
CORRECT, STRICT, FOUND, SEEN = "scenes_correct", "scenes_strict", "scenes_found", "scenes_seen"


class SceneSource(Listed):
    """Renders scene i of the demo world from seed i. What is true of it, a dense caption included, is its `truth`."""

    fields = [*IMAGE_FIELDS, pa.field(columns.TRUTH, pa.string())]

    def __init__(self, argument: str):
        if not argument.isdecimal() or int(argument) < 1:
            raise ValueError(f"source scenes:N: expected a number of scenes, received {argument!r}")
        self.count = int(argument)

    def items(self) -> list[Item]:
        return [{"image_id": f"scene-{seed:08d}", "seed": seed} for seed in range(self.count)]

    def record(self, item: Item) -> Record:
        example = scenes.example(item["seed"], *scenes.image_size(item["seed"]))
        values = {columns.TRUTH: example["truth"]}
        return Record(item["image_id"], example["image_bytes"], example["caption_original"], values=values)


class SceneMetric(Metric):
    """Judges what a generated scene shows, from pixels alone, against what its prompt asked for; needs no model.

    For prompts of the demo world with GenEval's metadata (`tag`, `include`, `exclude`; see `demo.world.prompts`). Columns:
    `scenes_correct` (GenEval's rule), `scenes_strict` (and nothing else is there), `scenes_found` (JSON: for every object
    asked for, whether it is there) and `scenes_seen` (JSON: what is there). Where a prompt asks for no such thing, the last
    alone.
    """

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
