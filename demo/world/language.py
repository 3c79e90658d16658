"""Text about scenes for the demo's language models: plain text, dialogues that follow an instruction, and an exam.

Scenes are drawn from `TRAIN_SEEDS` or `HELD_OUT_SEEDS` only, so no held-out scene is ever trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.world.captions import NUMBERS, be, describe, noisy_caption, number, pick, plural, say, short_name
from demo.world.world import COLOURS, SHAPES, Group, Relation, Scene, make_scene, stated_relations

TRAIN_SEEDS = range(0, 1_000_000)
HELD_OUT_SEEDS = range(1_000_000, 1_100_000)

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
"""The instruction of the LI-DiT paper: as system message it asks for the inventory of the prompt that follows."""

ANSWER_INSTRUCTION = "Answer the questions about the image."
QUESTION_KINDS = ("colour", "size", "texture", "count", "where", "list")
INVENTORY = "inventory"
"""The kind of task in which a caption is turned into a canonical list, under the paper's instruction."""

Message = dict[str, str]


@dataclass(frozen=True)
class Task:
    """One thing to ask of a model: `question` is empty for an inventory, where the instruction says it all."""

    kind: str
    caption: str
    question: str
    answer: str


def draw_scene(rng: np.random.Generator, seeds: range) -> Scene:
    return make_scene(seeds[rng.integers(len(seeds))])


def plain_text(scene: Scene, rng: np.random.Generator) -> str:
    """A text for a base model: two or three captions of one scene, a line each; now and then a lone or a poor one.

    Telling a scene again is what makes a small model look back at what was said: nearly every word of the second
    caption can be looked up in the first.
    """
    if rng.random() < 0.15:
        return noisy_caption(scene, int(rng.integers(1000))) or describe(scene, rng)
    writers = (describe, describe, short_caption, listing)
    return "\n".join(writers[rng.integers(len(writers))](scene, rng) for _ in range(rng.integers(2, 4)))


def dialogue(
    scene: Scene, rng: np.random.Generator, inventory_share: float = 0.3, most_questions: int = 6
) -> list[Message]:
    """A conversation for a tuned model: an inventory of a caption, or three to `most_questions` questions about one."""
    if rng.random() < inventory_share:
        caption = describe(scene, rng) if rng.random() < 0.7 else short_caption(scene, rng)
        return messages([Task(INVENTORY, caption, "", inventory(scene, caption))])
    tasks = questions(scene, describe(scene, rng), rng)
    order = rng.permutation(len(tasks))[: rng.integers(3, most_questions + 1)]
    return messages([tasks[index] for index in order])


def messages(tasks: list[Task]) -> list[Message]:
    """Tasks about one caption as chat messages: the caption opens the first user turn."""
    system = INSTRUCTION if tasks[0].kind == INVENTORY else ANSWER_INSTRUCTION
    turns = [{"role": "system", "content": system}]
    for position, task in enumerate(tasks):
        parts = [task.caption] if position == 0 else []
        parts += [task.question] if task.question else []
        turns.append({"role": "user", "content": "\n".join(parts)})
        turns.append({"role": "assistant", "content": task.answer})
    return turns


