"""Scores on arrays: hand-made cases, other ways to compute them, and classes that are absent."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.distance import cdist

from sparsemae.errors import UserError
from sparsemae.evaluation.metrics import score_case

SPACING = (0.7, 1.5, 3.0)


def score(pred, ref, spacing=SPACING, tolerance=1.0):
    (found,) = score_case(pred, ref, spacing, [1], tolerance)
    return found


@pytest.mark.parametrize(("axis", "distance"), [(0, 1.4), (1, 3.0), (2, 6.0)])
def test_cubes_two_voxels_apart(cuboid, axis, distance):
    start = np.full(3, 4)
    moved = start + 2 * np.eye(3, dtype=int)[axis]
    found = score(cuboid(moved, moved + 6), cuboid(start, start + 6))
    assert found.dice == pytest.approx(4 / 6)
    assert found.hd95 == pytest.approx(distance, rel=1e-6)
    assert found.reference_ml == found.prediction_ml == pytest.approx(216 * 3.15 / 1000)
    just, less = (
        score(cuboid(moved, moved + 6), cuboid(start, start + 6), tolerance=t).nsd
        for t in (distance, distance - 0.01)
    )
    assert just == 1
    assert less < 0.9


def test_one_map_inside_another(cuboid):
    pred, ref = cuboid((4, 4, 4), (8, 8, 8)), cuboid((4, 4, 4), (12, 8, 8))
    found, turned = score(pred, ref), score(ref, pred)
    assert found.dice == turned.dice == pytest.approx(2 * 64 / (64 + 128))
    assert (found.prediction_ml, found.reference_ml) == (turned.reference_ml, turned.prediction_ml)
    assert found.reference_ml == pytest.approx(128 * 3.15 / 1000)
    assert found.hd95 == turned.hd95 == pytest.approx(4 * 0.7)  # the longer way counts
    assert found.nsd == pytest.approx(turned.nsd, rel=1e-12)
    same = score(ref, ref, tolerance=0.0)
    assert (same.dice, same.nsd, same.hd95) == (1, 1, 0)


def elements(mask, spacing):
    """Places and areas of the surface elements of a cuboid, by geometry alone.

    They lie between 2 x 2 x 2 voxels, and cut the lines between voxels inside and outside in half.
    """
    a = np.pad(mask, 1).astype(int)
    count = sum(
        a[i : a.shape[0] - 1 + i, j : a.shape[1] - 1 + j, k : a.shape[2] - 1 + k]
        for i in (0, 1)
        for j in (0, 1)
        for k in (0, 1)
    )
    x, y, z = spacing
    corner = math.sqrt((x * y) ** 2 + (y * z) ** 2 + (z * x) ** 2) / 8
    places, areas = [], []
    for place in np.argwhere((count > 0) & (count < 8)):
        box = a[tuple(slice(p, p + 2) for p in place)]
        along = [axis for axis in range(3) if (box.max(axis) == box.min(axis)).all()]
        match len(along):  # axes along which nothing changes
            case 0:
                area = corner
            case 1:
                others = [spacing[axis] / 2 for axis in range(3) if axis not in along]
                area = spacing[along[0]] * math.hypot(*others)
            case _:
                area = spacing[along[0]] * spacing[along[1]]
        places.append(place * spacing)
        areas.append(area)
    return np.array(places), np.array(areas)


@pytest.mark.parametrize("tolerance", [0.0, 0.8, 1.6, 3.1])
@pytest.mark.parametrize("stop", [(10, 9, 11), (8, 12, 9), (16, 18, 20)])
def test_surface_dice_is_a_share_of_areas(cuboid, tolerance, stop):
    pred, ref = cuboid((5, 4, 4), stop), cuboid((4, 4, 5), (10, 10, 10))
    (places, areas), (others, theirs) = elements(pred, SPACING), elements(ref, SPACING)
    apart = cdist(places, others)
    near = areas[apart.min(1) <= tolerance + 1e-6].sum()
    near += theirs[apart.min(0) <= tolerance + 1e-6].sum()
    expected = near / (areas.sum() + theirs.sum())
    assert score(pred, ref, tolerance=tolerance).nsd == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_hausdorff_by_distance_transforms(blobs, seed):
    pred, ref = blobs(seed), blobs(seed + 10)
    for found in score_case(pred, ref, SPACING, [1, 2, 3], 1.0):
        masks = [np.pad(array == found.label, 1) for array in (pred, ref)]
        edges = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
        far = [ndimage.distance_transform_edt(~edge, sampling=SPACING) for edge in edges]
        directed = [np.percentile(far[1][edges[0]], 95), np.percentile(far[0][edges[1]], 95)]
        assert abs(directed[0] - directed[1]) > 1e-3
        assert found.hd95 == pytest.approx(max(directed), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_monai_gives_the_same_on_whole_volumes(blobs, seed):
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    pred, ref = blobs(seed), blobs(seed + 10)
    limits = {3: 0.5, 1: 1.5, 2: 2.5}
    found = score_case(pred, ref, SPACING, [3, 1, 2], limits)
    assert [s.label for s in found] == [3, 1, 2]
    one, other = (
        torch.stack([torch.from_numpy(array == label) for label in limits])[None].float()
        for array in (pred, ref)
    )
    dice = compute_dice(one, other)
    nsd = compute_surface_dice(
        *(one, other, list(limits.values())),
        include_background=True,
        spacing=SPACING,
        use_subvoxels=True,
    )
    hd95 = compute_hausdorff_distance(
        one, other, include_background=True, percentile=95, spacing=SPACING
    )
    np.testing.assert_allclose([s.dice for s in found], dice[0], rtol=1e-6)
    np.testing.assert_allclose([s.nsd for s in found], nsd[0], rtol=1e-5)
    np.testing.assert_allclose([s.hd95 for s in found], hd95[0], rtol=1e-5)
    assert len(set(np.round([s.nsd for s in found], 3))) == 3


def test_a_class_that_is_missing(cuboid):
    full, empty = cuboid((4, 4, 4), (8, 8, 8)), cuboid((0, 0, 0), (0, 0, 0))
    diagonal = math.hypot(16 * 0.7, 18 * 1.5, 20 * 3.0)
    missed, spurious, absent = score(empty, full), score(full, empty), score(empty, empty)
    for found in (missed, spurious):
        assert (found.dice, found.nsd) == (0, 0)
        assert found.hd95 == pytest.approx(diagonal)
    assert (missed.prediction_ml, spurious.reference_ml) == (0, 0)
    assert missed.reference_ml == spurious.prediction_ml == pytest.approx(64 * 3.15 / 1000)
    assert all(map(math.isnan, (absent.dice, absent.nsd, absent.hd95)))
    assert absent.prediction_ml == absent.reference_ml == 0


def test_ignored_voxels_count_on_neither_side(cuboid):
    ref = cuboid((4, 4, 4), (10, 10, 10))
    pred = cuboid((4, 4, 4), (10, 10, 14))
    assert score(pred, ref).dice < 0.8
    ref[:, :, 10:] = 3
    (found,) = score_case(pred, ref, SPACING, [1], 0.0, ignore=3)
    assert (found.dice, found.nsd, found.hd95) == (1, 1, 0)
    assert found.prediction_ml == found.reference_ml == pytest.approx(216 * 3.15 / 1000)
    ref[ref == 1] = 3
    (found,) = score_case(pred, ref, SPACING, [1], 0.0, ignore=3)
    assert math.isnan(found.dice)


def test_numbers_of_classes_may_be_any(blobs):
    pred, ref = blobs(0), blobs(10)
    plain = score_case(pred, ref, SPACING, [1, 2, 3], 1.0)
    numbers = np.array([0, 7, 2_000_000_000, 300], np.int32)
    found = score_case(numbers[pred], numbers[ref], SPACING, numbers[1:].tolist(), 1.0)
    assert [s.label for s in found] == numbers[1:].tolist()
    for one, other in zip(found, plain, strict=True):
        assert one.model_copy(update={"label": other.label}) == other
    some = score_case(pred, ref, SPACING, [3], 1.0)  # what is not asked for is background
    assert some == plain[2:]
    for dtype in (np.uint8, np.uint16, np.int64):
        assert score_case(pred.astype(dtype), ref, SPACING, [1, 2, 3], 1.0) == plain


def test_rounding_in_a_header_decides_nothing(cuboid):
    pred, ref = cuboid((5, 4, 4), (11, 10, 10)), cuboid((4, 4, 4), (10, 10, 10))
    for size in (1.0, 1.0000001, 0.9999999):
        assert score(pred, ref, spacing=(size,) * 3, tolerance=1.0).nsd == 1
    assert score(pred, ref, spacing=(1.001,) * 3, tolerance=1.0).nsd < 0.9


def test_refusals(cuboid):
    ref = cuboid((4, 4, 4), (8, 8, 8))
    good = {"spacing": SPACING, "classes": [1], "tolerance": 1.0}
    for pred, changed, message in (
        (ref[1:], {}, r"\(15, 18, 20\), .* of one shape"),
        (ref.astype(float), {}, "whole numbers"),
        (ref, {"spacing": (1, 0, 1)}, "voxel sizes"),
        (ref, {"classes": []}, "no classes"),
        (ref, {"tolerance": -1.0}, "mm, from 0"),
        (ref, {"tolerance": math.nan}, "mm, from 0"),
        (ref, {"tolerance": {2: 1.0}}, "class 1 has no tolerance"),
    ):
        with pytest.raises(UserError, match=message):
            score_case(pred, ref, **{**good, **changed})
