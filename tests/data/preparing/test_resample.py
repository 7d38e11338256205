"""Resampling: the numbers of scipy's splines, the same place in the world, equal bits anywhere."""

import os
import subprocess
import sys

import numpy as np
import pytest
from scipy import ndimage

from sparsemae.data.preparing.resample import resample, resample_mask, resampled_grid
from sparsemae.data.reading.geometry import voxel_sizes

OBLIQUE = np.array([[0.8, 0.1, 0, -7], [-0.1, 1.5, 0.2, 3], [0, -0.2, 3.0, 11], [0, 0, 0, 1]])
SPACINGS = [(1.0, 1.0, 1.0), (0.5, 2.0, 1.1), (3.0, 3.0, 3.0), (0.8, 0.4, 6.5)]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def world(affine, shape):
    """World mm of every voxel centre, [D, H, W, 3]."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return grid @ affine[:3, :3].T + affine[:3, 3]


def by_scipy(array, old, new, shape, order):
    """`array` at the world positions of the new voxels, one after the other."""
    to_old = np.linalg.solve(old, new)
    return ndimage.affine_transform(
        array.astype(np.float64), to_old[:3, :3], to_old[:3, 3], shape, order=order, mode="nearest"
    )


@pytest.mark.parametrize("spacing", SPACINGS)
def test_images_equal_scipy_at_the_same_world_positions(spacing):
    array = noise(20, 33, 25)
    grid = resampled_grid(array.shape, OBLIQUE, spacing)
    affine = grid.affine(OBLIQUE)
    assert voxel_sizes(affine) == pytest.approx(spacing, rel=2e-3)
    out = resample(array, grid)
    assert (out.dtype, out.shape) == (np.float32, grid.shape)
    expected = by_scipy(array, OBLIQUE, affine, out.shape, order=3)
    np.testing.assert_allclose(out, expected.clip(array.min(), array.max()), atol=3e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_masks_equal_scipy_on_the_grid_of_the_image(spacing):
    mask = noise(20, 33, 25, seed=1) > 0.4
    grid = resampled_grid(mask.shape, OBLIQUE, spacing)
    out = resample_mask(mask, grid)
    expected = by_scipy(mask, OBLIQUE, grid.affine(OBLIQUE), grid.shape, order=0)
    assert out.dtype == bool
    np.testing.assert_array_equal(out, expected > 0.5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.1), (3.0, 3.0, 3.0)])
def test_world_positions_stay(spacing):
    """A linear function of world position stays that function: no shift by half a voxel."""
    direction = np.array([0.3, -1.1, 0.7])
    array = (world(OBLIQUE, (40, 40, 24)) @ direction).astype(np.float32)
    grid = resampled_grid(array.shape, OBLIQUE, spacing)
    expected = world(grid.affine(OBLIQUE), grid.shape) @ direction
    # Splines repeat the edge value, so a ramp bends there: compare well inside.
    margin = [int(np.ceil(8 * s / n)) for s, n in zip((0.8, 1.5, 3.0), spacing, strict=True)]
    inner = tuple(slice(m, -m) for m in margin)
    out = resample(array, grid)
    assert out[inner].size > 0
    np.testing.assert_allclose(out[inner], expected[inner], atol=2e-3)


def test_the_field_of_view_stays():
    shape = (30, 21, 17)
    grid = resampled_grid(shape, OBLIQUE, (1.0, 1.0, 1.0))
    centres = [
        world(affine, s)[[0, -1], [0, -1], [0, -1]].mean(0)
        for affine, s in ((OBLIQUE, shape), (grid.affine(OBLIQUE), grid.shape))
    ]
    np.testing.assert_allclose(*centres, atol=1e-9)
    extent = np.array(shape) * voxel_sizes(OBLIQUE)
    assert np.all(np.abs(grid.shape - extent) <= 0.5)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("spacing", [0.3, 1.7, 9.0])
def test_few_slices(n, spacing):
    array = noise(n, 6, 7, seed=n)
    grid = resampled_grid(array.shape, np.eye(4), (spacing, 1.0, 1.0))
    expected = by_scipy(array, np.eye(4), grid.affine(np.eye(4)), grid.shape, order=3)
    np.testing.assert_allclose(
        resample(array, grid), expected.clip(array.min(), array.max()), atol=3e-6
    )


def test_lines_longer_than_a_tile_and_many_tiles(monkeypatch):
    array = noise(40, 9, 11)
    grid = resampled_grid(array.shape, np.diag([0.7, 1.3, 0.9, 1]), (1.0, 1.0, 1.0))
    whole = resample(array, grid)
    for size in (16, 1000):
        monkeypatch.setattr("sparsemae.data.preparing.resample._TILE", size)
        np.testing.assert_array_equal(resample(array, grid), whole)


def test_no_overshoot_and_zeros_stay_zeros():
    step = np.zeros((64, 16, 16), np.float32)
    step[40:] = 1
    out = resample(step, resampled_grid(step.shape, np.diag([2.0, 2, 2, 1]), (1.0, 1.0, 1.0)))
    assert (out.min(), out.max()) == (0, 1)
    assert np.abs(out[:40]).max() < 1e-7  # what rings of the step is lost in any air but 0


def test_equal_spacing_is_left_alone():
    array, mask = noise(12, 13, 14), noise(12, 13, 14) > 0
    affine = np.diag([1.0005, 1, 1, 1])
    grid = resampled_grid(array.shape, affine, (1.0, 1.0, 1.0))
    assert resample(array, grid) is array
    assert resample_mask(mask, grid) is mask
    np.testing.assert_array_equal(grid.affine(affine), affine)
    grid = resampled_grid(array.shape, np.diag([1.0, 1, 2, 1]), (1.0, 1.0, 1.0))
    assert resample(array, grid).shape == (12, 13, 28)
    np.testing.assert_allclose(grid.affine(np.diag([1.0, 1, 2, 1]))[:3, 3], (0, 0, -0.5))


def test_the_input_is_not_changed():
    array = noise(12, 13, 14)
    before = array.copy()
    resample(array, resampled_grid(array.shape, OBLIQUE, (1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(array, before)


PROGRAM = """
import hashlib, numpy as np
from sparsemae.data.preparing.resample import resample, resampled_grid
array = np.random.default_rng(0).standard_normal((60, 50, 40)).astype(np.float32)
grid = resampled_grid(array.shape, np.diag([0.74, 1.3, 2.1, 1]), (1.0, 1.0, 1.0))
print(hashlib.sha256(resample(array, grid).tobytes()).hexdigest())
"""


@pytest.mark.parametrize(
    "environment",
    [
        {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        # as on a CPU without AVX2: a matrix product there has other last bits
        {"NPY_DISABLE_CPU_FEATURES": "AVX512F AVX512_SKX AVX2 FMA3 X86_V3 X86_V4"},
    ],
)
def test_the_same_bits_with_any_threads_and_cpu(environment):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    here = {}
    exec(PROGRAM.replace("print(", "digest = ("), here)
    assert done.stdout.strip() == here["digest"]
