"""`evaluate` on folders of files: classes, tolerances, what is written, and what is refused."""

import io
import json
import math

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from sparsemae import evaluate as module
from sparsemae.data.making.workers import Lost
from sparsemae.errors import UserError
from sparsemae.evaluate import evaluate, parse_tolerance, read_summary, score_case

AFFINE = np.diag([0.7, 1.5, 3.0, 1.0])


def save(path, array):
    path.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array, np.uint8), AFFINE), path)


def box(*labels):
    """A map with a cube of 4 voxels for each class, side by side."""
    out = np.zeros((8, 8, 24), np.uint8)
    for i, label in enumerate(labels):
        out[2:6, 2:6, 2 + 6 * i : 6 + 6 * i] = label
    return out


@pytest.fixture
def folders(tmp_path):
    """Three cases of two classes: one is right, one misses class 2, one has neither class."""
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    for case, predicted, known in (
        ("b", box(1, 2), box(1, 2)),
        ("a", box(1), box(1, 2)),
        ("c", box(), box()),
    ):
        save(pred / f"{case}.nii.gz", predicted)
        save(ref / f"{case}.nii", known)
    return pred, ref


@pytest.fixture
def description(tmp_path):
    labels = {"background": 0, "liver": 1, "spleen": 2, "stomach": 3, "ignore": 4}
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"labels": labels}))
    return path


def test_classes_are_those_of_the_references(folders, tmp_path):
    found = evaluate(*folders, tmp_path / "out")
    assert [(c.label, c.name, c.tolerance_mm) for c in found.classes] == [(1, "1", 1), (2, "2", 1)]
    assert [case.case for case in found.cases] == ["a", "b", "c"]
    (a1, a2), (b1, b2), (c1, c2) = (case.scores for case in found.cases)
    diagonal = math.hypot(8 * 0.7, 8 * 1.5, 24 * 3.0)
    for whole in (a1, b1, b2):
        assert (whole.dice, whole.nsd, whole.hd95) == (1, 1, 0)
        assert whole.reference_ml == pytest.approx(64 * 3.15e-3)
    assert (a2.dice, a2.nsd, a2.hd95) == (0, 0, pytest.approx(diagonal, rel=1e-6))
    assert all(math.isnan(score.dice) for score in (c1, c2))
    assert found.means().dice == pytest.approx((1 + 0.5) / 2)
    assert found.case_means()["a"] == 0.5
    back = read_summary(tmp_path / "out")
    assert back.model_dump_json() == found.model_dump_json()
    assert (tmp_path / "out" / "metrics.csv").is_file()


def test_classes_from_a_description(folders, description, tmp_path):
    pred, ref = folders
    known = box(1, 2, 3)
    known[0] = 4
    predicted = box(1, 2)
    predicted[0] = 1  # nobody knows what is there
    save(ref / "d.nii", known)
    save(pred / "d.nii", predicted)
    for labels in (description, description.parent):
        found = evaluate(pred, ref, tmp_path / "out", labels=labels)
        assert [c.name for c in found.classes] == ["liver", "spleen", "stomach"]
        assert found.ignore == 4
        assert [score.dice for score in found.cases[3].scores] == [1, 1, 0]
        assert math.isnan(found.cases[0].scores[2].dice)
    save(pred / "d.nii", known)
    with pytest.raises(UserError, match=r"d.nii: class 4 is not among 0, 1, 2, 3"):
        evaluate(pred, ref, tmp_path / "out", labels=description)


