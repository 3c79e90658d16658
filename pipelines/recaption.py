"""Describes images with a vision-language model: `image` -> `caption`, `caption_status`, `caption_tokens`.

Every caption passes a quality gate: empty, refused, cut off, repetitive, in the wrong script, too short, or (a sample of
images is also shown blank) written without looking. What does not pass is tried again with other seeds; what never passes
is null with its status, and training then reads `caption_original`. Equal images are described once per window.

Engines: `transformers` runs any image-text-to-text model here; `openai` asks a server of that protocol. Run again to resume.
With no arguments it describes the scenes of ./store with the demo's tiny VLM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Literal

import pyarrow as pa

from lidit.cli import run
from lidit.runtime.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveInt, to_plain
from lidit.runtime.printable import one_line
from lidit.runtime.result import filled
from lidit.store import columns
from pipelines.captioning.gate import IMAGE_IGNORED, OK, GateConfig, judge, same_text
from pipelines.captioning.image import IMAGE_RULES
from pipelines.captioning.openai_engine import EndpointCaptioner, EndpointConfig
from pipelines.captioning.request import INSTRUCTION, CaptionAnswer, CaptionEngine, CaptionRequest, prompt_text
from pipelines.captioning.transformers_engine import Captioner, VlmConfig
from pipelines.engine.stage import StageConfig, run_stage
from pipelines.engine.summary import Summary
from pipelines.engine.worker import ALSO_READS, EXAMPLES, MAY_BE_NULL, READS, Columns

WINDOW_ROWS = 256  # images in memory at a time, encoded
TYPICAL_BYTES = 400  # of a caption, for the estimate of a dry run
BLANK = "  looked     {blank_checked:,.0f} images were also shown blank: {blank_same:,.0f} captions stayed the same"
DEMO_VLM = VlmConfig("demo/vlm", dtype="fp32")


@dataclass(frozen=True)
class RecaptionConfig(StageConfig):
    """The recaption job."""

    column: str = columns.CAPTION
    """Column of the captions; `<column>_status` and `<column>_tokens` come with it. Another name keeps captions of several
    models side by side."""
    engine: Literal["transformers", "openai"] = "transformers"
    """`transformers`: the model of `vlm` runs here. `openai`: the server of `endpoint` is asked."""
    vlm: VlmConfig = DEMO_VLM
    """The model of the engine `transformers`."""
    endpoint: EndpointConfig = EndpointConfig()
    """The server of the engine `openai`."""
    instruction: str = INSTRUCTION
    """What is asked of every image."""
    hint: bool = False
    """Also show the model `caption_original`, where there is one, as a text that may be wrong."""
    max_new_tokens: PositiveInt = 256
    """Longest caption, in tokens; what is cut off there does not pass the gate."""
    image_side: PositiveInt = 1024
    """Larger images are brought to this longer side, in pixels, before the model's own processing."""
    temperature: NonNegativeFloat = 0.0
    """Temperature of the first try; 0 takes the likeliest word each time."""
    retry_temperature: NonNegativeFloat = 0.7
    """Temperature of every further try, if higher than `temperature`."""
    retries: NonNegativeInt = 2
    """Further tries, each with another seed, of a caption that does not pass the gate."""
    seed: int = 0
    """Decides what is drawn, together with image and prompt: the same row gives the same caption, whatever stands beside it."""
    gate: GateConfig = GateConfig()
    """What a caption must be like."""
    blank_share: Fraction = 0.02
    """Share of images (0 to 1) that are also shown blank: a caption that stays the same did not look."""
    batch_tokens: PositiveInt = 16384
    """Tokens of one batch of the engine `transformers`, images and room for the answers included. Lower it if a GPU runs out
    of memory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.column.isidentifier():
            raise ValueError(f"column: expected letters, digits and underscores, received {self.column!r}")
        if self.engine == "openai" and not self.endpoint.model:
            raise ValueError("endpoint.model: expected the model's name at the server (`GET /v1/models` lists them)")
        if not self.instruction.strip():
            raise ValueError("instruction: expected words, received none")

    def make_engine(self) -> CaptionEngine:
        """The engine, on this process's device. Loads no weights before it is called."""
        if self.engine == "openai":
            return EndpointCaptioner(self.endpoint, self.max_new_tokens, self.image_side)
        device = self.actors.device()
        return Captioner(self.vlm, self.max_new_tokens, self.image_side, self.batch_tokens, device)

    def fingerprint(self) -> dict[str, Any]:
        """Everything a caption depends on, as JSON-able values."""
        if self.engine == "openai":
            model: dict[str, Any] = {"model": self.endpoint.model, "revision": self.endpoint.revision}
        else:
            model = Captioner(self.vlm, self.max_new_tokens, self.image_side, self.batch_tokens, "cpu").fingerprint()
        own = ("instruction", "hint", "max_new_tokens", "image_side", "temperature", "retry_temperature", "retries")
        return {
            "engine": self.engine,
            **model,
            **{name: getattr(self, name) for name in (*own, "seed", "blank_share")},
            "gate": to_plain(self.gate),
            "image": IMAGE_RULES,
        }


