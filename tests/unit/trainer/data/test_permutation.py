"""Shuffles as functions: bijections for every size, and shuffled well enough."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.data.permutation import key_of, keys_of, mix, mix_int, permute

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("count", [*range(1, 130), 255, 256, 257, 4095, 100_003])
def test_every_place_is_taken_once(count: int) -> None:
    places = permute(np.arange(count), count, key_of(7, count))
    assert places.dtype == np.int64
    assert np.array_equal(np.sort(places), np.arange(count))


def test_any_part_may_be_asked_for_alone() -> None:
    whole = permute(np.arange(1000), 1000, 3)
    assert np.array_equal(permute(np.array([999, 5, 0, 5]), 1000, 3), whole[[999, 5, 0, 5]])


def test_many_permutations_at_once_equal_each_alone() -> None:
    keys = keys_of(key_of(1), np.arange(50))
    together = permute(np.tile(np.arange(8), 50), 8, keys.repeat(8)).reshape(50, 8)
    assert np.array_equal(together, np.stack([permute(np.arange(8), 8, int(key)) for key in keys]))
    assert np.array_equal(np.sort(together, axis=1), np.tile(np.arange(8), (50, 1)))


@pytest.mark.parametrize("count", [5, 8, 12])
def test_small_shuffles_put_every_item_everywhere_equally_often(count: int) -> None:
    trials = 6000
    keys = keys_of(key_of(2), np.arange(trials))
    places = permute(np.tile(np.arange(count), trials), count, keys.repeat(count)).reshape(trials, count)
    for item in range(count):
        seen = np.bincount(places[:, item], minlength=count)
        chi_square = ((seen - trials / count) ** 2 / (trials / count)).sum()
        assert chi_square < 40, f"item {item}: {seen}"  # 11 degrees of freedom at most: 1 in 30,000


def test_large_shuffles_leave_no_trace_of_the_order() -> None:
    count = 50_000
    places = permute(np.arange(count), count, key_of(5))
    assert abs(np.corrcoef(np.arange(count), places)[0, 1]) < 0.02
    steps = np.diff(places)
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.02  # of independent places: -1/2
    assert (np.abs(steps) <= 1).mean() < 1e-3  # neighbours stay neighbours 2 times in 50,000
    quarter = np.bincount(places[: count // 4] * 10 // count, minlength=10)
    assert np.abs(quarter / quarter.sum() - 0.1).max() < 0.015


def test_keys_depend_on_every_part_and_on_their_order() -> None:
    keys = {key_of(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (2**63, 1), (0, 0, 0)]}
    assert len(keys) == 7
    assert keys_of(key_of(4), np.arange(3)).tolist() == [key_of(4, number) for number in range(3)]
    assert mix(np.array([0, 5, 2**64 - 1], np.uint64)).tolist() == [mix_int(0), mix_int(5), mix_int(2**64 - 1)]


def test_half_the_bits_change_with_any_bit() -> None:
    values = np.arange(1000, dtype=np.uint64)
    for bit in (0, 17, 63):
        changed = mix(values) ^ mix(values ^ np.uint64(1 << bit))
        ones = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(ones - 0.5) < 0.01


def test_numbers_outside_are_refused() -> None:
    for index in (-1, 10):
        with pytest.raises(AssertionError, match="outside"):
            permute(np.array([index]), 10, 1)
