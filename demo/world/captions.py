"""What is said of a scene: dense captions in varied wording, and the poor text that comes with images in the wild."""

from __future__ import annotations

import itertools

import numpy as np

from demo.world.world import Group, Relation, Scene, relation_between, stated_relations

NUMBERS = ("zero", "one", "two", "three", "four")
PLURALS = {"cross": "crosses"}

SYNONYMS = {
    "small": ("small", "small", "little", "tiny"),
    "medium": ("medium", "medium", "medium-sized", "mid-sized"),
    "large": ("large", "large", "big", "huge"),
    "solid": ("solid", "solid", "plain"),
    "striped": ("striped", "striped", "stripy"),
    "dotted": ("dotted", "dotted", "spotted"),
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}
"""The ways to say a word of the world; the first is the canonical one and may stand twice to be likelier."""

OPENINGS = ("The image shows", "The picture contains", "This drawing has", "We see", "An image of", "A picture of", "")
NOISE_KINDS = ("file", "url", "tags")


def describe(scene: Scene, rng: np.random.Generator | int) -> str:
    """The dense caption: every group with count, size, texture, colour and shape, the relations, the background.

    The wording (synonyms, order of the parts, sentence forms) comes from `rng`, a generator or a seed.
    """
    if not isinstance(rng, np.random.Generator):
        rng = np.random.default_rng([scene.seed, 2, rng])
    groups = scene.groups
    order = rng.permutation(len(groups)) if rng.random() < 0.5 else np.arange(len(groups))
    phrases = [group_phrase(groups[index], rng) for index in order]
    background = pick(rng, (f"on a {scene.background} background", f"against a {scene.background} backdrop"))
    opening = pick(rng, OPENINGS)

    form = rng.integers(4)
    if form == 0:
        sentences = [f"{opening} {join(phrases)} {background}."]
    elif form == 1:
        sentences = [f"{background}, there {be(groups[order[0]])} {join(phrases)}."]
    elif form == 2:
        total = f"{NUMBERS[len(scene.objects)]} {'object' if len(scene.objects) == 1 else 'objects'}"
        sentences = [f"{opening} {total} {background}: {join(phrases)}."]
    else:
        sentences = [
            f"{opening} {join(phrases)}.",
            pick(rng, (f"The background is {scene.background}.", f"Everything is {background}.")),
        ]
    relations = [relation_sentence(scene, relation, rng) for relation in stated_relations(scene)]
    sentences[1:1] = relations
    return " ".join(capitalise(sentence.strip()) for sentence in sentences)


def canonical_caption(scene: Scene) -> str:
    """The dense caption in one fixed wording and order: what the demo's VLM learns to write of an image.

    "Two small striped red circles and one large solid blue star on a white background. The red circles are above and
    left of the blue star." Groups stand in reading order; relations are those between neighbors in that order.
    """
    order = reading_order(scene)
    groups = [scene.groups[index] for index in order]
    phrases = [
        f"{NUMBERS[group.count]} {group.size} {group.texture} {group.colour} {plural(group.shape, group.count)}"
        for group in groups
    ]
    sentences = [f"{join(phrases)} on a {scene.background} background."]
    for first, second in itertools.pairwise(order):
        relation = relation_between(scene, first, second)
        if relation is not None:
            subject, other = scene.groups[first], scene.groups[second]
            directions = " and ".join(relation.directions)
            sentences.append(f"The {short_name(subject)} {be(subject)} {directions} the {short_name(other)}.")
    return " ".join(capitalise(sentence) for sentence in sentences)


def reading_order(scene: Scene) -> list[int]:
    """Positions of the groups as an eye meets them, row by row from the top left, by each group's first object."""

    def first_met(index: int) -> float:
        return min(item.y + 0.5 * item.x for item in scene.groups[index].objects)

    return sorted(range(len(scene.groups)), key=first_met)


def group_phrase(group: Group, rng: np.random.Generator) -> str:
    """A group in full: "three small striped red circles", "a red circle that is big and striped"."""
    size, texture, noun = say(rng, group.size), say(rng, group.texture), plural(group.shape, group.count)
    form = rng.integers(5)
    if form == 0:
        words = f"{size} {group.colour} {noun} with a {texture} texture"
    elif form == 1:
        words = f"{group.colour} {noun} that {be(group)} {size} and {texture}"
    elif form == 2:
        words = f"{texture} {size} {group.colour} {noun}"
    else:
        words = f"{size} {texture} {group.colour} {noun}"
    return f"{number(group.count, words, rng)} {words}"


def relation_sentence(scene: Scene, relation: Relation, rng: np.random.Generator) -> str:
    """ "The red circle is above and to the left of the blue squares." """
    if rng.random() < 0.4:
        relation = relation.inverse()
    directions = " and ".join(say(rng, direction) for direction in relation.directions)
    subject, other = scene.groups[relation.subject], scene.groups[relation.other]
    verb = be(subject) if rng.random() < 0.7 else ("sits" if subject.count == 1 else "sit")
    return f"The {short_name(subject)} {verb} {directions} the {short_name(other)}."


def noisy_caption(scene: Scene, seed: int) -> str | None:
    """The text that "came with" the image: short and partial; about 10 % None, 8 % a file name, a URL or a tag list."""
    rng = np.random.default_rng([scene.seed, 3, seed])
    fate = rng.random()
    if fate < 0.10:
        return None
    if fate < 0.18:
        return worthless_text(scene, pick(rng, NOISE_KINDS), rng)
    groups = [scene.groups[index] for index in rng.permutation(len(scene.groups))]
    if len(groups) > 1 and rng.random() < 0.3:
        groups = groups[:-1]
    phrases = []
    for group in groups:
        words = [group.colour if rng.random() < 0.8 else "", plural(group.shape, group.count)]
        words.insert(0, group.size if rng.random() < 0.3 else "")
        words.insert(1, group.texture if rng.random() < 0.25 else "")
        text = " ".join(word for word in words if word)
        phrases.append(text if rng.random() < 0.3 else f"{number(group.count, text, rng)} {text}")
    tail = f" on {scene.background}" if rng.random() < 0.3 else ""
    return join(phrases) + tail


def worthless_text(scene: Scene, kind: str, rng: np.random.Generator) -> str:
    """A file name, a URL or a list of tags: what a filter on prompts should drop."""
    if kind == "file":
        return f"{pick(rng, ('IMG', 'DSC', 'scan'))}_{rng.integers(10_000):04d}.{pick(rng, ('jpg', 'png', 'JPG'))}"
    if kind == "url":
        return f"https://example.com/gallery/{rng.integers(100_000)}/{scene.objects[0].shape}.png"
    tags = [word for group in scene.groups for word in (group.colour, group.shape, group.texture)]
    return ", ".join([*dict.fromkeys(tags), "vector", "clipart", "free", "4k"])


def short_name(group: Group) -> str:
    """Colour and noun: enough to tell the group from any other of its scene."""
    return f"{group.colour} {plural(group.shape, group.count)}"


def plural(noun: str, count: int) -> str:
    return noun if count == 1 else PLURALS.get(noun, noun + "s")


def number(count: int, words: str, rng: np.random.Generator) -> str:
    """The count as a word; a single one mostly as the article that fits the words behind it."""
    if count > 1 or rng.random() < 0.2:
        return NUMBERS[count]
    return "an" if words[0] in "aeiou" else "a"


def be(group: Group) -> str:
    return "is" if group.count == 1 else "are"


def say(rng: np.random.Generator, word: str) -> str:
    return pick(rng, SYNONYMS[word])


def pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]


def join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def capitalise(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
