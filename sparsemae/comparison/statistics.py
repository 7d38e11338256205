"""Numbers of a comparison: means, ranks, intervals, tests.

Bootstrap: Efron and Tibshirani 1993, percentile intervals. Ranks over data sets and their diagram:
Demsar, JMLR 7, 2006. Groups by pairwise tests instead of a post-hoc one: Benavoli, Corani and
Mangili, JMLR 17, 2016. Adjustment: Holm, Scand. J. Statist. 6, 1979.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from sparsemae.comparison.scores import DatasetScores

RESAMPLES = 2000
LEVEL = 0.95  # of intervals
ALPHA = 0.05  # below, a difference is called significant
_DIGITS = 12  # differences equal to so many are ties, whatever their sums rounded to
_CHUNK = 100  # resamples at once


@dataclass(frozen=True)
class Pair:
    """A paired test of two methods."""

    first: int
    second: int
    difference: float  # mean of second minus first
    p: float
    adjusted: float  # by Holm, over all pairs tested together


@dataclass(frozen=True)
class Estimate:
    """A number with its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class BlockStatistics:
    """Of all data sets of one role; lists of numbers follow the methods."""

    dice: list[list[Estimate]]  # per data set
    dataset_differences: list[list[Estimate]]  # to the first method, per data set
    dataset_ranks: Float[ndarray, "n m"]  # 1 is best
    dataset_pairs: list[list[Pair]]  # per data set
    mean_dice: list[Estimate]  # mean over data sets
    differences: list[Estimate]  # of it, to the first method
    mean_rank: list[Estimate]
    pairs: list[Pair]  # over the cases of all data sets
    groups: list[tuple[int, ...]]  # methods that do not differ significantly, largest sets


def analyse(
    datasets: Sequence[DatasetScores], *, resamples: int = RESAMPLES, seed: int = 0
) -> BlockStatistics:
    """Compare methods on data sets of one role; each has the same methods."""
    means = np.array([d.by_case.mean(1) for d in datasets])  # [n, m]
    draws = np.stack(
        [resample(d, resamples, np.random.default_rng([seed, i])) for i, d in enumerate(datasets)]
    )  # [n, resamples, m]
    first = slice(0, 1)
    by_case = [d.by_case for d in datasets]
    return BlockStatistics(
        dice=[estimates(v, d) for v, d in zip(means, draws, strict=True)],
        dataset_differences=[
            estimates(v - v[first], d - d[:, first]) for v, d in zip(means, draws, strict=True)
        ],
        dataset_ranks=ranks(means),
        dataset_pairs=[pairwise(values) for values in by_case],
        mean_dice=estimates(means.mean(0), draws.mean(0)),
        differences=estimates(
            (means - means[:, first]).mean(0), (draws - draws[..., first]).mean(0)
        ),
        mean_rank=estimates(ranks(means).mean(0), ranks(draws).mean(0)),
        pairs=(pairs := pairwise(np.concatenate(by_case, axis=1))),
        groups=groups(len(means[0]), pairs),
    )


def ranks(values: Float[ndarray, "*n m"]) -> Float[ndarray, "*n m"]:
    """Ranks along the last axis, 1 for the largest; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    return rankdata(-np.round(values, _DIGITS), axis=-1)


def resample(
    scores: DatasetScores, count: int, generator: np.random.Generator
) -> Float[ndarray, "n m"]:
    """Mean Dice of every method in `count` bootstrap samples: of cases, and of seeds.

    All methods get the same samples, so that their differences are paired.
    """
    there = ~np.isnan(scores.dice[0])  # [cases, runs], the same for all methods
    values = np.nan_to_num(scores.dice)
    seeds, column = np.unique(scores.seeds, return_inverse=True)
    cases, out = len(scores.cases), []
    for start in range(0, count, _CHUNK):
        size = min(_CHUNK, count - start)
        case = generator.multinomial(cases, np.full(cases, 1 / cases), size)  # [size, cases]
        seed = generator.multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size)
        weight = seed[:, column].astype(float)  # [size, runs]
        runs = weight @ there.T  # [size, cases]; 0 if a case's fold lacks the seeds drawn
        drawn = np.einsum("sr,mcr->smc", weight, values) / np.maximum(runs, 1)[:, None]
        by_case = np.where(runs[:, None] > 0, drawn, scores.by_case)  # [size, m, cases]
        out.append((by_case * case[:, None]).sum(2) / cases)
    return np.concatenate(out)


def estimates(values: Float[ndarray, "m"], draws: Float[ndarray, "n m"]) -> list[Estimate]:
    """Values with percentile intervals."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0)
    return [Estimate(*map(float, row)) for row in zip(values, low, high, strict=True)]


def pairwise(scores: Float[ndarray, "m cases"]) -> list[Pair]:
    """Wilcoxon's signed-rank test of every two methods on the same cases, adjusted by Holm."""
    count = len(scores)
    indices = list(itertools.combinations(range(count), 2))
    tested = [signed_rank(scores[b] - scores[a]) for a, b in indices]
    return [
        Pair(a, b, float((scores[b] - scores[a]).mean()), p, adjusted)
        for (a, b), p, adjusted in zip(indices, tested, holm(tested), strict=True)
    ]


def signed_rank(differences: Float[ndarray, "n"]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test; zeros are left out, and 1 without any other."""
    from scipy.stats import wilcoxon

    differences = np.round(differences, _DIGITS)
    differences = differences[differences != 0]
    return float(wilcoxon(differences).pvalue) if len(differences) else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p: the k-th smallest of n times n - k + 1, never below a smaller one's."""
    out, largest = [0.0] * len(p), 0.0
    for k, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - k) * p[index]))
        out[index] = largest
    return out


def groups(count: int, pairs: Sequence[Pair]) -> list[tuple[int, ...]]:
    """The largest sets of two and more methods of which no two differ significantly."""
    alike = {i: set() for i in range(count)}
    for pair in pairs:
        if pair.adjusted >= ALPHA:
            alike[pair.first].add(pair.second)
            alike[pair.second].add(pair.first)
    found = []

    def extend(inside: set[int], able: set[int], seen: set[int]) -> None:  # Bron and Kerbosch 1973
        if not able and not seen and len(inside) > 1:
            found.append(tuple(sorted(inside)))
        for i in sorted(able):
            extend(inside | {i}, able & alike[i], seen & alike[i])
            able, seen = able - {i}, seen | {i}

    extend(set(), set(range(count)), set())
    return sorted(found)
