"""Scores of finished jobs, and what of them can be compared: what all methods have done."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from sparsemae.comparison.jobs import Job
from sparsemae.comparison.runner import FINISHED, state
from sparsemae.data.codes import one_line
from sparsemae.errors import UserError, listed
from sparsemae.evaluation.summary import read_summary

_NAMED = 4  # jobs that a line names


@dataclass(frozen=True)
class DatasetScores:
    """Dice of every method on the same cases, from the same folds and seeds."""

    name: str
    role: str
    methods: tuple[str, ...]
    cases: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]  # fold and seed of every column
    dice: Float[np.ndarray, "m cases n"]  # NaN where a case is not of a run's fold

    @property
    def seeds(self) -> Int[np.ndarray, "n"]:
        """Of every column."""
        return np.array([seed for _, seed in self.runs])

    @property
    def by_case(self) -> Float[np.ndarray, "m cases"]:
        """Means over runs."""
        return np.nanmean(self.dice, axis=2)


@dataclass(frozen=True)
class Collected:
    """What can be compared, and in words what cannot."""

    methods: tuple[str, ...]
    datasets: tuple[DatasetScores, ...]
    missing: tuple[str, ...]


def read_dice(metrics: Path) -> dict[str, float]:
    """Mean foreground Dice of every case in `metrics.json`.

    A class that is in neither map has none, and is left out; a case with no class in either is
    right, so it counts 1: left out, it would favour the method that finds something there.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        means = read_summary(metrics).case_means()
    except UserError:
        means = {}
    dice = {case: 1.0 if math.isnan(value) else value for case, value in means.items()}
    if not dice or not all(0 <= value <= 1 for value in dice.values()):
        raise UserError(
            one_line(f"{metrics}: no metrics there, or damaged; remove its folder and run it again")
        )
    return dice


def collect(jobs: Sequence[Job]) -> Collected:
    """Read what finished jobs have scored; keep folds, seeds and cases that all methods have.

    A method without any finished job is left out.

    Raises:
        UserError: A finished job's metrics are damaged.
    """
    found = {job: read_dice(job.metrics) for job in jobs if state(job) == FINISHED}
    every = tuple(dict.fromkeys(job.method.name for job in jobs))
    methods = tuple(m for m in every if any(job.method.name == m for job in found))
    missing = [f"method {m}: no job is finished; it is left out" for m in every if m not in methods]
    open_jobs = [j.id for j in jobs if j not in found and j.method.name in methods]
    if open_jobs:
        missing.append(f"not finished: {listed(open_jobs, _NAMED)}")
    datasets = []
    for name in dict.fromkeys(job.dataset.name for job in jobs):
        own = [job for job in jobs if job.dataset.name == name]
        scores = _common(own, methods, found, missing)
        if scores is not None:
            datasets.append(scores)
    return Collected(methods, tuple(datasets), tuple(missing))


def _common(
    jobs: Sequence[Job],
    methods: tuple[str, ...],
    found: dict[Job, dict[str, float]],
    missing: list[str],
) -> DatasetScores | None:
    """The scores on one data set; None, with a word in `missing`, if methods share none."""
    name, role = jobs[0].dataset.name, jobs[0].dataset.role
    dice = {(job.method.name, job.fold, job.seed): found[job] for job in jobs if job in found}
    every = dict.fromkeys((job.fold, job.seed) for job in jobs)
    runs = tuple(run for run in every if all((m, *run) in dice for m in methods))
    if not methods or not runs:
        missing.append(f"data set {name}: no fold and seed that all methods have; it is left out")
        return None
    if len(runs) < len(every):
        missing.append(f"data set {name}: {len(runs)} of {len(every)} folds and seeds compared")
    cells = {}  # of cases that all methods have in a run
    dropped = set()
    for run in runs:
        sets = [set(dice[m, *run]) for m in methods]
        dropped |= set.union(*sets) - set.intersection(*sets)
        for case in set.intersection(*sets):
            cells[case, run] = [dice[m, *run][case] for m in methods]
    cells = {key: values for key, values in cells.items() if key[0] not in dropped}
    if dropped:
        missing.append(
            f"data set {name}: {len(dropped)} cases are not scored for all methods; left out"
        )
    cases = tuple(sorted({case for case, _ in cells}))
    if not cases:
        return None
    table = np.full((len(methods), len(cases), len(runs)), np.nan)
    row = {case: i for i, case in enumerate(cases)}
    column = {run: i for i, run in enumerate(runs)}
    for (case, run), values in cells.items():
        table[:, row[case], column[run]] = values
    return DatasetScores(name, role, methods, cases, runs, table)
