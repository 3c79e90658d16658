"""Texts for the demo's language models: the split, and answers that follow from captions."""

import numpy as np
import pytest

from demo.models.packing import in_answer, packed_batch
from demo.models.vocabulary import VOCABULARIES, train_tokenizer, wrap
from demo.world.captions import describe, short_name
from demo.world.language import (
    HELD_OUT_SEEDS,
    INSTRUCTION,
    INVENTORY,
    QUESTION_KINDS,
    TRAIN_SEEDS,
    dialogue,
    draw_scene,
    held_out_captions,
    held_out_tasks,
    in_caption_order,
    inventory,
    plain_text,
    questions,
)
from demo.world.world import make_scene

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module", params=["llama", "qwen"])
def family_tokenizer(request):
    bare = train_tokenizer(request.param, 200, 0)
    return request.param, wrap(bare.backend_tokenizer, request.param, chat=True)


def test_training_never_draws_a_held_out_scene():
    assert not set(TRAIN_SEEDS) & set(HELD_OUT_SEEDS[:1000])
    assert TRAIN_SEEDS[-1] < HELD_OUT_SEEDS[0]
    rng = np.random.default_rng(0)
    assert all(draw_scene(rng, TRAIN_SEEDS).seed in TRAIN_SEEDS for _ in range(200))


def test_texts_follow_their_generator():
    for write in (plain_text, dialogue):
        texts = [write(make_scene(5), np.random.default_rng(1)) for _ in range(2)]
        assert texts[0] == texts[1]


def test_dialogues_alternate_and_use_the_instruction():
    rng, systems = np.random.default_rng(2), set()
    for seed in range(100):
        turns = dialogue(make_scene(seed), rng)
        assert [turn["role"] for turn in turns[1:3]] == ["user", "assistant"]
        assert len(turns) % 2 == 1 and all(turn["content"] for turn in turns)
        systems.add(turns[0]["content"])
    assert INSTRUCTION in systems and len(systems) == 2


def test_every_answer_follows_from_its_caption():
    for task in held_out_tasks(40):
        if task.kind in ("colour", "list"):
            assert all(word in task.caption for word in task.answer.split(", "))
        if task.kind == "where":
            assert task.answer.split(" the ")[1] in task.caption
        if task.kind == "count" and task.answer == "zero":
            colour, noun = task.question.split()[2:4]
            assert f"{colour} {noun}" not in task.caption


def test_inventory_keeps_the_order_of_the_caption():
    for seed in range(50):
        scene = make_scene(seed)
        caption = describe(scene, seed)
        names = [short_name(group) for group in in_caption_order(scene, caption)]
        found = inventory(scene, caption)
        assert [found.index(name) for name in names] == sorted(found.index(name) for name in names)
        assert found.endswith(f"background: {scene.background}")


def test_exam_has_every_kind_and_repeats():
    tasks = held_out_tasks(7)
    assert tasks == held_out_tasks(7)
    assert {task.kind for task in tasks} == {INVENTORY, *QUESTION_KINDS} and len(tasks) == 7 * 7
    assert held_out_captions(5) == held_out_captions(5)


def test_a_place_is_asked_only_where_one_answer_is_right():
    for seed in range(200):
        scene = make_scene(seed)
        asked = [task.question for task in questions(scene, describe(scene, 0), np.random.default_rng(0))]
        where = [question for question in asked if question.startswith("Where")]
        assert len(where) == len(set(where))


def test_batches_hold_whole_texts_that_do_not_see_each_other(family_tokenizer):
    family, tokenizer = family_tokenizer
    for variant in ("base", "tuned"):
        batch = packed_batch(tokenizer, family, variant, 2, 384, 0, 11)
        again = packed_batch(tokenizer, family, variant, 2, 384, 0, 11)
        assert batch.tokens.equal(again.tokens) and batch.mask.equal(again.mask)
        assert not batch.tokens.equal(packed_batch(tokenizer, family, variant, 2, 384, 0, 12).tokens)
        assert (batch.weights > 0).float().mean() > 0.6
        assert batch.mask.any(dim=-1).all(), "a row with nothing to look at gives NaN"
        assert not batch.mask.triu(1).any()
        starts = batch.mask[:, 0].sum(dim=-1) == 1  # a token that sees only itself opens a text
        assert starts.sum() > 2
        assert (batch.weights[starts] == 0).all()


def test_answers_weigh_more_than_their_context(family_tokenizer):
    family, tokenizer = family_tokenizer
    turns = dialogue(make_scene(8), np.random.default_rng(3))
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False)["input_ids"]
    header = tokenizer(VOCABULARIES[family].header, add_special_tokens=False)["input_ids"]
    inside = in_answer(ids, header, tokenizer.eos_token_id)
    said = tokenizer.decode([token for token, flag in zip(ids, inside) if flag])
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert said == "".join(answer + VOCABULARIES[family].eos for answer in answers)
