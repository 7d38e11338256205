"""Random transforms: what is drawn, that options do not disturb one another, and the box needed."""

import math

import numpy as np
import pytest
from scipy.stats import kstest

from sparsemae.config import build_config
from sparsemae.data.loading.affine import AugmentConfig, draw, needed_box
from sparsemae.errors import UserError

CUBIC = (1.0, 1.0, 1.0)
ALWAYS = {"rotation_probability": 1.0, "scale_probability": 1.0}


def draws(count=2000, spacing=CUBIC, **options):
    config = AugmentConfig(**options)
    return [draw(np.random.default_rng(i), config, spacing) for i in range(count)]


def angles(matrix):
    """Of a rotation about the first, then the second, then the third axis."""
    first = math.atan2(-matrix[2, 1], matrix[2, 2]) * -1
    second = math.asin(matrix[2, 0]) * -1
    third = math.atan2(matrix[1, 0], matrix[0, 0])
    return np.rad2deg([first, second, third])


def test_nothing_is_drawn_when_all_is_off():
    off = {"mirror": False, "rotation_probability": 0.0, "scale_probability": 0.0}
    for one in draws(200, **off):
        assert one.matrix is None
        assert one.flips == (False, False, False)
    for options in ({"rotation": 0.0}, {"rotation_probability": 0.0}):
        assert all(d.matrix is None for d in draws(50, scale=(1.0, 1.0), **options))


def test_probabilities_are_the_published_ones():
    found = draws(4000)
    flips = np.array([d.flips for d in found])
    assert np.abs(flips.mean(0) - 0.5).max() < 0.03
    assert abs(np.mean([d.matrix is not None for d in found]) - 0.36) < 0.03  # 1 - 0.8^2
    only = draws(4000, scale_probability=0.0)
    assert abs(np.mean([d.matrix is not None for d in only]) - 0.2) < 0.025


def test_angles_are_uniform_and_independent():
    found = draws(3000, mirror=False, rotation=30.0, rotation_probability=1.0, scale_probability=0)
    assert all(np.allclose(d.matrix @ d.matrix.T, np.eye(3)) for d in found)
    assert all(np.linalg.det(d.matrix) == pytest.approx(1) for d in found)
    turned = np.array([angles(d.matrix) for d in found])
    for axis in range(3):
        assert kstest(turned[:, axis], "uniform", (-30, 60)).pvalue > 1e-3
    assert np.abs(np.corrcoef(turned.T) - np.eye(3)).max() < 0.08


def test_a_scale_above_one_shows_more():
    """As in nnU-Net: the factor multiplies sampling coordinates, so above 1 things are smaller."""
    found = draws(3000, mirror=False, rotation_probability=0.0, scale_probability=1.0)
    factors = np.array([d.matrix[0, 0] for d in found])
    assert all(np.allclose(d.matrix, d.matrix[0, 0] * np.eye(3)) for d in found)
    assert kstest(factors, "uniform", (0.7, 0.7)).pvalue > 1e-3
    zoomed_out = next(d.matrix for d in found if d.matrix[0, 0] > 1.3)
    start, stop, _ = needed_box(np.array([20, 20, 20]), (10, 10, 10), zoomed_out, (50, 50, 50))
    assert min(b - a for a, b in zip(start, stop, strict=True)) > 12


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 1.0, 0.5)])
def test_lengths_in_mm_are_kept_but_for_the_scale(spacing):
    mm = np.diag(spacing)
    rng = np.random.default_rng(0)
    for one in draws(50, spacing, **ALWAYS):
        rigid = mm @ one.matrix @ np.linalg.inv(mm)
        factor = abs(np.linalg.det(rigid)) ** (1 / 3)
        assert 0.7 <= factor <= 1.4
        offset = rng.standard_normal(3)
        assert np.linalg.norm(rigid @ offset) == pytest.approx(factor * np.linalg.norm(offset))
        assert (np.linalg.det(rigid) < 0) == (sum(one.flips) % 2 == 1)


