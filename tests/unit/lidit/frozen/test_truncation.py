"""Beginnings of very long texts: the tokens that are read are those of the whole, and little is tokenised."""

import random
import time

import pytest
import transformers

from lidit.frozen.truncation import CHARACTERS_PER_TOKEN, LONGER, MARGIN, beginnings

pytestmark = pytest.mark.unit

TOKENS = 8
LIMIT = (TOKENS + MARGIN) * CHARACTERS_PER_TOKEN
PIECES = [
    "a red bench",
    " ",
    "\n",
    "  \t",
    "一只狗",
    "\U0001f415",
    "é",
    "e\u0301",
    "=",
    "0123456789",
    "don't",
    "ﬁne",
    ".",
]


class Counting:
    """A tokenizer that counts the characters that it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.tokenizer(text, **options)


@pytest.fixture(scope="module")
def real(data):
    folders = sorted(folder for folder in (data / "tokenizers").iterdir() if folder.is_dir())
    return {folder.name: transformers.AutoTokenizer.from_pretrained(folder) for folder in folders}


def first_tokens(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:TOKENS]


def hard_texts():
    draw = random.Random(0)
    yield from (piece * (3 * LIMIT // len(piece)) for piece in PIECES)
    yield " " * (2 * LIMIT) + "a red bench"
    yield "a " + "\n" * (LIMIT + 1) + "red bench"
    yield "".join(f"{' ' * 500}word{number}" for number in range(40))
    for _ in range(60):
        runs = (draw.choice(PIECES) * draw.choice((1, 1, 2, 7, 300)) for _ in range(4000))
        yield "".join(runs)[: LIMIT + draw.randrange(1, 20000)]


def test_the_tokens_that_are_read_are_those_of_the_whole_text(real):
    for name, tokenizer in real.items():
        for text in hard_texts():
            (begin,) = beginnings(tokenizer, [text], TOKENS)
            assert text.startswith(begin)
            assert first_tokens(tokenizer, begin) == first_tokens(tokenizer, text), (name, text[:40])


def test_texts_of_usual_length_stay_whole_and_cost_nothing(tokenizer):
    counting = Counting(tokenizer)
    texts = ["", "a red bench", "x" * LIMIT]
    assert beginnings(counting, texts, TOKENS) == texts and counting.characters == 0


def test_a_megabyte_is_not_tokenised(real):
    for name, tokenizer in real.items():
        for text in ("a red bench " * 90_000, "x" * 1_000_000, "é" * 1_000_000):
            counting, begun = Counting(tokenizer), time.monotonic()
            (begin,) = beginnings(counting, [text], TOKENS)
            assert max(len(begin), counting.characters) <= LIMIT * LONGER * 2, (name, text[:20])
            assert time.monotonic() - begun < 5, name


@pytest.mark.parametrize("run", [" ", "\n", "狗"])
def test_runs_that_are_one_token_or_none_are_passed_over(real, run):
    """T5's tokenizer takes a run of spaces for one, and of characters that it does not know for one token."""
    tokenizer = real["t5"]
    assert len(tokenizer(run * 100, add_special_tokens=False)["input_ids"]) <= 2
    text = run * (LIMIT * 2) + "a red bench on the left of a table " * LIMIT
    (begin,) = beginnings(tokenizer, [text], TOKENS)
    assert len(begin) < len(text) and first_tokens(tokenizer, begin) == first_tokens(tokenizer, text)
