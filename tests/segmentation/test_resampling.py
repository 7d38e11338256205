"""Resampling of labelled volumes: exact where it can be known, and by nnU-Net's rule of slices."""

import numpy as np
import pytest

from sparsemae.data.preparing.resample import resampled_grid
from sparsemae.segmentation.resampling import resample_image, resample_labels, thick_axis


@pytest.mark.parametrize(
    ("old", "new", "axis"),
    [
        ((1, 1, 1), (2, 1, 1), None),
        ((1, 1, 3), (1, 1, 1), None),  # three times is not more than three times
        ((1, 1, 3.1), (1, 1, 1), 2),
        ((5, 1.5, 1.5), (1, 1, 1), 0),
        ((1, 1, 1), (1, 4, 1), 1),  # by the new spacing
        ((0.2, 1, 1), (1, 1, 1), None),  # two axes are as thick
        ((1, 1, 4), (4, 1, 1), 2),  # the old spacing is asked first
    ],
)
def test_the_thick_axis_is_nnunets(old, new, axis):
    assert thick_axis(old, new) == axis


def ramps(shape):
    d, h, w = np.indices(shape, dtype=np.float32)
    return 3 * d + 5 * h - 2 * w


def test_a_ramp_stays_a_ramp_on_every_axis():
    grid = resampled_grid((12, 14, 16), np.diag([1.0, 2.0, 0.5, 1.0]), (1.5, 1.0, 0.75))
    out = resample_image(ramps((12, 14, 16)), grid, None)
    positions = [
        o + s * np.arange(n) for o, s, n in zip(grid.origin, grid.step, grid.shape, strict=True)
    ]
    d, h, w = np.meshgrid(*positions, indexing="ij")
    inner = (slice(4, -4),) * 3  # the spline knows of the edges
    np.testing.assert_allclose(out[inner], (3 * d + 5 * h - 2 * w)[inner], atol=0.02)


def test_slices_of_the_thick_axis_are_not_mixed():
    shape = (6, 10, 4)
    array = np.broadcast_to(np.array([0.0, 10.0, 50.0, 70.0], np.float32), shape).copy()
    grid = resampled_grid(shape, np.diag([1.0, 1.0, 5.0, 1.0]), (1.0, 1.0, 2.0))
    out = resample_image(array, grid, 2)
    assert out.shape == (6, 10, 10)
    assert set(np.unique(out)) == {0.0, 10.0, 50.0, 70.0}
    assert (np.diff(out, axis=2) >= 0).all()


def test_labels_follow_the_larger_share():
    labels = np.zeros((1, 1, 4), np.int32)
    labels[..., 2:] = 7
    grid = resampled_grid((1, 1, 4), np.eye(4), (1.0, 1.0, 0.5))
    # voxels at -0.25, 0.25, ..., 3.25; the classes meet at 1.5
    np.testing.assert_array_equal(
        resample_labels(labels, grid, None)[0, 0], [0, 0, 0, 0, 7, 7, 7, 7]
    )


def test_no_class_appears_that_was_not_there_and_none_shifts():
    centre, shape = np.array([9, 12, 7]), (20, 24, 18)
    labels = np.zeros(shape, np.int32)
    distance = np.linalg.norm(np.indices(shape).transpose(1, 2, 3, 0) - centre, axis=-1)
    labels[distance < 5], labels[distance < 3] = 9, 4
    new = (0.7, 1.3, 0.9)
    grid = resampled_grid(shape, np.eye(4), new)
    out = resample_labels(labels, grid, None)
    assert set(np.unique(out)) == {0, 4, 9}
    for number in (4, 9):
        found = np.argwhere(out == number).mean(0) * grid.step + grid.origin
        np.testing.assert_allclose(found, np.argwhere(labels == number).mean(0), atol=0.25)
    volume = (out > 0).sum() * np.prod(grid.step) / (labels > 0).sum()
    assert volume == pytest.approx(1, abs=0.1)


def test_equal_spacing_changes_nothing():
    labels = np.random.default_rng(0).integers(0, 4, (5, 6, 7)).astype(np.int32)
    grid = resampled_grid((5, 6, 7), np.eye(4), (1.0, 1.0, 1.0))
    assert resample_labels(labels, grid, None) is labels
