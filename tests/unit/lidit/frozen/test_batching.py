"""`plan_batches`: every row once, the budget kept, padding and number of batches as small as they can be."""

import itertools

import numpy as np
import pytest

from lidit.frozen.batching import one_ahead, plan_batches

pytestmark = pytest.mark.unit


def cost(batches, lengths, overhead):
    return sum(len(batch) * max(lengths[batch].max(), 1) + overhead for batch in batches)


def slots(batches, lengths):
    return sum(len(batch) * lengths[batch].max() for batch in batches)


DISTRIBUTIONS = {
    "uniform": lambda draw, count: draw.integers(0, 257, count),
    "short with a long tail": lambda draw, count: np.minimum(draw.geometric(0.05, count), 256),
    "two kinds": lambda draw, count: np.where(draw.random(count) < 0.5, 12, 200) + draw.integers(0, 5, count),
    "all the same": lambda draw, count: np.full(count, 33),
    "many empty": lambda draw, count: draw.integers(0, 3, count),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("budget", [1, 64, 1000, 8192, 10**6])
def test_every_row_once_and_within_the_budget(name, budget):
    for seed in range(5):
        draw = np.random.default_rng(seed)
        lengths = DISTRIBUTIONS[name](draw, int(draw.integers(1, 700)))
        batches = plan_batches(lengths, budget)
        assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
        longest = [int(lengths[batch].max()) for batch in batches]
        assert longest == sorted(longest, reverse=True), "the largest batch comes first: memory fails early or never"
        for batch in batches:
            assert len(batch) == 1 or len(batch) * lengths[batch].max() <= budget
            assert len(batch) <= max(1, budget // 8)
            assert (np.diff(lengths[batch]) <= 0).all()


def test_rows_of_one_length_keep_their_order():
    lengths = np.array([5, 9, 5, 5, 9, 5])
    assert np.concatenate(plan_batches(lengths, 16)).tolist() == [1, 4, 0, 2, 3, 5]


def test_nothing_and_one():
    assert plan_batches(np.array([], int), 100) == []
    assert [batch.tolist() for batch in plan_batches(np.array([0]), 100)] == [[0]]
    assert [batch.tolist() for batch in plan_batches(np.array([500]), 100)] == [[0]]


def test_plan_is_the_same_every_time():
    lengths = np.random.default_rng(3).integers(0, 100, 500)
    once, again = plan_batches(lengths, 512), plan_batches(lengths, 512)
    assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("name", ["uniform", "short with a long tail", "two kinds"])
def test_padding_is_small(name):
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0), 4096)
    waste = 1 - lengths.sum() / slots(plan_batches(lengths, 8192), lengths)
    assert waste < 0.05
    in_order = [np.arange(first, min(first + 32, 4096)) for first in range(0, 4096, 32)]
    assert waste < 0.5 * (1 - lengths.sum() / slots(in_order, lengths))


def all_cuts(count):
    """Every way to cut a sorted list of `count` rows into batches."""
    for marks in itertools.product([False, True], repeat=count - 1):
        cuts = [0, *(place + 1 for place, mark in enumerate(marks) if mark), count]
        yield list(itertools.pairwise(cuts))


def test_distinct_lengths_give_the_optimum():
    """Where no two rows are equally long and no batch is full, the plan is the best of all cuts, by brute force."""
    for seed in range(40):
        draw = np.random.default_rng(seed)
        lengths = draw.permutation(60)[: draw.integers(1, 10)]
        overhead = int(draw.integers(0, 40))
        order = np.argsort(-lengths)
        best = min(cost([order[a:b] for a, b in cuts], lengths, overhead) for cuts in all_cuts(len(lengths)))
        assert cost(plan_batches(lengths, 10_000, overhead), lengths, overhead) == best


def test_never_far_from_the_optimum():
    """With full batches and equal lengths, the cuts are made between lengths only: within a fifth of the best of all."""
    ratios = []
    for seed in range(60):
        draw = np.random.default_rng(100 + seed)
        lengths = draw.integers(1, 30, draw.integers(2, 11))
        budget, overhead = int(draw.integers(30, 200)), int(draw.integers(0, 20))
        order = np.argsort(-lengths, kind="stable")
        rows = max(1, budget // 8)

        def allowed(a, b, lengths=lengths, order=order, budget=budget, rows=rows):
            return b - a == 1 or ((b - a) * lengths[order[a]] <= budget and b - a <= rows)

        best = min(
            cost([order[a:b] for a, b in cuts], lengths, overhead)
            for cuts in all_cuts(len(lengths))
            if all(allowed(a, b) for a, b in cuts)
        )
        ratios.append(cost(plan_batches(lengths, budget, overhead), lengths, overhead) / best)
    assert min(ratios) >= 1, "the brute force is not"
    assert max(ratios) < 1.2 and np.mean(ratios) < 1.05


def test_overhead_trades_padding_for_batches():
    lengths = np.random.default_rng(0).integers(1, 257, 2000)
    few, many = plan_batches(lengths, 8192, 2000), plan_batches(lengths, 8192, 0)
    assert len(few) < len(many) and slots(few, lengths) > slots(many, lengths) == lengths.sum()


def test_one_ahead_gives_out_a_batch_once_the_next_is_launched():
    launched = []
    items = one_ahead(launched.append(number) or number for number in range(3))
    assert [(item, list(launched)) for item in items] == [(0, [0, 1]), (1, [0, 1, 2]), (2, [0, 1, 2])]
    assert list(one_ahead([7])) == [7] and list(one_ahead([])) == []