def test_tolerances(folders, description, tmp_path):
    pred, ref = folders
    moved = np.roll(box(1, 2), 1, axis=1)  # by 1.5 mm
    for case in "abc":
        save(ref / f"{case}.nii", box(1, 2))
        save(pred / f"{case}.nii.gz", moved)
    out = tmp_path / "out"
    limits = {"liver": 1.0, "spleen": 1.5, "stomach": 0.0}
    found = evaluate(pred, ref, out, labels=description, tolerance=limits)
    assert [c.tolerance_mm for c in found.classes] == [1.0, 1.5, 0.0]
    liver, spleen, _ = found.cases[0].scores
    assert liver.nsd < 0.9
    assert spleen.nsd == 1
    swapped = evaluate(pred, ref, out, tolerance={"1": 1.5, "2": 1.0})
    assert [score.nsd == 1 for score in swapped.cases[0].scores] == [True, False]
    assert [score.nsd == 1 for score in evaluate(pred, ref, out).cases[0].scores] == [False] * 2
    for tolerance, labels, message in (
        ({"liver": 1.0}, description, "none for spleen; add spleen=MM"),
        ({**limits, "heart": 1.0}, description, "no class heart; choose from liver, spleen,"),
        ({"liver": 1.0, "spleen": 1.0}, None, "give a class's number, or --labels"),
        ({"1": 1.0, "2": 1.0, "9": 1.0}, None, "no class 9; choose from 1, 2"),
        ({"1": 1.0}, None, "none for class 2, which a has; add 2=MM"),
        (-1.0, None, "--tolerance -1.0: give mm"),
        (math.nan, None, "--tolerance nan: give mm"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(pred, ref, tmp_path / "none", labels=labels, tolerance=tolerance)
    assert not (tmp_path / "none").exists()


def test_the_option_says_one_number_or_one_for_every_class():
    assert parse_tolerance("2.5") == 2.5
    assert parse_tolerance("liver=1, a=b=2,3=0") == {"liver": 1.0, "a=b": 2.0, "3": 0.0}
    for text in ("", "much", "-1", "inf", "a=1,b", "=1", "a=1,a=2", "a=nan", "a=-1"):
        with pytest.raises(UserError, match=r"--tolerance .*give mm, from 0"):
            parse_tolerance(text)


def test_a_class_that_no_reference_has_is_refused(folders, tmp_path):
    pred, ref = folders
    save(pred / "c.nii.gz", box(7))
    with pytest.raises(UserError, match=r"c.nii.gz: class 7 is in no reference;"):
        evaluate(pred, ref, tmp_path / "out")
    for case in "abc":
        save(ref / f"{case}.nii", box())
    with pytest.raises(UserError, match="no reference has a class"):
        evaluate(pred, ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_files(folders, tmp_path):
    pred, ref = folders
    found = evaluate(pred / "b.nii.gz", ref / "a.nii", tmp_path / "out")
    assert [case.case for case in found.cases] == ["a"]
    assert found.means().dice == 1


def test_references_without_a_prediction(folders, tmp_path):
    pred, ref = folders
    (pred / "a.nii.gz").unlink()
    with pytest.raises(UserError, match=r"no prediction of a; .*--only-predicted"):
        evaluate(pred, ref, tmp_path / "out")
    found = evaluate(pred, ref, tmp_path / "out", only_predicted=True)
    assert [case.case for case in found.cases] == ["b", "c"]


def test_a_folder_of_something_else_is_refused_before_any_work(folders, tmp_path, monkeypatch):
    pred, ref = folders
    monkeypatch.setattr(module, "run_jobs", lambda *a: pytest.fail("it began"))
    with pytest.raises(UserError, match=r"pred holds a.nii.gz, not from an evaluation"):
        evaluate(pred, ref, pred)
    with pytest.raises(UserError, match=r"nowhere/dataset.json: "):
        evaluate(pred, ref, tmp_path / "out", labels=tmp_path / "nowhere" / "dataset.json")


def test_a_worker_that_is_killed_ends_it_with_a_remedy(folders, tmp_path, monkeypatch):
    def lost(function, jobs, workers):
        assert workers == 3  # no more than there are cases
        for job in jobs:
            yield job, Lost("worker.killed", "its process ended with signal SIGKILL", 1.0)

    monkeypatch.setattr(module, "run_jobs", lost)
    with pytest.raises(UserError, match=r"a: its process ended .*; use fewer --workers"):
        evaluate(*folders, tmp_path / "out", workers=8)


def test_cases_are_in_order_whichever_is_done_first(folders, tmp_path, monkeypatch):
    straight = evaluate(*folders, tmp_path / "out")
    run = module.run_jobs
    monkeypatch.setattr(module, "run_jobs", lambda f, jobs, n: list(run(f, jobs, 0))[::-1])
    turned = evaluate(*folders, tmp_path / "turned", workers=2)
    assert turned.model_dump_json() == straight.model_dump_json()
    for name in ("metrics.json", "metrics.csv"):
        assert (tmp_path / "turned" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.slow
def test_processes_give_the_same_and_hand_on_refusals(folders, tmp_path):
    pred, ref = folders
    alone = evaluate(pred, ref, tmp_path / "alone")
    together = evaluate(pred, ref, tmp_path / "together", workers=2)
    assert together.model_dump_json() == alone.model_dump_json()
    half = nib.Nifti1Image(np.full((8, 8, 24), 0.5, np.float32), AFFINE)
    nib.save(half, pred / "b.nii.gz")
    with pytest.raises(UserError, match=r"b.nii.gz: a label of 0.5"):
        evaluate(pred, ref, tmp_path / "none", workers=2)
    assert not (tmp_path / "none").exists()


def test_the_console_shows_warnings_and_the_table(folders, tmp_path):
    console = Console(width=100, file=io.StringIO())
    evaluate(*folders, tmp_path / "out", console=console)
    text = console.file.getvalue()
    assert text.count("warning: ") == 2
    assert f"warning: {folders[1] / 'c.nii'}: background only" in text
    assert "0.500 ± 0.707" in text
    evaluate(*folders, tmp_path / "out")


def test_the_library_scores_arrays():
    (one,) = score_case(box(1), box(1), (1, 1, 1), [1], 1.0)
    assert one.dice == 1
