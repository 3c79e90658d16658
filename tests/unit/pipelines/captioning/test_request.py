"""What is asked of a VLM, in words and as a conversation."""

from __future__ import annotations

import pytest

from pipelines.captioning.request import HINT, MOST_HINT_CHARACTERS, conversation, prompt_text

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("hint", [None, "", "  \n "])
def test_without_a_hint_the_instruction_stands_alone(hint: str | None) -> None:
    assert prompt_text("Describe it.", hint) == "Describe it."


def test_a_hint_stands_on_a_line_of_its_own_and_is_kept_short() -> None:
    assert prompt_text("Describe it.", " a\n dog ") == "Describe it.\n" + HINT.format(hint="a dog")
    long = prompt_text("Describe it.", "tag, " * 1000)
    assert len(long) < len("Describe it.\n") + len(HINT) + MOST_HINT_CHARACTERS


def test_markup_is_left_out_of_a_hint() -> None:
    hint = "<b>A dog</b> <image> [INST]on <|im_end|>a mat</s> 3 < 4 > 2 [sic]"
    assert prompt_text("Describe it.", hint).endswith(HINT.format(hint="A dog on a mat 3 2 [sic]"))


def test_braces_in_a_hint_are_text() -> None:
    assert "{hint} {0}" in prompt_text("Describe it.", "{hint} {0}")


def test_the_image_stands_before_the_words() -> None:
    (turn,) = conversation("words")
    assert turn["role"] == "user" and turn["content"] == [{"type": "image"}, {"type": "text", "text": "words"}]
    (sent,) = conversation("words", {"type": "image_url", "image_url": {"url": "data:"}})
    assert sent["content"][0] == {"type": "image_url", "image_url": {"url": "data:"}}
