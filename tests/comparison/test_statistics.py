"""Ranks, intervals and tests against hand-made numbers, scipy, and simulations."""

import numpy as np
import pytest
from scipy.stats import rankdata, wilcoxon

from sparsemae.comparison.scores import DatasetScores
from sparsemae.comparison.statistics import (
    Pair,
    analyse,
    estimates,
    groups,
    holm,
    pairwise,
    ranks,
    resample,
    signed_rank,
)


def made(dice, *, name="d", seeds=None):
    """A data set of one fold from [methods, cases, seeds]."""
    m, cases, n = dice.shape
    runs = tuple((0, seed) for seed in (seeds or range(n)))
    methods = tuple(f"m{i}" for i in range(m))
    return DatasetScores(name, "test", methods, tuple(map(str, range(cases))), runs, dice)


def test_the_best_has_rank_one_and_equals_share():
    found = ranks(np.array([[0.7, 0.9, 0.8], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2]]))
    assert found.tolist() == [[3, 1, 2], [1.5, 1.5, 3], [2, 2, 2]]


def test_ranks_are_scipys_and_rounding_makes_no_difference():
    values = np.random.default_rng(0).integers(0, 5, (20, 7)) / 10
    assert np.array_equal(ranks(values), np.stack([rankdata(-row) for row in values]))
    assert ranks(np.array([0.1 + 0.2, 0.3])).tolist() == [1.5, 1.5]


def test_mean_rank_by_hand():
    """Three data sets: m0 is 1st, 2nd, 3rd; m1 3rd, 1st, 1st; m2 2nd, 3rd, 2nd."""
    means = [(0.9, 0.1, 0.5), (0.5, 0.6, 0.4), (0.1, 0.9, 0.8)]
    sets = [made(np.full((3, 4, 2), 1.0) * np.array(row)[:, None, None]) for row in means]
    found = analyse(sets, resamples=10)
    assert [e.value for e in found.mean_rank] == pytest.approx([2, 5 / 3, 7 / 3])
    assert [e.value for e in found.mean_dice] == pytest.approx([0.5, 1.6 / 3, 1.7 / 3])
    assert [e.value for e in found.differences] == pytest.approx([0, 0.1 / 3, 0.2 / 3])
    assert found.dataset_ranks.tolist() == [[1, 3, 2], [2, 1, 3], [3, 1, 2]]
    assert [e.value for e in found.dataset_differences[0]] == pytest.approx([0, -0.8, -0.4])
    assert all(e.low == e.value == e.high for e in found.mean_rank)  # no case differs from another


def test_a_large_data_set_counts_as_one_in_the_mean():
    sets = [made(np.full((2, 100, 1), 0.2)), made(np.full((2, 2, 1), 0.8))]
    assert [e.value for e in analyse(sets, resamples=5).mean_dice] == pytest.approx([0.5, 0.5])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    assert holm([0.04, 0.04]) == pytest.approx([0.08, 0.08])


def test_signed_rank_is_scipys():
    generator = np.random.default_rng(1)
    for count in (6, 30, 200):
        differences = generator.normal(0.2, 1, count)
        assert signed_rank(differences) == pytest.approx(wilcoxon(differences).pvalue)
        with_zeros = np.concatenate([differences, np.zeros(5)])
        assert signed_rank(with_zeros) == pytest.approx(wilcoxon(differences).pvalue)
    assert signed_rank(np.arange(1, 7) / 10) == pytest.approx(2 / 2**6)  # all of one sign


def test_equal_methods_do_not_differ():
    assert signed_rank(np.zeros(8)) == 1.0
    assert signed_rank(np.array([0.1 + 0.2 - 0.3] * 8)) == 1.0  # nothing but rounding
    (pair,) = pairwise(np.tile(np.linspace(0, 1, 9), (2, 1)))
    assert (pair.p, pair.adjusted, pair.difference) == (1.0, 1.0, 0.0)


def test_pairs_are_all_tested_and_adjusted_together():
    scores = np.random.default_rng(2).random((4, 25)) + np.array([0, 0.1, 0.3, 0.9])[:, None]
    found = pairwise(scores)
    assert [(p.first, p.second) for p in found] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = [wilcoxon(scores[p.first], scores[p.second]).pvalue for p in found]
    assert [p.p for p in found] == pytest.approx(expected)
    assert [p.adjusted for p in found] == pytest.approx(holm(expected))
    assert found[2].difference == pytest.approx((scores[3] - scores[0]).mean())


def pairs(count, alike):
    indices = [(a, b) for a in range(count) for b in range(a + 1, count)]
    return [Pair(a, b, 0.0, 0.0, 0.5 if (a, b) in alike else 0.01) for a, b in indices]


