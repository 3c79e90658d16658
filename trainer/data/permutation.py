"""Permutations and random bits as pure functions: nothing is stored, nothing depends on what was asked before.

`permute(i, n, key)` is the place that shuffling 0 .. n-1 with that key gives to i, worked out for each i alone. So an order of
a billion rows needs no memory, any part of it can be asked for at once, and it is the same with every version of numpy.
"""

from __future__ import annotations

import math

import numpy as np

ROUNDS = 3  # pairs of half-rounds; the tests look at what the shuffles of small and large n are like
_MASK = 2**64 - 1
_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(values: np.ndarray) -> np.ndarray:
    """(n, ...) uint64 -> (n, ...) uint64, every bit of the result depends on every bit of the value: SplitMix64's step.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"; constants of Stafford's variant 13.
    """
    values = values + np.uint64(_GOLDEN)
    values ^= values >> np.uint64(30)
    values *= np.uint64(_FIRST)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_SECOND)
    values ^= values >> np.uint64(31)
    return values


def mix_int(value: int) -> int:
    """`mix` of one number."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def key_of(*parts: int) -> int:
    """Whole numbers below 2**64 -> a key for `permute`; the order of them matters."""
    key = 0
    for part in parts:
        key = mix_int(key ^ mix_int(int(part)))
    return key


def keys_of(key: int, parts: np.ndarray) -> np.ndarray:
    """`key_of` of what `key` was made of and one more part, for many of these: (n,) int64 -> (n,) uint64."""
    return mix(mix(parts.astype(np.uint64)) ^ np.uint64(key))


def permute(index: np.ndarray, count: int, key: int | np.ndarray) -> np.ndarray:
    """Places (n,) int64 of `index` (n,) after shuffling 0 .. count-1; a bijection for every key.

    A Feistel network over Z_a x Z_b, a and b about sqrt(count), whose few results beyond `count` walk on until they are in
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        index: numbers from 0 to count - 1.
        count: size of what is shuffled, at least 1.
        key: one key, or (n,) uint64, one for each index.
    """
    assert count >= 1 and (index.size == 0 or (index.min() >= 0 and index.max() < count)), (
        "index outside the permutation"
    )
    rows = math.isqrt(count - 1) + 1
    columns = -(-count // rows)
    places = _shuffle(index.astype(np.uint64), key, rows, columns)
    outside = np.flatnonzero(places >= count)
    while outside.size:
        keys = key if isinstance(key, int) else key[outside]
        places[outside] = _shuffle(places[outside], keys, rows, columns)
        outside = outside[places[outside] >= count]
    return places.astype(np.int64)


def _shuffle(values: np.ndarray, key: int | np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A bijection of 0 .. rows * columns - 1, for (n,) uint64."""
    a, b = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(values, b)
    for _ in range(ROUNDS):
        key = _next(key)
        row = (row + mix(column ^ _number(key)) % a) % a
        key = _next(key)
        column = (column + mix(row ^ _number(key)) % b) % b
    return row * b + column


def _next(key: int | np.ndarray) -> int | np.ndarray:
    return mix_int(key) if isinstance(key, int) else mix(key)


def _number(key: int | np.ndarray) -> np.uint64 | np.ndarray:
    return np.uint64(key) if isinstance(key, int) else key
