"""The recaption stage called as a worker calls it: gate, further tries, blank images, one description per image; no Ray.

The engine here says what a test wants to hear; the real ones are tested in test_captioner.py, test_endpoint.py and in
tests/integration.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from lidit.store import columns
from pipelines.captioning.gate import GateConfig
from pipelines.captioning.openai_engine import EndpointConfig
from pipelines.captioning.request import CaptionAnswer, CaptionRequest
from pipelines.captioning.transformers_engine import VlmConfig
from pipelines.engine.pool import ActorsConfig
from pipelines.engine.worker import ALSO_READS, MAY_BE_NULL, READS
from pipelines.recaption import Recaption, RecaptionConfig

pytestmark = pytest.mark.unit

NAMES = ["caption", "caption_status", "caption_tokens"]
GOOD = "A red circle on a white background."


class Says:
    """An engine that answers as `speak(request, number of earlier requests for the image)` says, and keeps what it heard."""

    def __init__(self, speak: Callable[[CaptionRequest, int], str | CaptionAnswer]):
        self.speak, self.heard, self.counts = speak, [], Counter()
        self.calls: list[int] = []

    def load(self) -> None:
        """Nothing to do."""

    def __call__(self, requests: list[CaptionRequest]) -> list[CaptionAnswer]:
        answers = []
        self.calls.append(len(requests))
        for request in requests:
            earlier = sum(r.image == request.image and r.prompt == request.prompt for r in self.heard if not r.blank)
            said = self.speak(request, earlier)
            answers.append(CaptionAnswer(said, len(said.split())) if isinstance(said, str) else said)
            self.heard.append(request)
            self.counts["tokens"] += answers[-1].tokens
        return answers


def stage(speak: Callable[[CaptionRequest, int], Any], **changes: Any) -> tuple[Recaption, Says]:
    engine = Says(speak)

    class Config(RecaptionConfig):
        def make_engine(self) -> Any:
            return engine

    return Recaption(Config(**{"blank_share": 0.0, **changes})), engine


def window(images: list[bytes | None], hints: list[str | None] | None = None) -> pa.RecordBatch:
    arrays = {"image": pa.array(images, pa.large_binary())}
    if hints is not None:
        arrays["caption_original"] = pa.array(hints, pa.string())
    return pa.record_batch(arrays)


def rows(made: Any, names: list[str] = NAMES) -> list[tuple[Any, ...]]:
    return list(zip(*(made.arrays[name].to_pylist() for name in names)))


def test_what_passes_is_kept_and_what_does_not_is_null_with_its_status() -> None:
    said = {
        b"1": GOOD,
        b"2": "",
        b"3": "Sorry, I cannot see it.",
        b"4": "a b " * 9,
        b"5": "一只棕色的小狗",
        b"6": "Red.",
    }
    job, engine = stage(lambda request, _: said.get(request.image, CaptionAnswer("A red", 2, cut_off=True)), retries=0)
    made = job(window([*said, b"7", None]), NAMES)
    statuses = ["ok", "empty", "refusal", "repetition", "wrong_script", "too_short", "cut_off", None]
    assert [row[1] for row in rows(made)] == statuses
    assert rows(made)[0] == (GOOD, "ok", 7)
    assert all(row[0] is None and row[2] is None for row in rows(made)[1:]) and made.errors == {}
    assert {name: count for name, count in made.counts.items() if name.startswith("status_")} == {
        f"status_{status}": 1 for status in statuses if status
    }
    assert made.examples["refusal"] == ["Sorry, I cannot see it."] and made.examples["ok"] == [GOOD]
    assert made.counts["tokens"] == sum(answer for answer in [7, 0, 5, 18, 1, 1, 2])
    assert engine.calls == [7]


def test_what_fails_is_tried_again_with_another_seed_until_it_passes() -> None:
    passes_at = {b"now": 0, b"second": 1, b"third": 2, b"never": 99}
    job, engine = stage(
        lambda request, tries: GOOD if tries >= passes_at[request.image] else "Sorry, no.",
        retries=2,
        retry_temperature=0.6,
    )
    made = job(window(list(passes_at)), NAMES)
    assert [row[1] for row in rows(made)] == ["ok", "ok", "ok", "refusal"]
    assert engine.calls == [4, 3, 2]
    heard = [request for request in engine.heard if request.image == b"never"]
    assert [request.temperature for request in heard] == [0.0, 0.6, 0.6]
    assert len({request.seed for request in heard}) == 3
    assert made.counts["tried_again"] == 3 and made.counts["status_ok"] == 3


def test_a_sampled_first_try_keeps_its_temperature() -> None:
    job, engine = stage(lambda *_: "", temperature=1.1, retries=1)
    job(window([b"x"]), NAMES)
    assert [request.temperature for request in engine.heard] == [1.1, 1.1]


def test_an_image_that_cannot_be_described_is_an_error_and_not_tried_again() -> None:
    job, engine = stage(lambda request, _: CaptionAnswer(error="damaged JPEG") if request.image == b"bad" else GOOD)
    made = job(window([b"bad", b"good", b"bad"]), NAMES)
    assert made.errors == {0: "caption: damaged JPEG", 2: "caption: damaged JPEG"}
    assert rows(made) == [(None, None, None), (GOOD, "ok", 7), (None, None, None)]
    assert engine.calls == [2] and made.counts["status_ok"] == 1


def test_equal_images_are_described_once_and_hints_tell_them_apart() -> None:
    job, engine = stage(lambda *_: GOOD)
    made = job(window([b"x", b"y", b"x", b"x"], ["a", "b", "c", None]), NAMES)
    assert engine.calls == [2] and [row[1] for row in rows(made)] == ["ok"] * 4
    assert made.counts["status_ok"] == 4, "counted by row"
    job, engine = stage(lambda *_: GOOD, hint=True)
    job(window([b"x", b"y", b"x", b"x", b"x"], ["a", "b", "c", None, "a"]), NAMES)
    assert engine.calls == [4]
    assert sum("which may be wrong: a" in request.prompt for request in engine.heard) == 1
    assert sum(request.prompt == job.config.instruction for request in engine.heard) == 1


def test_seeds_belong_to_image_and_prompt() -> None:
    job, engine = stage(lambda *_: "", retries=1)
    job(window([b"x", b"y", b"z"]), NAMES)
    job(window([b"z", b"w"]), NAMES)
    seeds = {}
    for request in engine.heard:
        seeds.setdefault(request.image, []).append(request.seed)
    assert seeds[b"z"][:2] == seeds[b"z"][2:] and len({seed for of_one in seeds.values() for seed in of_one}) == 8
    other, engine_of_other = stage(lambda *_: "", retries=1, seed=1)
    other(window([b"x"]), NAMES)
    assert {request.seed for request in engine_of_other.heard}.isdisjoint(seeds[b"x"])


def test_a_caption_that_does_not_need_the_image_is_flagged() -> None:
    def speak(request: CaptionRequest, tries: int) -> str:
        if request.image == b"blind":
            return "A  RED circle on a white background" if request.blank else GOOD
        if request.image == b"lazy" and tries == 0:
            return GOOD
        return GOOD if request.blank else f"A {request.image.decode()} in the second look."

    job, engine = stage(speak, blank_share=1.0, retries=1)
    made = job(window([b"blind", b"lazy", b"dog", None]), NAMES)
    assert [row[1] for row in rows(made)] == ["image_ignored", "ok", "ok", None]
    assert rows(made)[0][0] is None and rows(made)[1][0] == "A lazy in the second look."
    assert made.counts["blank_checked"] == 3 and made.counts["blank_same"] == 1
    assert engine.calls == [6, 2], "blank images are shown once"


def test_the_sample_shown_blank_is_the_share_asked_for_and_always_the_same() -> None:
    job, engine = stage(lambda request, _: "It is all grey in here." if request.blank else GOOD, blank_share=0.2)
    images = [b"%d" % number for number in range(500)]
    assert 70 < job(window(images), NAMES).counts["blank_checked"] < 130
    blank = {request.image for request in engine.heard if request.blank}
    again, engine = stage(lambda *_: GOOD, blank_share=0.2)
    again(window(images[:50]), NAMES)
    assert {request.image for request in engine.heard if request.blank} == blank & set(images[:50])


def test_only_the_columns_that_are_wanted() -> None:
    job, _ = stage(lambda *_: GOOD)
    assert set(job(window([b"x"]), ["caption_status"]).arrays) == {"caption_status"}


def test_another_column_name() -> None:
    job, _ = stage(
        lambda request, _: CaptionAnswer(error="bad") if request.image == b"bad" else GOOD, column="caption_b"
    )
    made = job(window([b"x", b"bad"]), ["caption_b", "caption_b_status", "caption_b_tokens"])
    assert made.arrays["caption_b"].to_pylist() == [GOOD, None] and made.errors == {1: "caption_b: bad"}


# -- fields and config ------------------------------------------------------------------------------------------------

SERVER = {"engine": "openai", "endpoint": EndpointConfig(model="vlm", revision="v1")}


def metadata(config: RecaptionConfig, position: int = 0) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in Recaption.writes(config)[position].metadata.items()}


def test_fields() -> None:
    fields = Recaption.writes(RecaptionConfig(**SERVER))
    assert [(f.name, f.type) for f in fields] == [
        ("caption", pa.string()), ("caption_status", pa.string()), ("caption_tokens", pa.int32()),
    ]  # fmt: skip
    assert all(f.metadata[READS.encode()] == b"image" for f in fields)
    assert [MAY_BE_NULL.encode() in f.metadata for f in fields] == [True, False, True]
    assert ALSO_READS not in metadata(RecaptionConfig(**SERVER))
    assert metadata(RecaptionConfig(**SERVER, hint=True))[ALSO_READS] == "caption_original"
    assert "openai" in json.loads(metadata(RecaptionConfig(**SERVER))[columns.META_VERSIONS])


def test_the_fingerprint_changes_with_what_captions_depend_on_and_with_nothing_else() -> None:
    base = RecaptionConfig(**SERVER)
    print_of = lambda config: metadata(config)[columns.META_FINGERPRINT]  # noqa: E731
    endpoint = SERVER["endpoint"]
    for changes in (
        {"instruction": "What is it?"}, {"hint": True}, {"max_new_tokens": 9}, {"image_side": 64}, {"temperature": 0.1},
        {"retries": 0}, {"retry_temperature": 1.0}, {"seed": 1}, {"gate": GateConfig(min_words=9)}, {"blank_share": 0.5},
        {"endpoint": dataclasses.replace(endpoint, model="other")}, {"endpoint": dataclasses.replace(endpoint, revision="v2")},
    ):  # fmt: skip
        assert print_of(dataclasses.replace(base, **changes)) != print_of(base), changes
    for changes in (
        {"endpoint": dataclasses.replace(endpoint, url="http://elsewhere:1/v1", concurrency=1, tries=9)},
        {"batch_tokens": 1}, {"store": "s3://elsewhere"}, {"actors": ActorsConfig(max=7)}, {"max_error_rate": 1.0},
    ):  # fmt: skip
        assert print_of(dataclasses.replace(base, **changes)) == print_of(base), changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "my caption"}, "column: expected letters"),
        ({"instruction": " "}, "instruction: expected words"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected a whole number >= 1"),
        ({"engine": "openai"}, "endpoint.model: expected the model's name"),
        ({"retries": -1}, "expected a (whole )?number >= 0"),
        ({"temperature": -0.1}, "expected a (whole )?number >= 0"),
        ({"blank_share": 2.0}, "blank_share: expected a number >= 0 and <= 1"),
        ({"max_error_rate": 7.0}, "max_error_rate"),
    ],
)
def test_wrong_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecaptionConfig(**change)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="nothing is there"):
        Recaption.writes(RecaptionConfig(vlm=VlmConfig("/nowhere/vlm")))
