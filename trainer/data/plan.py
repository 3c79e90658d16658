"""The plan: which rows make up which step's batch. Pure functions of (rows and their buckets, seed, global batch size).

**Streams.** A bucket's rows are read over and over, every pass in a new order; the passes follow each other without a gap,
and a batch is the next `global_batch_size` rows of this stream. So *nothing is dropped and nothing repeated*: the rows that
fill no batch at the end of an epoch are the first of the bucket's next batch. Within a pass no row repeats
before every row of its bucket has been seen. `Plan.count` says which rows are still waiting at the end of a run.

**Epochs.** Epoch e ends when every bucket has had the whole batches of its first e + 1 passes. Its batches, of all buckets,
are shuffled. One batch has one bucket.

**Order within a pass.** Rows of a bucket that are neighbors in the table form blocks of `block_rows`; where the first one
begins is drawn anew for every pass. Blocks are shuffled. A group of `block_steps` batches takes as many blocks as it has
room for, and every one of its batches takes as many rows of each, in shuffled order. So a batch is made of rows from all over
the table, and yet whole blocks are read. A place in the batch belongs to the same block all through the group: a rank, which
has a range of places, reads whole blocks too.

**Ranks.** Rank r of W has the places r G / W .. (r + 1) G / W of every batch, so the order is the same for every W that
divides G, and all ranks take equally many steps.

**Resuming** needs the number of the step and nothing else. Memory: a byte per row of the table (two if it has more than 254
buckets), and a few for each step of an epoch.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer.data.permutation import key_of, keys_of, mix, permute

CHUNK = 4096  # rows of the table between two entries of the directory
HOLDOUT_KEY = 0x6C69646974  # not the run's seed: runs with other seeds validate on the same rows
# What a permutation is for; part of its key.
_BATCHES, _BLOCKS, _WITHIN, _OFFSET = range(4)


class Rows:
    """The rows of a table that can be trained on, by bucket.

    Args:
        codes: (rows,) uint8 or uint16, the number of each row's bucket in `buckets`, or `left_out(codes)`.
        buckets: names, `HEIGHTxWIDTH`.
        texts: (rows,) uint8, bit k is set where the row has the k-th text; None where every row has the only one.
        held_out: rows, ascending, that are kept for validation; their codes are `left_out`.
        held_out_buckets: the bucket of each.
        missing: reason -> rows that are left out for it.
    """

    def __init__(
        self,
        codes: np.ndarray,
        buckets: Sequence[str],
        texts: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
        held_out_buckets: np.ndarray | None = None,
        missing: dict[str, int] | None = None,
    ):
        self.codes, self.buckets, self.texts = codes, tuple(buckets), texts
        self.held_out = np.zeros(0, np.int64) if held_out is None else held_out
        self.held_out_buckets = np.zeros(0, codes.dtype) if held_out_buckets is None else held_out_buckets
        self.missing = dict(missing or {})
        assert len(self.buckets) <= left_out(codes), "codes too narrow for so many buckets"
        chunks = -(-len(codes) // CHUNK)
        self._before = np.zeros((chunks + 1, len(self.buckets)), np.int64)  # rows of each bucket before each chunk
        for chunk in range(chunks):
            part = codes[chunk * CHUNK : (chunk + 1) * CHUNK]
            self._before[chunk + 1] = np.bincount(part, minlength=left_out(codes) + 1)[: len(self.buckets)]
        np.cumsum(self._before, axis=0, out=self._before)

    @property
    def counts(self) -> np.ndarray:
        """(buckets,) int64, rows of each."""
        return self._before[-1]

    def select(self, bucket: int, positions: np.ndarray) -> np.ndarray:
        """The rows (n,) int64 of the table at these positions (n,) in their bucket, counted from 0."""
        chunks = np.searchsorted(self._before[:, bucket], positions, side="right") - 1
        order = np.argsort(chunks, kind="stable")
        rows = np.empty(len(positions), np.int64)
        starts = np.flatnonzero(np.diff(chunks[order], prepend=-1)).tolist()
        for start, end in zip(starts, [*starts[1:], len(positions)]):
            members, chunk = order[start:end], int(chunks[order[start]])
            here = np.flatnonzero(self.codes[chunk * CHUNK : (chunk + 1) * CHUNK] == bucket)
            rows[members] = chunk * CHUNK + here[positions[members] - self._before[chunk, bucket]]
        return rows

    def digest(self) -> str:
        """sha256 of which row is in which bucket."""
        return hashlib.sha256(repr(self.buckets).encode() + np.ascontiguousarray(self.codes).tobytes()).hexdigest()


@dataclass(frozen=True)
class StepRows:
    """The rows of a step's batch, or a part of them."""

    step: int
    bucket: int  # number in `Rows.buckets`
    number: int  # batches of that bucket before this one
    places: np.ndarray  # (B,) int64, in the global batch
    rows: np.ndarray  # (B,) int64, of the table
    visits: np.ndarray  # (B,) int64, which row of the bucket's stream each is
    groups: np.ndarray  # (B,) int64, the block group of each: rows of one group are read together