def test_flips_are_in_the_matrix():
    plain, flipped = (draws(50, mirror=m, **ALWAYS) for m in (False, True))
    for a, b in zip(plain, flipped, strict=True):
        assert np.allclose(b.matrix, a.matrix @ np.diag([-1.0 if f else 1.0 for f in b.flips]))
    assert len({d.flips for d in flipped}) == 8


def test_options_do_not_disturb_one_another():
    """Switching one off leaves what the others draw, and what is drawn afterwards."""
    alone = {
        "mirror": {"rotation_probability": 0.0, "scale_probability": 0.0},
        "rotation": {"mirror": False, "scale_probability": 0.0, "rotation_probability": 1.0},
        "scale": {"mirror": False, "rotation_probability": 0.0, "scale_probability": 1.0},
    }
    together = draws(60, mirror=True, **ALWAYS)
    parts = {name: draws(60, **options) for name, options in alone.items()}
    for i, whole in enumerate(together):
        flips = parts["mirror"][i].flips
        assert whole.flips == flips
        expected = parts["rotation"][i].matrix @ parts["scale"][i].matrix
        assert np.allclose(whole.matrix, expected @ np.diag(np.where(flips, -1, 1)))
    after = []
    for options in ({}, *alone.values()):
        rng = np.random.default_rng(0)
        draw(rng, AugmentConfig(**options), CUBIC)
        after.append(rng.random())
    assert len(set(after)) == 1


def touched(begin, patch_size, matrix):
    """Least and greatest coordinate along each axis, by going through all voxels."""
    half = (np.array(patch_size) - 1) / 2
    offsets = np.stack(np.meshgrid(*map(np.arange, patch_size), indexing="ij"), -1) - half
    points = (offsets @ matrix.T + begin + half).reshape(-1, 3)
    return points.min(0), points.max(0)


@pytest.mark.parametrize("patch_size", [(6, 7, 8), (1, 5, 9)])
def test_the_box_is_the_least_that_interpolation_touches(patch_size):
    shape = (200, 200, 200)
    begin = np.array([90, 91, 92])
    for one in draws(60, (1.0, 2.0, 0.7), **ALWAYS):
        start, stop, beyond = needed_box(begin, patch_size, one.matrix, shape)
        low, high = touched(begin, patch_size, one.matrix)
        assert not beyond
        assert np.array_equal(start, np.floor(low - 1e-3))
        assert np.array_equal(stop, np.ceil(high + 1e-3) + 1)


def test_the_box_is_clipped_to_the_volume():
    matrix = 1.1 * draws(1, scale_probability=0.0, rotation_probability=1.0)[0].matrix
    for begin, inside in (([-3, 8, 8], False), ([16, 8, 8], False), ([8, 8, 8], True)):
        start, stop, beyond = needed_box(np.array(begin), (8, 8, 8), matrix, (24, 24, 24))
        assert beyond != inside
        assert min(start) >= 0
        assert max(stop) <= 24


def test_a_patch_that_is_not_resampled_needs_itself():
    assert needed_box(np.array([1, 0, 2]), (4, 5, 6), None, (5, 5, 8)) == (
        *((1, 0, 2), (5, 5, 8)),
        False,
    )
    assert needed_box(np.array([1, -2, 2]), (4, 9, 6), None, (5, 5, 8)) == (
        *((1, 0, 2), (5, 5, 8)),
        True,
    )


WRONG = {
    "rotation": (-1.0, "greater than or equal to 0"),
    "rotation_probability": (1.5, "less than or equal to 1"),
    "scale": ([1.4, 0.7], "give two numbers above 0, the smaller first"),
    "scale_probability": (True, "valid number"),
    "mirror": (1, "valid boolean"),
}


@pytest.mark.parametrize("key", WRONG)
def test_wrong_options_are_named(key):
    value, message = WRONG[key]
    with pytest.raises(UserError, match=f"config key {key}: .*{message}"):
        build_config(AugmentConfig, {key: value})


@pytest.mark.parametrize("scale", [[0, 1], [1], 1.0, [0.7, "1"], [True, 2], [1, float("inf")]])
def test_wrong_scales_are_refused(scale):
    with pytest.raises(UserError, match="scale: give two numbers above 0"):
        build_config(AugmentConfig, {"scale": scale})