class RecaptionSummary(Summary):
    """Figures of one run of the recaption job."""

    def own_lines(self) -> Iterator[str]:
        """Says how many rows have which status, the commonest first, with an example of each."""
        for status, count in self.counts_of("status_"):
            example = f', such as "{one_line(texts[0])[:160]}"' if (texts := self.examples.get(status)) else ""
            yield f"  {status:<10} {count:,.0f} rows{example}"
        yield from filled([BLANK], self.counts)


class Recaption:
    """`image` (and `caption_original` as a hint) -> `<column>`, `<column>_status`, `<column>_tokens`."""

    name = "recaption"
    summary = RecaptionSummary
    window_rows = WINDOW_ROWS

    def __init__(self, config: RecaptionConfig):
        self.config, self.engine = config, config.make_engine()
        self.engine.load()

    @classmethod
    def writes(cls, config: RecaptionConfig) -> list[pa.Field]:
        """Caption, status and length, each with the fingerprint of what made it."""
        used = (
            ("transformers", "tokenizers", "torch", "pillow")
            if config.engine == "transformers"
            else ("openai", "pillow")
        )
        metadata = {
            READS: columns.IMAGE,
            **({ALSO_READS: columns.CAPTION_ORIGINAL} if config.hint else {}),
            columns.META_STAGE: cls.name,
            columns.META_FINGERPRINT: json.dumps(config.fingerprint(), sort_keys=True),
            columns.META_VERSIONS: json.dumps({name: version(name) for name in used}),
        }
        absent = {**metadata, MAY_BE_NULL: columns.caption_status(config.column)}
        return [
            pa.field(config.column, pa.string(), metadata=absent),
            pa.field(columns.caption_status(config.column), pa.string(), metadata=metadata),
            pa.field(columns.caption_tokens(config.column), pa.int32(), metadata=absent),
        ]

    @classmethod
    def bytes_per_row(cls, config: RecaptionConfig, sample: pa.Table, fields: list[pa.Field]) -> float:
        """A typical caption; nobody knows before."""
        return float(TYPICAL_BYTES)

    def __call__(self, window: pa.RecordBatch, wanted: list[str]) -> Columns:
        """Describes every distinct image of the window; a null image has null columns."""
        images = window.column(columns.IMAGE).to_pylist()
        hints = [None] * len(images)
        if self.config.hint and columns.CAPTION_ORIGINAL in window.schema.names:
            hints = window.column(columns.CAPTION_ORIGINAL).to_pylist()
        tasks = [
            None if image is None else _Task(image, prompt_text(self.config.instruction, hint))
            for image, hint in zip(images, hints)
        ]
        distinct = {task.key: task for task in tasks if task is not None}
        before = Counter(self.engine.counts)
        self._describe(list(distinct.values()))
        found = [None if task is None else distinct[task.key] for task in tasks]
        made = self._columns(found, wanted)
        made.counts.update(Counter(self.engine.counts) - before)
        checked = [task for task in distinct.values() if task.blank_answer is not None]
        made.counts["blank_checked"] = len(checked)
        made.counts["blank_same"] = sum(task.status == IMAGE_IGNORED for task in checked)
        made.counts["tried_again"] = sum(task.tries > 1 for task in distinct.values())
        return made

    def _describe(self, tasks: list[_Task]) -> None:
        """Gives every task a status: first try for all, further ones for those that do not pass."""
        config = self.config
        for attempt in range(1 + config.retries):
            pending = [task for task in tasks if task.status != OK and task.error is None]
            if not pending:
                return
            temperature = config.temperature if attempt == 0 else max(config.temperature, config.retry_temperature)
            requests = [task.request(config.seed, attempt, temperature) for task in pending]
            looked_at = [task for task in pending if attempt == 0 and task.share < config.blank_share]
            requests += [task.request(config.seed, attempt, temperature, blank=True) for task in looked_at]
            answers = self.engine(requests)
            for task, answer in zip(looked_at, answers[len(pending) :]):
                task.blank_answer = answer.text if answer.error is None else None
            for task, answer in zip(pending, answers):
                task.take(answer, config.gate)

    def _columns(self, found: list[_Task | None], wanted: list[str]) -> Columns:
        """Tasks per row -> columns, errors, counts by status and examples of each."""
        column = self.config.column
        good = [task if task is not None and task.status == OK else None for task in found]
        statuses = [None if task is None or task.error is not None else task.status for task in found]
        arrays = {
            column: pa.array([task and task.text for task in good], pa.string()),
            columns.caption_status(column): pa.array(statuses, pa.string()),
            columns.caption_tokens(column): pa.array([task and task.tokens for task in good], pa.int32()),
        }
        made = Columns({name: arrays[name] for name in wanted})
        for row, task in enumerate(found):
            if task is not None and task.error is not None:
                made.errors[row] = f"{column}: {task.error}"
            elif task is not None:
                made.counts[f"status_{task.status}"] = made.counts.get(f"status_{task.status}", 0) + 1
                said = made.examples.setdefault(task.status, [])
                if len(said) < EXAMPLES and task.text not in said:
                    said.append(task.text)
        return made


