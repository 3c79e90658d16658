"""Permutations and random bits as pure functions: nothing is stored, nothing depends on what was asked before.

`permute(i, n, key)` is the place that shuffling 0 .. n-1 with that key gives to i, worked out for each i alone. So an order of
a billion rows needs no memory, any part of it can be asked for at once, and it is the same with every version of numpy.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 4  # pairs of half-rounds; the tests look at what the shuffles of small and large n are like
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mix(values: np.ndarray) -> np.ndarray:
    """(...) uint64 -> (...) uint64, every bit of the result depends on every bit of the value: the step of SplitMix64.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; constants of Stafford's variant 13.
    """
    with np.errstate(over="ignore"):
        values = np.asarray(values, np.uint64) + _GOLDEN
        values = (values ^ (values >> np.uint64(30))) * _FIRST
        values = (values ^ (values >> np.uint64(27))) * _SECOND
        return values ^ (values >> np.uint64(31))


def key_of(*parts: int | np.ndarray) -> np.ndarray:
    """Whole numbers, or arrays of them, below 2**64 -> a key (or an array of keys) for `permute`; the order of them matters."""
    key = np.zeros((), np.uint64)
    for part in parts:
        key = mix(key ^ mix(np.asarray(part, np.uint64)))
    return key


def permute(index: np.ndarray, count: int, key: int | np.ndarray) -> np.ndarray:
    """Places (...) int64 of `index` (...) after shuffling 0 .. count-1; a bijection for every key.

    A Feistel network over Z_a x Z_b, a and b about sqrt(count), whose few results beyond `count` walk on until they are in
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: numbers from 0 to count - 1.
        count: size of what is shuffled, at least 1.
        key: one key, or one for each index; those of one permutation must be equal.
    """
    index = np.asarray(index, np.int64)
    assert count >= 1 and (index.size == 0 or (index.min() >= 0 and index.max() < count)), (
        "index outside the permutation"
    )
    rows = np.uint64(math.isqrt(count - 1) + 1)
    columns = np.uint64(-(-count // int(rows)))
    keys = np.broadcast_to(np.asarray(key, np.uint64), index.shape)
    places = _shuffle(index.astype(np.uint64), keys, rows, columns)
    outside = np.flatnonzero(places.ravel() >= count)
    places, keys = places.reshape(-1), keys.reshape(-1)
    while outside.size:
        places[outside] = _shuffle(places[outside], keys[outside], rows, columns)
        outside = outside[places[outside] >= count]
    return places.reshape(index.shape).astype(np.int64)


def _shuffle(values: np.ndarray, keys: np.ndarray, rows: np.uint64, columns: np.uint64) -> np.ndarray:
    """A bijection of 0 .. rows * columns - 1."""
    row, column = values // columns, values % columns
    with np.errstate(over="ignore"):
        for number in range(ROUNDS):
            keys = mix(keys + np.uint64(number))
            np.mod(row + mix(keys ^ column) % rows, rows, out=row)
            keys = mix(keys)
            np.mod(column + mix(keys ^ row) % columns, columns, out=column)
    return row * columns + column
