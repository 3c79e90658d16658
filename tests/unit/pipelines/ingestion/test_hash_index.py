"""Keys are found again, and near hashes are found exactly where counting bits finds them, across buffers and levels."""

import numpy as np
import pytest

from pipelines.ingestion import hash_index
from pipelines.ingestion.hash_index import HashIndex, KeySet, keys_of

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """Levels come into being with hundreds of entries."""
    monkeypatch.setattr(hash_index, "BUFFER", 64)


def draw(seed, *shape):
    return np.random.default_rng(seed).integers(0, 2**64, shape, np.uint64)


def test_keys_of_texts():
    keys = keys_of(["a", "b", "a", ""])
    assert keys.shape == (4, 2) and keys.dtype == np.uint64
    assert (keys[0] == keys[2]).all() and len({tuple(key) for key in keys.tolist()}) == 3
    assert keys_of([]).shape == (0, 2)


@pytest.mark.parametrize("step", [1, 7, 64, 1000])
def test_keys_are_found(step):
    keys, others, found = draw(0, 1000, 2), draw(1, 1000, 2), KeySet()
    for first in range(0, 1000, step):
        assert not found.contains(keys[first : first + step]).any()
        found.add(keys[first : first + step])
    assert len(found) == 1000
    assert found.contains(keys).all() and not found.contains(others).any()
    assert found.contains(np.concatenate([others[:3], keys[-3:]])).tolist() == [False] * 3 + [True] * 3
    assert found.contains(keys[:0]).tolist() == []


def test_keys_whose_first_half_is_the_same():
    keys = draw(2, 300, 2)
    keys[:, 0] = keys[0, 0]
    found = KeySet()
    found.add(keys[:200])
    assert found.contains(keys).tolist() == [True] * 200 + [False] * 100


def nearest(base, wanted, distance):
    return np.array([(np.bitwise_count(base ^ value) <= distance).any() for value in wanted])


@pytest.mark.parametrize("distance", [0, 1, 3, 4, 7, 8, 11])
def test_near_hashes_are_those_that_counting_finds(distance):
    rng = np.random.default_rng(distance)
    base, index = draw(3, 1500), HashIndex(distance)
    for first in range(0, 1500, 100):
        index.add(base[first : first + 100])
    assert len(index) == 1500 and set(index.values().tolist()) == set(base.tolist())
    wanted = base[rng.integers(0, 1500, 400)].copy()
    for row in range(400):  # from none to a few more bits than allowed are turned, anywhere
        for bit in rng.choice(64, row % (distance + 3), replace=False):
            wanted[row] ^= np.uint64(1) << np.uint64(bit)
    expected = nearest(base, wanted, distance)
    assert 0 < expected.sum() < 400
    assert (index.near(wanted) == expected).all()
    assert index.near(wanted[:0]).tolist() == []


def test_an_empty_index_has_nothing_near():
    assert not HashIndex(11).near(draw(4, 5)).any()
    assert HashIndex(3).values().tolist() == []
