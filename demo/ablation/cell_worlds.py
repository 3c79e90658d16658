"""The worlds that cells of the grid are trained in: which scenes, and what is asked about them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from demo.world.prompts import TASKS, is_held_out, plain_scene
from demo.world.swaps import KINDS
from demo.world.world import Scene


@dataclass(frozen=True)
class World:
    """Scenes of a kind."""

    fits: Callable[[Scene], bool]
    kinds: tuple[str, ...]
    """Of `demo.world.swaps`: those that its scenes have."""
    tasks: tuple[str, ...]
    """Of the exam by pictures."""

    def seeds(self, among: Sequence[int], count: int, held_out_pairs: bool = False) -> list[int]:
        """The first `count` seeds of fitting scenes; without pairs that the exam holds out, unless they are asked for.

        Raises:
            ValueError: there are not as many.
        """
        found = list(itertools.islice(self._fitting(among, held_out_pairs), count))
        if len(found) < count:
            raise ValueError(f"expected {count:,} scenes, found {len(found):,} that fit among {len(among):,} seeds")
        return found

    def _fitting(self, among: Sequence[int], held_out_pairs: bool) -> Iterator[int]:
        for seed in among:
            scene = plain_scene(seed)
            if self.fits(scene) and (held_out_pairs or not is_held_out(scene)):
                yield seed


def is_pair(scene: Scene) -> bool:
    """Whether a scene has two objects of different shape and colour: the least in which a model can follow or fail."""
    return (
        len(scene.objects) == len({item.shape for item in scene.objects}) == len({i.colour for i in scene.objects}) == 2
    )


WORLDS = {
    "plain": World(lambda scene: True, KINDS, (*TASKS, "position_bias")),
    "pairs": World(
        is_pair,
        ("first", "second", "binding", "binding_after", "relation", "relation_after"),
        ("two_object", "position", "color_attr"),
    ),
}
"""`plain`: the world of the demo's weights, one to four objects. `pairs`: two; what is learned is whose colour, and where."""
