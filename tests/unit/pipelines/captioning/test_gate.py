"""The quality gate: every status on captions as VLMs write them, and good captions that look a little like bad ones."""

from __future__ import annotations

import pytest

from pipelines.captioning.gate import (
    CUT_OFF,
    EMPTY,
    OK,
    REFUSAL,
    REPETITION,
    TOO_SHORT,
    WRONG_SCRIPT,
    GateConfig,
    is_refusal,
    judge,
    other_script_share,
    same_text,
    split_words,
)

pytestmark = pytest.mark.unit
GATE = GateConfig()

GOOD = [
    "A man in a grey coat walks a small brown dog along a wet street, past a row of parked cars.",
    "Two small striped red circles and one large solid blue star on a white background.",
    'The sign above the door says "Sorry, we\'re closed". Two bicycles lean on the wall below it.',
    "The image shows no people, only an empty beach at dusk; unfortunately framed but sharp.",
    'An old poster reads "I can\'t see you", in red letters on black.',
    "A red apple, a green apple, a yellow apple and a red pear lie on a table.",
    "Row upon row of red tulips, row upon row of yellow tulips, and behind them a windmill with white sails.",
    "Café au lait in a Türkiye-made cup — naïve décor, 35 °C in the shade.",
]
REFUSED = [
    "I'm sorry, but I can't describe this image.",
    "I’m sorry, I cannot help with that.",
    "Sorry, I cannot describe this image: it shows no scene that I know.",
    "I am unable to view images.",
    "Unfortunately, I cannot see the picture you refer to.",
    "As an AI language model, I do not have eyes.",
    "I apologize, but no picture came through.",
    "No image was provided.",
    "There is no image attached to your message.",
    "Please provide the image you would like me to describe.",
    "**I can't assist with identifying people in photos.**",
    "I don't have access to the image.",
    "抱歉，我无法描述这张图片。",
]
LOOPS = [
    "a red circle a red circle a red circle a red circle a red circle",
    "The dog is brown brown brown brown brown.",
    "There is a table in the room. There is a chair. There is a table in the room. A lamp. There is a table in the room.",
    "A house with a door, with a door, with a door, with a door and a window.",
    " ".join(
        f"on the left is a {word} and on the right is a tree" for word in ("bush", "car", "dog", "man", "bush", "car")
    ),
]


@pytest.mark.parametrize("text", GOOD)
def test_good_captions_pass(text: str) -> None:
    assert judge(text, False, GATE) == OK


@pytest.mark.parametrize("text", REFUSED)
def test_refusals(text: str) -> None:
    assert judge(text, False, GateConfig(scripts=())) == REFUSAL


@pytest.mark.parametrize("text", LOOPS)
def test_loops(text: str) -> None:
    assert judge(text, False, GATE) == REPETITION


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_empty(text: str) -> None:
    assert judge(text, False, GATE) == EMPTY
    assert judge(text, True, GATE) == EMPTY


def test_cut_off() -> None:
    assert judge(GOOD[0], True, GATE) == CUT_OFF


@pytest.mark.parametrize("text", ["A dog.", "red", "A, B, C!"])
def test_too_short(text: str) -> None:
    assert judge(text, False, GATE) == TOO_SHORT
    assert judge(text, False, GateConfig(min_words=1)) == OK


@pytest.mark.parametrize(
    "text",
    [
        "一只棕色的小狗在湿漉漉的街道上散步。",
        "Маленькая собака идёт по мокрой улице.",
        "12345 67890 !!!",
        "���� �� ���� a b",
    ],
)
def test_wrong_script(text: str) -> None:
    assert judge(text, False, GATE) == WRONG_SCRIPT


def test_scripts_are_a_choice() -> None:
    chinese = "一只棕色的小狗在湿漉漉的街道上散步。"
    assert judge(chinese, False, GateConfig(scripts=("cjk", "latin"))) == OK
    assert judge(chinese, False, GateConfig(scripts=())) == OK
    assert judge(GOOD[0], False, GateConfig(scripts=("cjk",))) == WRONG_SCRIPT
    mixed = "A shop sign reads 茶 above a wooden door with two red lanterns."
    assert judge(mixed, False, GATE) == OK and 0 < other_script_share(mixed, ("latin",)) < 0.05


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert split_words("A red Circle, isn't it?") == ["a", "red", "circle", "isn", "t", "it"]
    assert len(split_words("一只棕色的小狗")) == 7
    assert judge("小狗", False, GateConfig(scripts=("cjk",))) == TOO_SHORT


def test_a_refusal_is_one_at_the_start_only() -> None:
    assert is_refusal("- I cannot describe it") and not is_refusal("He says: I cannot describe it")
    assert not is_refusal("Sorryful eyes of a dog"), "a word that begins like one"


def test_same_text() -> None:
    assert same_text("A red circle.", "a  red circle") and not same_text("A red circle.", "A blue circle.")
    assert same_text("", "...")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_words": 0}, "gate.min_words: expected a whole number >= 1"),
        ({"max_other_script": 1.5}, "gate.max_other_script: expected a number >= 0 and <= 1"),
        ({"scripts": ("Latin",)}, "expected names such as latin"),
    ],
)
def test_wrong_config(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateConfig(**change)
