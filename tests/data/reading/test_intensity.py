"""What is odd about intensities, and what becomes of it."""

import numpy as np
import pytest

from sparsemae.data.read import read_volume

RNG = np.random.default_rng(0)
NOISE = RNG.normal(100, 20, (20, 20, 25)).astype("f4")  # 10 000 voxels


def changed(count, value, base=NOISE):
    """`base` with its first `count` voxels set to `value`."""
    array = base.copy()
    array.reshape(-1)[:count] = value
    return array


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_up_to_one_percent_is_filled_with_the_lowest(tmp_path, put, refused, warned, value):
    volume = read_volume(put(tmp_path / "a.nii", changed(100, value)))
    rest = NOISE.reshape(-1)[100:]
    assert np.array_equal(volume.array.reshape(-1)[:100], np.full(100, rest.min()))
    assert np.array_equal(volume.array.reshape(-1)[100:], rest)
    (message,) = warned(volume, "intensity.filled")
    assert "100 of 10000" in message
    refused(put(tmp_path / "b.nii", changed(101, value)), "intensity.not_finite")


def test_nothing_left_after_filling_is_constant(tmp_path, put, refused):
    refused(put(tmp_path / "a.nii", changed(5, np.nan, NOISE * 0 + 7)), "intensity.constant")


def test_what_float32_cannot_hold_is_infinite(tmp_path, put, warned, refused):
    volume = read_volume(put(tmp_path / "a.nii", changed(3, 1e300, NOISE.astype("f8"))))
    warned(volume, "intensity.filled")
    assert np.isfinite(volume.array).all()
    refused(put(tmp_path / "b.nii", NOISE.astype("i2"), scl_slope=1e37), "intensity.slope")


@pytest.mark.parametrize("slope", [0, np.nan])
def test_no_slope_is_no_scaling(tmp_path, put, ramp, warned, slope):
    for intercept, codes in (
        (0, ()),
        (np.nan, ()),
        (np.inf, ()),
        (5, ("intensity.slope_ignored",)),
    ):
        volume = read_volume(put(tmp_path / "a.nii", scl_slope=slope, scl_inter=intercept))
        assert np.array_equal(volume.array, ramp())
        warned(volume, *codes)


def test_negative_and_tiny_slopes(tmp_path, put, ramp):
    volume = read_volume(put(tmp_path / "a.nii", scl_slope=-2, scl_inter=1))
    assert np.array_equal(volume.array, 1 - 2 * ramp().astype("f4"))
    volume = read_volume(put(tmp_path / "a.nii", scl_slope=1e-30))
    np.testing.assert_allclose(volume.array, ramp() * 1e-30, rtol=1e-6)


def test_large_integers_are_scaled_exactly(tmp_path, put, ramp):
    array = ramp(dtype="i4") + 2**30
    volume = read_volume(put(tmp_path / "a.nii", array, scl_slope=1, scl_inter=-(2.0**30)))
    assert np.array_equal(volume.array, ramp())  # in float32 throughout, steps of 64 would be left


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
def test_outliers_are_kept_with_a_warning(tmp_path, put, warned, value):
    volume = read_volume(put(tmp_path / "a.nii", changed(1, value)))
    assert volume.array.reshape(-1)[0] == np.float32(value)
    (message,) = warned(volume, "intensity.outliers")
    assert f"{value:g}" in message


def test_an_outlier_among_zeros(tmp_path, put, warned):
    volume = read_volume(put(tmp_path / "a.nii", changed(1, 2e30, NOISE * 0)))
    warned(volume, "intensity.nearly_constant", "intensity.outliers")


def test_a_bright_vessel_is_no_outlier(tmp_path, put, warned):
    warned(read_volume(put(tmp_path / "a.nii", changed(1, 10_000))))
    warned(read_volume(put(tmp_path / "a.nii", changed(1, 100_000))), "intensity.outliers")


CT = np.clip(RNG.normal(-400, 600, (20, 20, 25)), -1024, 3071).astype("i2")


@pytest.mark.parametrize("value", [-32768, -3024, -2000])
def test_padding_is_raised_to_the_lowest_measurement(tmp_path, put, warned, value):
    volume = read_volume(put(tmp_path / "a.nii", changed(2000, value, CT)))
    assert np.array_equal(volume.array, changed(2000, -1024, CT))
    warned(volume, "intensity.padding")


def test_padding_of_scaled_and_float_data(tmp_path, put, warned):
    stored = changed(2000, -32768, CT + 1024)
    volume = read_volume(put(tmp_path / "a.nii", stored, scl_slope=1, scl_inter=-1024))
    assert np.array_equal(volume.array, changed(2000, -1024, CT))
    lowest = np.finfo("f4").min
    volume = read_volume(put(tmp_path / "b.nii", changed(2000, lowest)))
    assert volume.array.min() == NOISE.reshape(-1)[2000:].min()
    warned(volume, "intensity.padding")


@pytest.mark.parametrize(
    "array",
    [
        CT,
        changed(2000, -1100, CT),  # air, clipped elsewhere
        changed(9, -3024, CT),  # too few for padding
        (np.arange(10_000) % 8192 - 4096).astype("i2").reshape(20, 20, 25),  # phase, no gap
        changed(2000, -1600, np.clip(CT * 2, -1550, 3000)),  # many at an end that is no gap away
        np.where(NOISE > 100, np.float32(1), np.float32(-2000)),  # two values: nothing to compare
    ],
    ids=["CT", "air", "few", "phase", "clipped", "binary"],
)
def test_what_is_no_padding_is_left_alone(tmp_path, put, warned, array):
    volume = read_volume(put(tmp_path / "a.nii", array))
    assert np.array_equal(volume.array, array.astype("f4"))
    warned(volume)


def test_nearly_constant(tmp_path, put, warned):
    flat = np.full((20, 20, 25), 5, "f4")
    for count, codes in ((10, ("intensity.nearly_constant",)), (11, ())):
        warned(read_volume(put(tmp_path / "a.nii", changed(count, 6, flat))), *codes)
        warned(read_volume(put(tmp_path / "a.nii", changed(count, 4, flat))), *codes)
    faint = (1e6 + RNG.integers(0, 4, flat.shape)).astype("f4")
    warned(read_volume(put(tmp_path / "b.nii", faint)), "intensity.nearly_constant")


def test_a_volume_of_several_slabs(tmp_path, put, warned):
    """More than 2^20 voxels: the first, the last and the odd one count like any other."""
    array = np.random.default_rng(0).integers(0, 99, (130, 130, 130)).astype("f4") + 100
    array[0, 0, 0], array[-1, -1, -1], array[64, 64, 64] = 1, np.nan, 3e38
    volume = read_volume(put(tmp_path / "a.nii", array))
    warned(volume, "intensity.filled", "intensity.outliers")
    array[-1, -1, -1] = 1
    assert np.array_equal(volume.array, array)
