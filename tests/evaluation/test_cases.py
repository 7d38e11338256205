"""Predictions and references: which belong together, and what is refused when they are read."""

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.errors import UserError
from sparsemae.evaluation.cases import Job, Pair, find_pairs, score_pair
from sparsemae.segmentation.dataset import Classes

AFFINE = np.diag([0.7, 1.5, 3.0, 1.0])


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(np.asarray(array), affine), path)
    return path


def job(pred, ref, classes=None, tolerance=1.0):
    return Job(Pair("case", pred, ref), classes, tolerance)


def test_folders_are_matched_by_name_whatever_the_format(tmp_path):
    pred = touch(tmp_path / "p", "b.nrrd", "a.nii.gz", "c.hdr", "c.img", "plans.json", ".d.nii")
    ref = touch(tmp_path / "r", "c.nii", "b.nii.gz", "a.mha", "a.txt")
    assert find_pairs(pred, ref) == [
        Pair("a", pred / "a.nii.gz", ref / "a.mha"),
        Pair("b", pred / "b.nrrd", ref / "b.nii.gz"),
        Pair("c", pred / "c.hdr", ref / "c.nii"),
    ]


def test_two_files_need_no_common_name(tmp_path):
    touch(tmp_path, "mine.nii", "ref\n1.nii.gz")
    paths = tmp_path / "mine.nii", tmp_path / "ref\n1.nii.gz"
    assert find_pairs(*paths) == [Pair(r"ref\n1", *paths)]


def test_probabilities_beside_a_prediction_are_no_prediction(tmp_path):
    pred = touch(tmp_path / "pred", "a.nii", "a_probabilities.nii", "b_probabilities.nii")
    ref = touch(tmp_path / "ref", "a.nii")
    with pytest.raises(UserError, match=r"ref: no reference of b_probabilities;"):
        find_pairs(pred, ref)
    (pred / "b_probabilities.nii").unlink()
    assert [pair.pred.name for pair in find_pairs(pred, ref)] == ["a.nii"]


def test_what_has_no_partner_is_named(tmp_path):
    names = [f"{c}.nii" for c in "abcdefgh"]
    few, many = touch(tmp_path / "few", "a.nii"), touch(tmp_path / "many", *names)
    with pytest.raises(UserError, match=r"few: no prediction of b, c, d, e, f and 2 more;"):
        find_pairs(few, many)
    with pytest.raises(UserError, match=r"few: no reference of b, c, d, e, f and 2 more;"):
        find_pairs(many, few)
    assert [pair.case for pair in find_pairs(few, many, only_predicted=True)] == ["a"]
    other = touch(tmp_path / "other", "b.nii")
    with pytest.raises(UserError, match=r"few: no reference of b;"):
        find_pairs(other, few, only_predicted=True)
    with pytest.raises(UserError, match=r"few: no prediction of b;"):
        find_pairs(few, other)


def test_places_that_hold_no_cases(tmp_path):
    good = touch(tmp_path / "good", "a.nii")
    for pred, ref, message in (
        (tmp_path / "nothing", good, "nothing: no such"),
        (good, touch(tmp_path / "empty", "a.txt"), "empty: no label map in it"),
        (good, good / "a.nii", "good is a folder, .*a.nii a file"),
        (good / "a.nii", good, "good is a folder, .*a.nii a file"),
        (touch(tmp_path / "twice", "a.nii", "a.nii.gz"), good, "a.nii.gz and a.nii are one case"),
    ):
        with pytest.raises(UserError, match=message):
            find_pairs(pred, ref)


def test_scores_of_files_are_those_of_their_voxels(tmp_path, blobs):
    ref, pred = blobs(0), blobs(10)
    files = save(tmp_path / "p.nii", pred), save(tmp_path / "r.nii", ref)
    found = score_pair(job(*files, tolerance={1: 1.0, 2: 2.0, 3: 3.0}))
    assert found.predicted == found.known == {1, 2, 3}
    assert list(found.scores) == [1, 2, 3]
    for label, score in found.scores.items():
        both = ((pred == label) & (ref == label)).sum()
        each = (pred == label).sum(), (ref == label).sum()
        assert score.dice == pytest.approx(2 * both / sum(each))
        assert score.prediction_ml == pytest.approx(each[0] * 3.15e-3)
        assert score.reference_ml == pytest.approx(each[1] * 3.15e-3)