@pytest.mark.parametrize(
    ("count", "alike", "expected"),
    [
        (2, [], []),
        (2, [(0, 1)], [(0, 1)]),
        (3, [(0, 1), (1, 2)], [(0, 1), (1, 2)]),  # not transitive
        (3, [(0, 1), (1, 2), (0, 2)], [(0, 1, 2)]),
        (4, [(0, 1), (0, 2), (1, 2), (2, 3)], [(0, 1, 2), (2, 3)]),
        (4, [(0, 3)], [(0, 3)]),
        (1, [], []),
    ],
)
def test_groups_are_the_largest_sets_without_a_difference(count, alike, expected):
    assert groups(count, pairs(count, alike)) == expected


def test_significance_starts_below_the_level():
    assert groups(2, [Pair(0, 1, 0, 0, 0.05)]) == [(0, 1)]
    assert groups(2, [Pair(0, 1, 0, 0, 0.0499)]) == []


def test_intervals_are_percentiles():
    draws = np.stack([np.arange(101.0), np.arange(101.0) * 2], axis=1)
    first, second = estimates(np.array([50.0, 90.0]), draws)
    assert (first.value, first.low, first.high) == pytest.approx((50.0, 2.5, 97.5))
    assert (second.value, second.low, second.high) == pytest.approx((90.0, 5.0, 195.0))


def test_the_same_seed_gives_the_same_intervals():
    sets = [made(np.random.default_rng(3).random((3, 20, 2)))]
    first, again = (analyse(sets, resamples=50) for _ in range(2))
    assert first.mean_dice == again.mean_dice
    assert analyse(sets, resamples=50, seed=1).mean_dice != first.mean_dice


def test_intervals_of_cases_cover_the_truth():
    """95 % intervals of the mean of 40 normal scores; percentile ones are a little narrow."""
    generator, hits = np.random.default_rng(4), 0
    for _ in range(300):
        scores = made(generator.normal(0.7, 0.1, (1, 40, 1)))
        (found,) = estimates(np.zeros(1), resample(scores, 300, generator))
        hits += found.low <= 0.7 <= found.high
    assert 0.91 <= hits / 300 <= 0.98


def test_seeds_are_resampled_too():
    """Case scores without spread, seeds apart: all uncertainty is that of seeds."""
    dice = np.ones((1, 10, 4)) * np.array([0.2, 0.4, 0.6, 0.8])
    draws = resample(made(dice), 4000, np.random.default_rng(5))[:, 0]
    assert draws.mean() == pytest.approx(0.5, abs=0.01)
    assert draws.var() == pytest.approx(0.05 / 4, rel=0.1)  # variance of a mean of four
    alone = resample(made(dice[..., :1]), 50, np.random.default_rng(5))
    assert np.allclose(alone, 0.2)


def test_differences_are_paired():
    """Cases differ a lot, methods by a constant: the difference is sure, the means are not."""
    base = np.random.default_rng(6).random((1, 30, 2)) * 0.5
    found = analyse([made(np.concatenate([base, base + 0.1]))], resamples=200)
    assert (found.differences[1].low, found.differences[1].high) == pytest.approx((0.1, 0.1))
    assert found.mean_dice[1].high - found.mean_dice[1].low > 0.05


def test_folds_keep_their_cases_in_resamples():
    """Two folds of different cases: no sample takes the holes for scores."""
    dice = np.full((2, 4, 4), np.nan)
    dice[:, :2, :2], dice[:, 2:, 2:] = 0.4, 0.6
    runs = ((0, 0), (0, 1), (1, 0), (1, 1))
    scores = DatasetScores("d", "test", ("a", "b"), tuple("1234"), runs, dice)
    draws = resample(scores, 500, np.random.default_rng(7))
    assert set(np.round(draws, 6).ravel()) == {0.4, 0.45, 0.5, 0.55, 0.6}
    ragged = DatasetScores(
        "d", "test", ("a",), tuple("1234"), ((0, 0), (1, 1)), dice[:1, :, [0, 2]]
    )
    draws = resample(ragged, 500, np.random.default_rng(7))
    assert set(np.round(draws, 6).ravel()) == {0.4, 0.45, 0.5, 0.55, 0.6}


def test_a_clear_winner_is_found_and_a_tie_is_none():
    generator = np.random.default_rng(8)
    base = generator.random((1, 60, 1)) * 0.5
    noise = generator.normal(0, 0.01, (1, 60, 1))
    found = analyse([made(np.concatenate([base, base + noise, base + 0.2]))], resamples=100)
    assert found.groups == [(0, 1)]
    assert found.mean_rank[2].value == 1
    assert found.mean_rank[2].high == 1
    assert found.differences[2].low > 0.19
