"""What becomes of the voxels of a case: crop, normalisation and grid, by hand."""

from pathlib import Path

import nibabel
import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import Labels, Volume
from sparsemae.planning.plan import ChannelPlan, Intensities
from sparsemae.segmentation.prepare import prepare_case
from sparsemae.segmentation.reading import read_channels


def volume(array, spacing=(1.0, 1.0, 1.0)):
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = 10, 20, 30
    return Volume(np.asarray(array, np.float32), affine, spacing, Path("scan.nii.gz"))


def labels(array, like):
    return Labels(np.asarray(array, np.int32), like.affine, like.spacing, like.path)


@pytest.fixture
def two():
    """Two channels whose content overlaps, and their labels."""
    rng = np.random.default_rng(0)
    one, other = np.zeros((2, 12, 10, 9), np.float32)
    one[3:9, 2:8, 4:8] = rng.uniform(50, 90, (6, 6, 4))
    other[2:7, 3:9, 4:7] = rng.uniform(-9, 9, (5, 6, 3))
    classes = np.zeros((12, 10, 9), np.int32)
    classes[4:6, 4:6, 5:7] = 2
    return volume(one), volume(other), classes


def test_the_crop_holds_what_is_not_zero_in_any_channel(two, make_plan):
    one, other, classes = two
    ready = prepare_case([one, other], labels(classes, one), make_plan(2))
    assert (ready.crop_start, ready.crop_stop) == ((2, 2, 4), (9, 9, 8))
    assert ready.array.shape == (2, 7, 7, 4)
    assert ready.affine[:3, 3].tolist() == [12, 22, 34]
    np.testing.assert_array_equal(ready.labels, classes[2:9, 2:9, 4:8])
    for got, source in zip(ready.array, (one, other), strict=True):
        box = source.array[2:9, 2:9, 4:8]
        np.testing.assert_allclose(got, (box - box.mean()) / box.std(), atol=1e-5)


def test_masked_channels_are_measured_inside_and_zero_outside(two, make_plan):
    one, _, classes = two
    hollow = one.array.copy()
    hollow[5:7, 4:6, 5:7] = 0  # a hole is inside
    plan = make_plan(channels=[ChannelPlan(name="T1", masked=True)])
    ready = prepare_case([volume(hollow)], labels(classes, one), plan)
    inside = np.zeros((12, 10, 9), bool)
    inside[3:9, 2:8, 4:8] = True
    inside = inside[3:9, 2:8, 4:8]
    values = hollow[3:9, 2:8, 4:8][inside]
    np.testing.assert_allclose(ready.array[0][inside].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(
        ready.array[0], (hollow[3:9, 2:8, 4:8] - values.mean()) / values.std(), atol=1e-5
    )


def test_ct_is_clipped_and_scaled_by_the_data_sets_intensities(make_plan):
    array = np.linspace(-1024, 2000, 8 * 8 * 8).reshape(8, 8, 8)
    known = Intensities(mean=50.0, std=200.0, low=-400.0, high=900.0)
    plan = make_plan(channels=[ChannelPlan(name="CT", normalization="ct", intensities=known)])
    ready = prepare_case([volume(array)], None, plan)
    np.testing.assert_allclose(ready.array[0], (np.clip(array, -400, 900) - 50) / 200, atol=1e-4)
    assert ready.labels is None


@pytest.mark.parametrize(("scheme", "low", "high"), [("rescale", 0, 1), ("none", 5, 60)])
def test_other_normalisations(make_plan, scheme, low, high):
    array = np.linspace(5, 60, 6**3).reshape(6, 6, 6)
    plan = make_plan(channels=[ChannelPlan(name="x", normalization=scheme)])
    ready = prepare_case([volume(array)], None, plan)
    assert ready.array.min() == pytest.approx(low)
    assert ready.array.max() == pytest.approx(high)


def test_axes_are_resampled_each_on_its_own(two, make_plan):
    one, _, classes = two
    plan = make_plan(spacing=[2.0, 1.0, 0.5])
    ready = prepare_case([one], labels(classes, one), plan)
    assert ready.array.shape == (1, 3, 6, 8)
    assert ready.labels.shape == (3, 6, 8)
    # the centre of the field of view stays where it was
    before = one.affine @ [*(np.array([3, 2, 4]) + np.array([5, 5, 3]) / 2), 1]
    after = ready.affine @ [*((np.array(ready.labels.shape) - 1) / 2), 1]
    np.testing.assert_allclose(after, before)


def test_a_contrast_that_was_not_taken_is_zero(two, make_plan, tmp_path):
    one, _, classes = two
    for value in (0, 7):
        missing = volume(np.full(one.array.shape, value))
        ready = prepare_case([one, missing], labels(classes, one), make_plan(2))
        assert (ready.array[1] == 0).all()
        assert ready.array[0].std() > 0.1


def test_channels_may_be_of_one_value_but_not_all(tmp_path):
    paths = tuple(tmp_path / f"case_{i:04}.nii.gz" for i in range(2))
    rng = np.random.default_rng(0)
    zeros = np.zeros((6, 7, 8), np.float32)
    for path, array in zip(
        paths, (rng.normal(size=(6, 7, 8)).astype(np.float32), zeros), strict=True
    ):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)
    assert not read_channels(paths)[1].array.any()
    nibabel.save(nibabel.Nifti1Image(zeros, np.eye(4)), paths[0])
    with pytest.raises(VolumeError, match="every channel has one value"):
        read_channels(paths)
    with pytest.raises(VolumeError, match="every voxel is 0"):
        read_channels(paths[:1])


def test_what_would_be_too_large_is_refused(make_plan):
    small = volume(np.arange(6**3).reshape(6, 6, 6) + 1, (50.0, 50.0, 50.0))
    with pytest.raises(VolumeError, match=r"larger plan\.spacing") as caught:
        prepare_case([small], None, make_plan(spacing=[0.05, 0.05, 0.05]))
    assert caught.value.code == "geometry.too_large"