@dataclass
class Counts:
    """Epochs and rows that a number of steps goes through."""

    steps: int
    samples: int = 0  # visits, of all rows
    epoch: int = 0  # in which the next step is
    rows: dict[str, int] = field(default_factory=dict)  # bucket -> rows
    batches: dict[str, int] = field(default_factory=dict)  # bucket -> batches
    unseen: dict[str, int] = field(default_factory=dict)  # bucket -> rows that fill no batch so far, if any
    crowded: dict[str, int] = field(
        default_factory=dict
    )  # bucket -> rows, of those with too few for a batch without repeats


class Plan:
    """The order of one phase.

    Args:
        rows: what there is.
        global_batch_size: G, samples of a step over all ranks.
        seed: of the order.
        block_rows: rows that are read together.
        block_steps: batches over which a block is spread; divides `block_rows`.

    Raises:
        ValueError: there is no row to train on.
    """

    def __init__(self, rows: Rows, global_batch_size: int, seed: int, block_rows: int = 8, block_steps: int = 8):
        assert block_rows % block_steps == 0
        self.rows, self.global_batch_size, self.seed, self.block_steps = rows, global_batch_size, seed, block_steps
        self.rows_per_batch = int(np.gcd(block_rows // block_steps, global_batch_size))  # of one block
        self.block_rows = self.rows_per_batch * block_steps
        self.group_rows = block_steps * global_batch_size  # of the batches that whole blocks are spread over
        self._counts = [int(count) for count in rows.counts]
        if not sum(self._counts):
            reasons = "; ".join(f"{count:,} rows {reason}" for reason, count in rows.missing.items()) or "no rows"
            raise ValueError(f"the table has no row to train on: {reasons}")
        self._sequence = functools.lru_cache(maxsize=2)(self._make_sequence)

    # -- which bucket -------------------------------------------------------------------------------------------------

    def batches_before(self, epoch: int) -> int:
        """Returns the number of the epoch's first step."""
        return sum(epoch * count // self.global_batch_size for count in self._counts)

    def epoch_at(self, step: int) -> int:
        """Returns the epoch of a step; the first is 0."""
        low, high = 0, 1
        while self.batches_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:  # batches_before(low) <= step < batches_before(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.batches_before(middle) <= step else (low, middle)
        return low

    def bucket_at(self, step: int) -> tuple[int, int]:
        """Returns (the bucket of a step's batch, how many batches of that bucket come before it)."""
        epoch = self.epoch_at(step)
        sequence, by_bucket, starts = self._sequence(epoch)
        within = step - self.batches_before(epoch)
        bucket = int(sequence[within])
        earlier = int(np.searchsorted(by_bucket[starts[bucket] : starts[bucket + 1]], within))
        return bucket, epoch * self._counts[bucket] // self.global_batch_size + earlier

    def step_of(self, bucket: int, number: int) -> int:
        """Returns the step of the bucket's batch of that number: the inverse of `bucket_at`."""
        # The pass that the batch's last row is in: the batch is complete, and due, in that epoch.
        epoch = ((number + 1) * self.global_batch_size - 1) // self._counts[bucket]
        _, by_bucket, starts = self._sequence(epoch)
        place = number - epoch * self._counts[bucket] // self.global_batch_size
        return self.batches_before(epoch) + int(by_bucket[starts[bucket] + place])

    def _make_sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns (the bucket of every step of the epoch, its steps sorted by bucket, where each bucket starts in those)."""
        size = self.global_batch_size
        numbers = [(epoch + 1) * count // size - epoch * count // size for count in self._counts]
        starts = np.concatenate([[0], np.cumsum(numbers)]).astype(np.int64)
        places = permute(np.arange(starts[-1]), max(1, int(starts[-1])), key_of(self.seed, _BATCHES, epoch))
        sequence = (np.searchsorted(starts, places, side="right") - 1).astype(self.rows.codes.dtype)
        return sequence, np.argsort(sequence, kind="stable").astype(np.int32), starts

    # -- which rows ---------------------------------------------------------------------------------------------------

    def batch(self, step: int, first: int = 0, last: int | None = None) -> StepRows:
        """Returns the rows at places first:last of a step's batch; all of them by default."""
        bucket, number = self.bucket_at(step)
        places = np.arange(first, self.global_batch_size if last is None else last)
        visits = number * self.global_batch_size + places
        rows = self.rows_of(bucket, visits)
        return StepRows(step, bucket, number, places, rows, visits, self.groups_of(bucket, visits))

    def share(self, rank: int, world_size: int) -> tuple[int, int]:
        """Returns the (first, last) place of a rank, for `batch`."""
        assert self.global_batch_size % world_size == 0 and 0 <= rank < world_size
        share = self.global_batch_size // world_size
        return rank * share, (rank + 1) * share

    def groups_of(self, bucket: int, visits: np.ndarray) -> np.ndarray:
        """Returns the number of every visit's block group, unique in the bucket."""
        count = self._counts[bucket]
        return visits // count * (count // self.group_rows + 1) + visits % count // self.group_rows

    def rows_of(self, bucket: int, visits: np.ndarray) -> np.ndarray:
        """Visits (n,) int64 of a bucket's stream -> rows of the table; every pass is a permutation of the bucket's rows."""
        count = self._counts[bucket]
        epochs = visits // count
        positions = np.empty(visits.shape, np.int64)
        for epoch in np.unique(epochs).tolist():
            now = epochs == epoch
            positions[now] = self._positions(bucket, epoch, visits[now] - epoch * count)
        return self.rows.select(bucket, positions)

    def _positions(self, bucket: int, epoch: int, places: np.ndarray) -> np.ndarray:
        """Maps places (n,) of a pass to positions of their rows in the bucket."""
        count, size = self._counts[bucket], self.block_rows
        lane, turn = self._lane(count, places)
        blocks, short = divmod(count, size)  # whole ones, and one shorter block, if any, that is always the last lane's
        keys = keys_of(key_of(self.seed, _WITHIN, bucket, epoch), lane)
        whole = lane < blocks
        if whole.all():
            block = permute(lane, blocks, key_of(self.seed, _BLOCKS, bucket, epoch))
            within = permute(turn, size, keys)
        else:
            block, within = np.full(len(places), blocks), np.empty(len(places), np.int64)
            block[whole] = permute(lane[whole], max(1, blocks), key_of(self.seed, _BLOCKS, bucket, epoch))
            within[whole] = permute(turn[whole], size, keys[whole])
            within[~whole] = permute(turn[~whole], short, keys[~whole])
        offset = key_of(self.seed, _OFFSET, bucket, epoch) % count
        return (block * size + within + offset) % count

    def _lane(self, count: int, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Maps places of a pass to (block, row in the block), both before shuffling."""
        size, batch, share = self.block_rows, self.global_batch_size, self.rows_per_batch
        lanes = batch // share  # blocks of a group
        groups = count // self.group_rows
        group, inside = np.divmod(places, self.group_rows)
        turn, place = np.divmod(inside, batch)
        lane = group * lanes + place // share
        turn = turn * share + place % share
        rest = group == groups
        if rest.any():  # less than a group: one row of every remaining block in turn, then the next row of each
            blocks, short = count // size - groups * lanes, count % size
            index = inside[rest]
            both = short * (blocks + 1)  # rows up to which the shorter block takes part
            late = index >= both
            width = np.where(late, max(1, blocks), blocks + 1)
            index = np.where(late, index - both, index)
            lane[rest] = groups * lanes + index % width
            turn[rest] = index // width + np.where(late, short, 0)
        return lane, turn

    # -- what it amounts to -------------------------------------------------------------------------------------------

    def count(self, steps: int) -> Counts:
        """Counts the epochs and rows that the first `steps` steps go through."""
        epoch = self.epoch_at(steps)
        sequence = self._sequence(epoch)[0][: max(0, steps - self.batches_before(epoch))]
        partial = np.bincount(sequence, minlength=len(self._counts))
        counts = Counts(steps, steps * self.global_batch_size, epoch)
        for name, rows, extra in zip(self.rows.buckets, self._counts, partial.tolist()):
            counts.rows[name] = rows
            counts.batches[name] = epoch * rows // self.global_batch_size + extra
            if unseen := max(0, rows - counts.batches[name] * self.global_batch_size):
                counts.unseen[name] = unseen
            if 0 < rows < self.global_batch_size:
                counts.crowded[name] = rows
        return counts

    def fingerprint(self) -> dict[str, Any]:
        """Returns all that the order depends on, as JSON: a checkpoint's steps refer to the same rows only if it is equal."""
        return {
            "plan": 1,
            "rows": self.rows.digest(),
            "global_batch_size": self.global_batch_size,
            "seed": int(self.seed),
            "block_rows": self.block_rows,
            "block_steps": self.block_steps,
        }


def left_out(codes: np.ndarray) -> int:
    """The code of a row that is not trained on."""
    return int(np.iinfo(codes.dtype).max)


def is_held_out(rows: np.ndarray, share: float) -> np.ndarray:
    """(...) bool: which rows of the table are kept for validation. A row stays on its side when rows are appended."""
    return mix(np.asarray(rows, np.uint64) ^ np.uint64(HOLDOUT_KEY)) < np.uint64(min(share, 1 - 2**-53) * 2**64)
