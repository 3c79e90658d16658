"""The plan's promises, on random tables: nothing lost or repeated, any world size, any step by itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from trainer.data.plan import CHUNK, Plan, Rows, is_held_out

pytestmark = pytest.mark.unit

TRIALS = range(20)


def random_rows(rng: np.random.Generator, most: int = 400) -> Rows:
    """A table with one to four buckets of very different size, and rows without any."""
    count, buckets = int(rng.integers(5, most)), int(rng.integers(1, 5))
    shares = rng.dirichlet(np.full(buckets, 0.7))
    codes = rng.choice(buckets, count, p=shares).astype(np.uint8)
    codes[rng.random(count) < 0.15] = 255
    codes[0] = 0  # at least one row
    return Rows(codes, [f"{16 * (number + 1)}x16" for number in range(buckets)])


def random_plan(trial: int) -> Plan:
    rng = np.random.default_rng(trial)
    block_steps = int(rng.choice([1, 2, 4, 8]))
    block_rows = block_steps * int(rng.choice([1, 2, 3]))
    return Plan(random_rows(rng), int(rng.choice([1, 2, 6, 8, 12])), trial, block_rows, block_steps)


@pytest.mark.parametrize("trial", TRIALS)
def test_every_pass_over_a_bucket_has_each_of_its_rows_once(trial: int) -> None:
    plan = random_plan(trial)
    for bucket, count in enumerate(plan.rows.counts.tolist()):
        expected = np.flatnonzero(plan.rows.codes == bucket)
        for epoch in range(3 if count else 0):
            rows = plan.rows_of(bucket, epoch * count + np.arange(count))
            assert np.array_equal(np.sort(rows), expected)


@pytest.mark.parametrize("trial", TRIALS)
def test_nothing_is_dropped_and_nothing_repeated_over_many_epochs(trial: int) -> None:
    """Of two rows of a bucket none has been visited more than once more often, but for a batch that spans two passes."""
    plan = random_plan(trial)
    steps = min(plan.batches_before(3) + 3, 150)
    visits: Counter[int] = Counter()
    batches: Counter[int] = Counter()
    for step in range(steps):
        batch = plan.batch(step)
        assert len(batch.rows) == plan.global_batch_size
        assert (plan.rows.codes[batch.rows] == batch.bucket).all()  # one bucket, and no row that was left out
        assert batch.number == batches[batch.bucket]
        batches[batch.bucket] += 1
        visits.update(batch.rows.tolist())
    for bucket, count in enumerate(plan.rows.counts.tolist()):
        rows = np.flatnonzero(plan.rows.codes == bucket)
        seen = np.array([visits[row] for row in rows.tolist()])
        total = batches[bucket] * plan.global_batch_size
        assert seen.sum() == total
        if count:
            assert seen.min() >= total // count and seen.max() <= -(-total // count)
    assert sum(visits.values()) == steps * plan.global_batch_size


@pytest.mark.parametrize("trial", TRIALS)
def test_an_epoch_ends_when_every_bucket_has_had_its_whole_batches(trial: int) -> None:
    plan = random_plan(trial)
    counts = plan.rows.counts.tolist()
    for epoch in range(3):
        first, end = plan.batches_before(epoch), plan.batches_before(epoch + 1)
        assert end == sum((epoch + 1) * count // plan.global_batch_size for count in counts)
        if end > first:
            assert plan.epoch_at(first) == plan.epoch_at(end - 1) == epoch
        buckets = plan._sequence(epoch)[0].tolist()
        for bucket, count in enumerate(counts):
            whole = (epoch + 1) * count // plan.global_batch_size - epoch * count // plan.global_batch_size
            assert buckets.count(bucket) == whole


@pytest.mark.parametrize("trial", TRIALS)
def test_ranks_of_any_number_make_up_the_same_batches(trial: int) -> None:
    plan = random_plan(trial)
    for step in (0, 17):
        whole = plan.batch(step).rows
        for world_size in range(1, plan.global_batch_size + 1):
            if plan.global_batch_size % world_size == 0:
                parts = [plan.batch(step, *plan.share(rank, world_size)).rows for rank in range(world_size)]
                assert {len(part) for part in parts} == {plan.global_batch_size // world_size}
                assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("trial", TRIALS)
def test_any_step_stands_by_itself(trial: int) -> None:
    """A plan that was asked for everything before, one that was not, and one far ahead: the same."""
    plan, fresh = random_plan(trial), random_plan(trial)
    walked = [plan.batch(step) for step in range(40)]
    for step in (39, 3, 21):
        alone = fresh.batch(step)
        assert np.array_equal(alone.rows, walked[step].rows)
        assert plan.step_of(alone.bucket, alone.number) == step
    assert len(plan.batch(10**9).rows) == plan.global_batch_size


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    rows = Rows(np.zeros(640, np.uint8), ["16x16"])
    plans = [Plan(rows, 64, seed) for seed in (0, 1)]
    orders = [
        np.concatenate([plan.batch(step).rows for step in range(first, first + 10)])
        for plan in plans
        for first in (0, 10)
    ]
    for number, order in enumerate(orders):
        assert np.array_equal(np.sort(order), np.arange(640))
        for other in orders[number + 1 :]:
            assert (order == other).mean() < 0.02


def test_a_batch_comes_from_all_over_the_table() -> None:
    """Eight rows of a block go to eight batches: neighbours are in one batch no more often than by chance."""
    plan = Plan(Rows(np.zeros(65536, np.uint8), ["16x16"]), 256, 3, block_rows=8, block_steps=8)
    for step in range(4):
        rows = np.sort(plan.batch(step).rows)
        assert (np.diff(rows) < 8).sum() <= 20  # expected of independent rows: 256 * 8 / 256 = 8
        assert np.abs(np.bincount(rows // 8192, minlength=8) / 256 - 1 / 8).max() < 0.09


def test_whole_blocks_are_read_by_one_rank() -> None:
    """Within a window a rank's rows are whole blocks of neighbours, whatever the number of ranks."""
    plan = Plan(Rows(np.zeros(40_000, np.uint8), ["16x16"]), 64, 0, block_rows=16, block_steps=8)
    for world_size in (1, 4, 32):
        first, last = plan.share(world_size - 1, world_size)
        parts = [plan.batch(step, first, last) for step in range(8)]
        assert len({int(group) for part in parts for group in part.groups}) == 1
        rows = np.sort(np.concatenate([part.rows for part in parts]))
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        assert all(len(run) % 16 == 0 for run in runs if run[0] != 0 and run[-1] != 39_999), "a block in pieces"