class _Task:
    """One image to be described, and how far that is."""

    def __init__(self, image: bytes, prompt: str):
        self.image, self.prompt = image, prompt
        self.key = hashlib.sha256(hashlib.sha256(image).digest() + prompt.encode()).digest()
        self.status = ""
        self.text, self.tokens, self.tries = "", 0, 0
        self.error: str | None = None
        self.blank_answer: str | None = None

    @property
    def share(self) -> float:
        """A number from 0 to 1 that depends on image and prompt alone: which tasks belong to a sample."""
        return int.from_bytes(self.key[:8], "big") / 2**64

    def request(self, seed: int, attempt: int, temperature: float, blank: bool = False) -> CaptionRequest:
        """The request of a try; the seed follows from image, prompt, the job's seed and the try."""
        drawn = hashlib.sha256(self.key + f"{seed}:{attempt}".encode()).digest()
        return CaptionRequest(self.image, self.prompt, int.from_bytes(drawn[:8], "big"), temperature, blank)

    def take(self, answer: CaptionAnswer, gate: GateConfig) -> None:
        """Keeps what a try brought; the last one stands."""
        self.tries += 1
        self.text, self.tokens, self.error = answer.text, answer.tokens, answer.error
        self.status = judge(answer.text, answer.cut_off, gate)
        if self.status == OK and self.blank_answer is not None and same_text(self.text, self.blank_answer):
            self.status = IMAGE_IGNORED


def main(config: RecaptionConfig) -> Summary:
    """Runs the job. Actors that only ask a server take no GPU, unless the config says so."""
    if config.engine == "openai" and config.actors.num_gpus is None:
        config = dataclasses.replace(config, actors=dataclasses.replace(config.actors, num_gpus=0.0))
    return run_stage(Recaption, config)


if __name__ == "__main__":
    run("recaption")