def test_whole_floats_are_labels_and_others_are_not(tmp_path, blobs):
    ref = save(tmp_path / "r.nii", blobs(0))
    whole = save(tmp_path / "whole.nii", blobs(0).astype(np.float32))
    assert score_pair(job(whole, ref)).scores[2].dice == 1
    half = blobs(0).astype(np.float32)
    half[3, 4, 5] = 0.5
    half = save(tmp_path / "half.nii", half)
    for pair in ((half, ref), (ref, half)):
        with pytest.raises(VolumeError, match=r"half.nii: a label of 0.5") as error:
            score_pair(job(*pair))
        assert error.value.code == "labels.fractional"


def test_a_prediction_on_another_grid_is_refused(tmp_path, blobs):
    array = blobs(0)
    ref = save(tmp_path / "r.nii", array)
    moved = AFFINE.copy()
    moved[2, 3] = 0.3  # of a voxel size of 0.7
    scaled = np.diag([0.75, 1.5, 3.0, 1.0])
    for pred, code in (
        (save(tmp_path / "short.nii", array[:-1]), "labels.shape"),
        (save(tmp_path / "moved.nii", array, moved), "labels.affine"),
        (save(tmp_path / "scaled.nii", array, scaled), "labels.affine"),
    ):
        with pytest.raises(
            VolumeError, match=rf"{pred.name}: .*r.nii.*resample it to that"
        ) as error:
            score_pair(job(pred, ref))
        assert error.value.code == code
    moved[2, 3] = 0.1
    near = save(tmp_path / "near.nii", array, moved)
    assert score_pair(job(near, ref)).scores[1].dice == 1


def test_classes_that_were_announced(tmp_path, blobs):
    classes = Classes(("background", "a", "b", "c"), ignore=4)
    ref = blobs(0)
    ref[0] = 4
    files = [save(tmp_path / "p.nii", blobs(0)), save(tmp_path / "r.nii", ref)]
    found = score_pair(job(*files, classes))
    assert [s.dice for s in found.scores.values()] == [1, 1, 1]
    for wrong, message in (
        (job(*reversed(files), classes), r"r.nii: class 4 is not among 0, 1, 2, 3;"),
        (job(*files, Classes(("background", "a", "b"), 3)), r"r.nii: class 4 is not among"),
    ):
        with pytest.raises(VolumeError, match=message) as error:
            score_pair(wrong)
        assert error.value.code == "labels.classes"
    only = save(tmp_path / "only.nii", blobs(0) // 3 * 3)  # has no 1 and 2
    found = score_pair(job(only, only, classes))
    assert np.isnan([found.scores[label].dice for label in (1, 2)]).all()
    assert found.scores[3].dice == 1


def test_a_class_without_tolerance_is_named(tmp_path, blobs):
    file = save(tmp_path / "a.nii", blobs(0))
    with pytest.raises(UserError, match=r"none for class 3, which case has; add 3=MM"):
        score_pair(job(file, file, tolerance={1: 1.0, 2: 1.0}))


def test_background_alone_is_a_warning(tmp_path):
    file = save(tmp_path / "a.nii", np.zeros((6, 6, 6), np.uint8))
    found = score_pair(job(file, file))
    assert found.scores == {}
    assert [notice.code for notice in found.warnings] == ["labels.empty"] * 2


def test_every_orientation_has_the_same_scores(tmp_path, shared):
    """One head in six orientations, cut into classes by its intensity."""
    for path in sorted((shared / "orientations").glob("*.nii.gz")):
        image = nib.load(path)
        classes = np.digitize(image.get_fdata(), (15, 40, 70)).astype(np.uint8)
        turned = nib.as_closest_canonical(nib.Nifti1Image(classes, image.affine))
        moved = np.roll(np.asarray(turned.dataobj), (1, 2, 0), (0, 1, 2))
        back = nib.orientations.ornt_transform(
            nib.io_orientation(turned.affine), nib.io_orientation(image.affine)
        )
        moved = nib.Nifti1Image(moved, turned.affine).as_reoriented(back)
        save(tmp_path / f"r_{path.name}", classes, image.affine)
        save(tmp_path / f"p_{path.name}", moved.dataobj, moved.affine)
    names = [path.name for path in sorted((shared / "orientations").glob("*.nii.gz"))]
    assert len(names) == 6
    first = score_pair(job(tmp_path / f"p_{names[0]}", tmp_path / f"r_{names[0]}"))
    assert all(0.05 < score.dice < 0.99 for score in first.scores.values())
    for pred, ref in zip(names, (*names[1:], names[0]), strict=True):
        found = score_pair(job(tmp_path / f"p_{pred}", tmp_path / f"r_{ref}"))
        assert found.scores.keys() == {1, 2, 3}
        for label, score in found.scores.items():
            expected = first.scores[label].model_dump()
            assert score.model_dump() == pytest.approx(expected, rel=1e-5)