def test_blocks_are_cut_elsewhere_in_every_pass() -> None:
    plan = Plan(Rows(np.zeros(4096, np.uint8), ["16x16"]), 64, 0)
    starts = []
    for epoch in range(3):
        rows = np.concatenate([plan.batch(step).rows for step in range(epoch * 64, epoch * 64 + 8)])
        runs = np.sort(rows)
        starts.append(set((runs[np.diff(runs, prepend=-9) != 1] % 8).tolist()))
    assert all(len(start) <= 2 for start in starts), starts  # one phase, and the block that goes over the end
    assert len({min(start) for start in starts}) > 1


def test_buckets_alternate_within_an_epoch() -> None:
    codes = np.repeat(np.array([0, 1], np.uint8), 3200)
    plan = Plan(Rows(codes, ["16x16", "32x16"]), 32, 0)
    buckets = np.array([plan.bucket_at(step)[0] for step in range(200)])
    assert buckets.sum() == 100
    changes = (np.diff(buckets) != 0).sum()
    assert 75 < changes < 125


def test_small_buckets_wait_and_are_counted() -> None:
    codes = np.repeat(np.array([0, 1, 2], np.uint8), [100, 3, 20])
    plan = Plan(Rows(codes, ["16x16", "32x16", "16x32"]), 16, 0)
    counts = plan.count(plan.batches_before(1))
    assert counts.batches == {"16x16": 6, "32x16": 0, "16x32": 1}
    assert counts.unseen == {"16x16": 4, "32x16": 3, "16x32": 4}
    assert counts.crowded == {"32x16": 3}
    later = plan.count(plan.batches_before(6))  # 18 visits of the 3 rows: their first batch
    assert later.batches["32x16"] == 1 and not later.unseen
    assert later.samples == 16 * later.steps and later.epoch == 6
    assert plan.count(0).unseen == {"16x16": 100, "32x16": 3, "16x32": 20}


def test_a_table_smaller_than_a_batch_is_gone_through_again_and_again() -> None:
    plan = Plan(Rows(np.zeros(5, np.uint8), ["16x16"]), 16, 0)
    rows = np.concatenate([plan.batch(step).rows for step in range(5)])
    assert np.bincount(rows).tolist() == [16] * 5
    for start in range(0, 80, 5):
        assert sorted(rows[start : start + 5].tolist()) == [0, 1, 2, 3, 4]


def test_rows_are_found_by_their_rank_in_large_tables() -> None:
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([0, 1, 300, 65535], np.uint16), 5 * CHUNK + 77, p=[0.5, 0.3, 0.001, 0.199])
    rows = Rows(codes, [str(number) for number in range(301)])
    for bucket in (0, 1, 300):
        expected = np.flatnonzero(codes == bucket)
        assert rows.counts[bucket] == len(expected)
        ranks = rng.integers(0, len(expected), 200)
        assert np.array_equal(rows.select(bucket, ranks), expected[ranks])
    assert rows.counts[2] == 0 and rows.select(2, np.zeros(0, np.int64)).size == 0


def test_a_table_without_a_row_to_train_on_says_why() -> None:
    rows = Rows(np.full(3, 255, np.uint8), [], missing={"without latents": 3})
    with pytest.raises(ValueError, match="no row to train on: 3 rows without latents"):
        Plan(rows, 8, 0)


def test_the_fingerprint_is_of_all_that_the_order_depends_on() -> None:
    codes = np.repeat(np.array([0, 1], np.uint8), 50)
    prints = [
        Plan(Rows(codes, ["16x16", "32x16"]), 8, 0).fingerprint(),
        Plan(Rows(codes, ["16x16", "32x32"]), 8, 0).fingerprint(),
        Plan(Rows(codes[1:], ["16x16", "32x16"]), 8, 0).fingerprint(),
        Plan(Rows(codes, ["16x16", "32x16"]), 16, 0).fingerprint(),
        Plan(Rows(codes, ["16x16", "32x16"]), 8, 1).fingerprint(),
        Plan(Rows(codes, ["16x16", "32x16"]), 8, 0, block_steps=4).fingerprint(),
    ]
    assert all(a != b for index, a in enumerate(prints) for b in prints[index + 1 :])
    assert prints[0] == Plan(Rows(codes.copy(), ["16x16", "32x16"]), 8, 0).fingerprint()


def test_held_out_rows_stay_held_out_when_the_table_grows() -> None:
    small, large = is_held_out(np.arange(5000), 0.1), is_held_out(np.arange(20_000), 0.1)
    assert np.array_equal(large[:5000], small)
    assert abs(large.mean() - 0.1) < 0.01
    assert not is_held_out(np.arange(5000), 0.0).any()
    more = is_held_out(np.arange(5000), 0.2)
    assert (more | ~small).all()  # a larger share has the smaller one's rows
