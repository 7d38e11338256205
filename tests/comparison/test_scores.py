"""Scores are read as they were written; only what all methods have done is compared."""

import re

import numpy as np
import pytest

from sparsemae.comparison import scores
from sparsemae.comparison.scores import collect, read_dice
from sparsemae.errors import UserError

NAN = float("nan")


def test_a_case_is_the_mean_of_its_classes(write_dice, tmp_path):
    cases = {"a": (0.5, 1.0), "b": (0.25, NAN), "c": (NAN, NAN), "d": (0.0, NAN)}
    file = write_dice(tmp_path, cases)
    assert read_dice(file) == {"a": 0.75, "b": 0.25, "c": 1.0, "d": 0.0}


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text[:-100],
        lambda text: '{"cases": {}}',
        lambda text: '{"cases": {"a": {"x": {}}}}',
        lambda text: '{"cases": {"a": 1}}',
        lambda text: text.replace("0.25", "NaN"),
        lambda text: text[: text.rindex("0.25")] + "NaN" + text[text.rindex("0.25") + 4 :],
        lambda text: text.replace("0.25", "1.5"),
        lambda text: text.replace("0.25", '"0.25"'),
        lambda text: text.replace("sparsemae evaluation", "evaluation"),
        lambda text: re.sub(r'"cases":.*', '"cases": {}}', text, flags=re.DOTALL),
    ],
)
def test_damaged_metrics_are_refused(write_dice, tmp_path, damage):
    file = write_dice(tmp_path, {"a": (0.25,)})
    file.write_text(damage(file.read_text()))
    with pytest.raises(UserError, match=r"metrics\.json: no metrics there, or damaged"):
        read_dice(file)


@pytest.fixture
def finished(jobs, write_dice, monkeypatch):
    """Makes jobs finished with Dice by case; others are not."""
    done = {}

    def finish(job, cases):
        write_dice(job.metrics.parent, {case: (value,) for case, value in cases.items()})
        done[job.id] = "finished"

    monkeypatch.setattr(scores, "state", lambda job: done.get(job.id, "waiting"))
    return finish


def value(job, case):
    """Tells method, fold, seed and case apart."""
    return 0.5 * (job.method.name == "mae") + 0.1 * job.fold + 0.01 * job.seed + 0.001 * int(case)


def finish_all(jobs, finished, cases="123"):
    for job in jobs:
        finished(job, {case: value(job, case) for case in cases})


def test_every_score_has_its_place(jobs, finished):
    finish_all(jobs, finished)
    found = collect(jobs)
    assert (found.methods, found.missing) == (("scratch", "mae"), ())
    stroke, tumour = found.datasets
    assert (stroke.name, stroke.role, tumour.role) == ("stroke", "development", "test")
    assert (tumour.cases, tumour.runs) == (("1", "2", "3"), ((1, 0), (1, 1)))
    expected = np.array(
        [[[0.1 + 0.01 * s + 0.001 * c + m for s in (0, 1)] for c in (1, 2, 3)] for m in (0, 0.5)]
    )
    assert tumour.dice == pytest.approx(expected)
    assert tumour.by_case == pytest.approx(expected.mean(2))
    assert tumour.seeds.tolist() == [0, 1]


def test_a_seed_that_one_method_lacks_is_not_compared(jobs, finished):
    finish_all([job for job in jobs if job.id != "stroke/mae/fold0-seed1"], finished)
    found = collect(jobs)
    stroke, tumour = found.datasets
    assert (stroke.runs, len(tumour.runs)) == (((0, 0),), 2)
    assert found.missing == (
        "not finished: stroke/mae/fold0-seed1",
        "data set stroke: 1 of 2 folds and seeds compared",
    )


def test_a_data_set_that_one_method_lacks_is_left_out(jobs, finished):
    finish_all([j for j in jobs if (j.dataset.name, j.method.name) != ("stroke", "mae")], finished)
    found = collect(jobs)
    assert [d.name for d in found.datasets] == ["tumour"]
    assert "data set stroke: no fold and seed that all methods have; it is left out" in (
        found.missing
    )


def test_a_method_that_has_done_nothing_is_left_out(jobs, finished):
    finish_all([job for job in jobs if job.method.name == "mae"], finished)
    found = collect(jobs)
    assert (found.methods, len(found.datasets)) == (("mae",), 2)
    assert found.missing == ("method scratch: no job is finished; it is left out",)


def test_cases_that_one_run_lacks_are_left_out_for_all(jobs, finished):
    finish_all(jobs, finished)
    odd = next(job for job in jobs if job.id == "tumour/mae/fold1-seed1")
    finished(odd, {case: value(odd, case) for case in "12"})
    found = collect(jobs)
    assert found.datasets[1].cases == ("1", "2")
    assert found.missing == ("data set tumour: 1 cases are not scored for all methods; left out",)


def test_cases_of_other_folds_are_no_scores(suite_file, output, finished):
    from sparsemae.comparison.jobs import grid
    from sparsemae.comparison.suite import read_suite

    suite_file.write_text(suite_file.read_text().replace("folds = [0]", "folds = [0, 1]", 1))
    jobs = grid(read_suite(suite_file), output)
    for job in jobs:
        finished(job, {case: value(job, case) for case in ("12", "3")[job.fold]})
    stroke = collect(jobs).datasets[0]
    assert (stroke.cases, stroke.runs) == (("1", "2", "3"), ((0, 0), (0, 1), (1, 0), (1, 1)))
    nan = np.isnan(stroke.dice[0])
    assert nan.tolist() == [[False, False, True, True]] * 2 + [[True, True, False, False]]
    assert stroke.by_case[0] == pytest.approx([0.006, 0.007, 0.108])


def test_nothing_finished_compares_nothing(jobs, finished):
    found = collect(jobs)
    assert (found.methods, found.datasets) == ((), ())


def test_many_open_jobs_are_counted(jobs, finished):
    finish_all(jobs[:2], finished)
    assert "and 2 more" in collect(jobs).missing[0]
