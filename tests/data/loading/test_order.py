"""The order of samples: permutations, one per epoch and seed, that look like random ones."""

from collections import Counter
from math import factorial

import numpy as np
import pytest

from sparsemae.data.loading.order import case_of, generator_of


def epoch(number, count, seed):
    return [case_of(number * count + slot, count, seed) for slot in range(count)]


@pytest.mark.parametrize("count", [*range(1, 40), 63, 64, 65, 255, 256, 257, 1000, 4097])
def test_every_case_once_per_epoch(count):
    for number in (0, 1, 1000):
        assert sorted(epoch(number, count, seed=3)) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(epoch(e, 30, s)) for e in range(10) for s in (0, 1, 2**70)}
    assert len(orders) == 30
    assert epoch(7, 30, 5) == epoch(7, 30, 5)


def chi_square(counts):
    counts = np.asarray(counts, float)
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


@pytest.mark.parametrize("count", [2, 3, 5, 16, 44])
def test_every_case_is_equally_likely_in_every_position(count):
    """Over epochs, and over seeds: none is favoured in a place, or after another case."""
    repeats = 40 * count
    for orders in (
        [epoch(e, count, 0) for e in range(repeats)],
        [epoch(0, count, s) for s in range(repeats)],
    ):
        places = np.zeros((count, count))
        followers = np.zeros((count, count))
        for order in orders:
            places[np.arange(count), order] += 1
            followers[order[:-1], order[1:]] += 1
        free = (count - 1) ** 2  # rows and columns have known sums
        assert chi_square(places.ravel()) < free + 5 * (2 * free) ** 0.5
        pairs = followers[~np.eye(count, dtype=bool)]
        assert chi_square(pairs) < len(pairs) + 5 * (2 * len(pairs)) ** 0.5


@pytest.mark.parametrize("count", [3, 4])
def test_all_permutations_of_a_few_cases_are_equally_likely(count):
    repeats = 60 * factorial(count)
    seen = Counter(tuple(epoch(e, count, 1)) for e in range(repeats))
    assert len(seen) == factorial(count)
    free = factorial(count) - 1
    assert chi_square(list(seen.values())) < free + 5 * (2 * free) ** 0.5


def test_a_large_store_costs_no_more_than_a_small_one():
    """No list of all cases: this would not end otherwise."""
    count = 10**15
    found = {case_of(10**20 + i, count, 0) for i in range(100)}
    assert len(found) == 100
    assert all(0 <= case < count for case in found)


def test_neighbours_in_a_large_store_are_unrelated():
    count = 44_000
    order = np.array([case_of(i, count, 0) for i in range(2000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / 2000**0.5
    assert abs(np.corrcoef(np.arange(2000), order)[0, 1]) < 5 / 2000**0.5


def test_each_sample_has_random_numbers_of_its_own():
    keys = [(sample, count, seed) for sample in range(12) for count in (3, 4) for seed in (0, 1)]
    drawn = {key: tuple(generator_of(*key).random(4)) for key in keys}
    # (epoch, slot, seed) is the key: the same for the first samples of stores of 3 and 4
    assert len(set(drawn.values())) == len({(*divmod(s, n), seed) for s, n, seed in keys})
    assert drawn[(7, 3, 0)] == tuple(generator_of(7, 3, 0).random(4))


def test_random_numbers_are_uniform_over_samples():
    drawn = np.array([generator_of(i, 100, 0).random(3) for i in range(3000)])
    counts = np.array([np.histogram(column, 20, (0, 1))[0] for column in drawn.T])
    assert all(chi_square(row) < 19 + 5 * 38**0.5 for row in counts)


def test_the_order_is_the_one_of_every_earlier_version():
    """A resumed run must go on as it began: these numbers may not change."""
    assert epoch(0, 10, 0) == [1, 2, 0, 8, 9, 5, 4, 7, 6, 3]
    assert epoch(3, 10, 42) == [7, 9, 8, 2, 3, 0, 5, 6, 4, 1]
    raw = generator_of(12, 10, 5).bit_generator.random_raw(2)
    assert raw.tolist() == [1680333863349180346, 2127809964247448300]