def short_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Every group with all its attributes, but neither sentences nor relations."""
    phrases = []
    for index in rng.permutation(len(scene.groups)):
        group = scene.groups[index]
        words = f"{say(rng, group.size)} {say(rng, group.texture)} {short_name(group)}"
        phrases.append(f"{number(group.count, words, rng)} {words}")
    return f"{', '.join(phrases)}, {scene.background} background"


def listing(scene: Scene, rng: np.random.Generator) -> str:
    """Every group by name, its other attributes behind it: "red circle (small, solid, one), beige background"."""
    groups = [scene.groups[index] for index in rng.permutation(len(scene.groups))]
    parts = [f"{short_name(group)} ({group.size}, {group.texture}, {NUMBERS[group.count]})" for group in groups]
    return ", ".join([*parts, f"{scene.background} background"])


def inventory(scene: Scene, caption: str) -> str:
    """The caption's content in one canonical form, groups in the caption's order.

    "red circle: small, solid, one; blue squares: large, striped, two; background: white"
    """
    parts = [
        f"{short_name(group)}: {group.size}, {group.texture}, {NUMBERS[group.count]}"
        for group in in_caption_order(scene, caption)
    ]
    return "; ".join([*parts, f"background: {scene.background}"])


def in_caption_order(scene: Scene, caption: str) -> list[Group]:
    """Groups by first mention; every caption form keeps colour and noun side by side."""
    return sorted(scene.groups, key=lambda group: caption.index(short_name(group)))


def questions(scene: Scene, caption: str, rng: np.random.Generator) -> list[Task]:
    """Every question that the dense caption alone answers, each in a wording drawn from `rng`."""
    groups = in_caption_order(scene, caption)
    asked: list[tuple[str, str, str]] = []
    for group in groups:
        name, noun = short_name(group), plural(group.shape, group.count)
        if sum(other.shape == group.shape for other in groups) == 1:
            wordings = (f"What colour {be(group)} the {noun}?", f"Which colour {be(group)} the {noun}?")
            asked.append(("colour", pick(rng, wordings), group.colour))
        asked.append(("size", f"What size {be(group)} the {name}?", group.size))
        asked.append(("texture", f"What texture {be(group)} the {name}?", group.texture))
        asked.append(("count", f"How many {group.colour} {plural(group.shape, 2)} are there?", NUMBERS[group.count]))
    asked.append(("count", absent_question(groups, rng), NUMBERS[0]))
    relations = stated_relations(scene)
    for relation in [*relations, *(relation.inverse() for relation in relations)]:
        if sum(relation.subject in (other.subject, other.other) for other in relations) == 1:
            subject = scene.groups[relation.subject]
            asked.append(("where", f"Where {be(subject)} the {short_name(subject)}?", place(scene, relation)))
    colours = ", ".join(dict.fromkeys(group.colour for group in groups))
    asked.append(
        ("list", pick(rng, ("List the colours of the objects.", "Which colours do the objects have?")), colours)
    )
    return [Task(kind, caption, question, answer) for kind, question, answer in asked]


def place(scene: Scene, relation: Relation) -> str:
    """ "above and left of the blue square": the canonical answer to a question about a place."""
    return f"{' and '.join(relation.directions)} the {short_name(scene.groups[relation.other])}"


def absent_question(groups: list[Group], rng: np.random.Generator) -> str:
    """A count question whose answer is zero."""
    present = {(group.colour, group.shape) for group in groups}
    absent = [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]
    colour, shape = absent[rng.integers(len(absent))]
    return f"How many {colour} {plural(shape, 2)} are there?"


def held_out_captions(count: int) -> list[str]:
    """Dense captions of the first `count` held-out scenes."""
    return [describe(make_scene(seed), 0) for seed in HELD_OUT_SEEDS[:count]]


def held_out_tasks(per_kind: int) -> list[Task]:
    """`per_kind` tasks of every kind about held-out scenes, at most one of a kind per scene."""
    found: dict[str, list[Task]] = {kind: [] for kind in (INVENTORY, *QUESTION_KINDS)}
    for seed in HELD_OUT_SEEDS:
        scene, rng = make_scene(seed), np.random.default_rng([seed, 4])
        caption = describe(scene, rng)
        tasks = [Task(INVENTORY, caption, "", inventory(scene, caption)), *questions(scene, caption, rng)]
        for kind, held in found.items():
            choices = [task for task in tasks if task.kind == kind]
            if choices and len(held) < per_kind:
                held.append(choices[rng.integers(len(choices))])
        if all(len(held) == per_kind for held in found.values()):
            break
    return [task for held in found.values() for task in held]
