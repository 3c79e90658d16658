"""Two sets for many millions of entries, in numpy arrays: keys found again, and hashes that lie near each other.

Both keep their entries in sorted levels, each several times smaller than the one before it, and the newest in a small
unsorted buffer: adding is cheap on average, a look-up goes through a handful of arrays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

BUFFER = 32_768  # newest entries, kept unsorted
MERGE_RATIO = 4  # a level is merged with the next larger one unless that is so much larger
CHUNKS, CHUNK_BITS = 4, 16  # of a 64-bit hash


def keys_of(texts: Sequence[str]) -> np.ndarray:
    """Strings -> (n, 2) uint64: 128 bits of a hash of each."""
    raw = b"".join(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest() for text in texts)
    return np.frombuffer(raw, np.uint64).reshape(-1, 2)


class KeySet:
    """A set of 128-bit keys in a few sorted arrays: 16 bytes a key, a look-up in logarithmic time."""

    def __init__(self) -> None:
        self._levels: list[np.ndarray] = []  # (n, 2) uint64 each, sorted by the first column, ever smaller
        self._buffer: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._buffer) + sum(map(len, self._levels))

    def add(self, keys: np.ndarray) -> None:
        """Adds (n, 2) keys that are not in the set."""
        if len(keys) < BUFFER:
            self._buffer.update(map(tuple, keys.tolist()))
            if len(self._buffer) < BUFFER:
                return
            keys = np.array(list(self._buffer), np.uint64).reshape(-1, 2)
            self._buffer.clear()
        level = keys
        while self._levels and len(self._levels[-1]) < MERGE_RATIO * len(level):
            level = np.concatenate([self._levels.pop(), level])
        self._levels.append(level[np.argsort(level[:, 0], kind="stable")])

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """(n, 2) keys -> (n,) bool."""
        found = np.array([key in self._buffer for key in map(tuple, keys.tolist())], bool)
        for level in self._levels:
            first = np.searchsorted(level[:, 0], keys[:, 0], "left")
            last = np.searchsorted(level[:, 0], keys[:, 0], "right")
            for row in np.flatnonzero((last > first) & ~found).tolist():  # mostly the keys that are there
                found[row] = bool((level[first[row] : last[row], 1] == keys[row, 1]).any())
        return found


class HashIndex:
    """64-bit hashes, asked whether one lies within `distance` bits.

    Of the four 16-bit parts of two such hashes one differs in `distance // 4` bits at most: only those are compared.
    """

    def __init__(self, distance: int):
        self.distance = distance
        radius = distance // CHUNKS
        masks = np.arange(1 << CHUNK_BITS, dtype=np.uint64)
        self._masks = masks[np.bitwise_count(masks) <= radius]  # (k,) what a part may be XORed with
        self._levels: list[_Level] = []  # ever smaller
        self._buffer = np.empty(0, np.uint64)

    def __len__(self) -> int:
        return len(self._buffer) + sum(map(len, self._levels))

    def add(self, hashes: np.ndarray) -> None:
        """Adds (n,) uint64."""
        self._buffer = np.concatenate([self._buffer, hashes.astype(np.uint64)])
        if len(self._buffer) < BUFFER:
            return
        level, self._buffer = self._buffer, np.empty(0, np.uint64)
        while self._levels and len(self._levels[-1]) < MERGE_RATIO * len(level):
            level = np.concatenate([self._levels.pop().hashes[0], level])
        self._levels.append(_Level(level))

    def values(self) -> np.ndarray:
        """All hashes, in no order."""
        return np.concatenate([self._buffer, *(level.hashes[0] for level in self._levels)])

    def near(self, hashes: np.ndarray) -> np.ndarray:
        """(n,) uint64 -> (n,) bool: whether one of the index differs in at most `distance` bits."""
        found = np.zeros(len(hashes), bool)
        for row, wanted in enumerate(hashes):
            found[row] = bool((np.bitwise_count(self._buffer ^ wanted) <= self.distance).any())
        for level in self._levels:
            for part in range(CHUNKS):
                rows = np.flatnonzero(~found)
                found[rows] = self._near_by_part(level, part, hashes[rows])
        return found

    def _near_by_part(self, level: _Level, part: int, hashes: np.ndarray) -> np.ndarray:
        """Against the hashes whose part is one of `_masks` away: the only ones that can be near by this part."""
        wanted = (_part(hashes, part)[:, None] ^ self._masks[None, :]).reshape(-1)  # (n k,)
        first = level.starts[part][wanted]
        counts = level.starts[part][wanted + np.uint64(1)] - first
        row_of = np.repeat(np.repeat(np.arange(len(hashes)), len(self._masks)), counts)
        place = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(first, counts)
        near = np.bitwise_count(level.hashes[part][place] ^ hashes[row_of]) <= self.distance
        found = np.zeros(len(hashes), bool)
        found[row_of[near]] = True
        return found


class _Level:
    """Hashes, sorted by each of their parts, and where each value of the part begins."""

    def __init__(self, hashes: np.ndarray):
        self.hashes: list[np.ndarray] = []
        self.starts: list[np.ndarray] = []
        for part in range(CHUNKS):
            parts = _part(hashes, part)
            self.hashes.append(hashes[np.argsort(parts, kind="stable")])
            counts = np.bincount(parts.astype(np.int64), minlength=1 << CHUNK_BITS)
            self.starts.append(np.concatenate([[0], np.cumsum(counts)]))

    def __len__(self) -> int:
        return len(self.hashes[0])


def _part(hashes: np.ndarray, part: int) -> np.ndarray:
    return (hashes >> np.uint64(part * CHUNK_BITS)) & np.uint64((1 << CHUNK_BITS) - 1)
