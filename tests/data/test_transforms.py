"""Preparation as a whole: what is air, the crop, masks on the same grid, and what is stored."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.phantom import draw_head
from sparsemae.data.preparing.resample import resample_mask, resampled_grid
from sparsemae.data.read import Volume
from sparsemae.data.reading.geometry import voxel_sizes
from sparsemae.data.transforms import prepare

OBLIQUE = np.array([[0.8, 0.1, 0, -7], [-0.1, 1.5, 0.2, 3], [0, -0.2, 3.0, 11], [0, 0, 0, 1]])
KEEP = PreprocessConfig(spacing=None, dtype="float32")


def volume(array, affine=None):
    affine = np.eye(4) if affine is None else affine
    return Volume(np.asarray(array, np.float32), affine, voxel_sizes(affine), Path("some.nii"))


@pytest.mark.parametrize("normalization", ["zscore", "percentile", "ct"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("air", [0.0, -1024.3, -1.3])
@pytest.mark.parametrize("spacing", [None, (1.0, 1.0, 1.0)])
def test_air_is_one_stored_value_and_raw_intensities_come_back(
    body, normalization, dtype, air, spacing
):
    array = body(air=air, shape=(64, 60, 56), inside=slice(20, -19))
    array[0, 0, 0] = 41  # no crop: there is air to look at
    array[-1, -1, -1] = 42
    config = PreprocessConfig(
        spacing=spacing, dtype=dtype, normalization=normalization, window=(-500, 500)
    )
    ready = prepare(volume(array, np.diag([0.8, 1.1, 1, 1])), config)
    assert (ready.crop_start, ready.crop_stop) == ((0, 0, 0), (64, 60, 56))
    assert ready.array.dtype == np.float32
    stored = ready.array.astype(dtype)
    np.testing.assert_array_equal(stored, ready.array)
    far = tuple(slice(n // 10, n // 10 + 5) for n in stored.shape)
    ends = stored[far][0, :, :], stored[-far[0].stop, far[1]]
    assert np.all(ends[0] == np.dtype(dtype).type(ready.background))
    assert float(np.dtype(dtype).type(ready.background)) == ready.background
    if spacing is None:
        back = ready.array.astype(np.float64) * ready.std + ready.mean
        if normalization == "percentile":
            inside = array[array != np.float32(air)]
            low, high = np.percentile(inside, (0.5, 99.5), method="nearest")
            array = np.where(array != np.float32(air), array.clip(low, high), array)
        expected = array.clip(-500, 500) if normalization == "ct" else array
        tolerance = 1e-3 if dtype == "float16" else 1e-6
        np.testing.assert_allclose(back, expected, atol=tolerance * np.abs(expected).max() + 0.02)


def test_zscore_of_the_foreground(body):
    array = body()
    ready = prepare(volume(array), KEEP)
    inside = array != 0
    assert ready.crop_start == (9, 9, 9)
    assert ready.mean == pytest.approx(array[inside].mean(dtype=np.float64), rel=1e-6)
    assert ready.std == pytest.approx(array[inside].std(dtype=np.float64), rel=1e-6)
    cropped = array[9:-8, 9:-8, 9:-8]
    np.testing.assert_allclose(ready.array, (cropped - ready.mean) / ready.std, atol=1e-5)
    assert ready.warnings == ()


def test_crop_and_resampling_keep_the_place_in_the_world(body):
    array = body(shape=(60, 50, 40))
    ready = prepare(volume(array, OBLIQUE), PreprocessConfig(spacing=(1.0, 1.2, 2.0)))
    assert voxel_sizes(ready.affine) == pytest.approx((1.0, 1.2, 2.0))
    middle = (np.array(ready.crop_start) + ready.crop_stop - 1) / 2
    expected = OBLIQUE @ (*middle, 1)
    found = ready.affine @ (*((np.array(ready.array.shape) - 1) / 2), 1)
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_masks_follow_the_image_and_do_not_move_the_crop(body):
    array = body(shape=(60, 50, 40))
    excluded = np.zeros(array.shape, bool)
    excluded[:30, :20] = True  # half of it in air that is cut off
    anatomy = array > 40
    config = PreprocessConfig(spacing=(1.0, 1.0, 1.0))
    plain = prepare(volume(array, OBLIQUE), config)
    ready = prepare(volume(array, OBLIQUE), config, excluded=excluded, anatomy=anatomy)
    assert (ready.crop_start, ready.crop_stop) == (plain.crop_start, plain.crop_stop)
    np.testing.assert_array_equal(ready.array, plain.array)
    np.testing.assert_array_equal(ready.affine, plain.affine)
    box = tuple(map(slice, ready.crop_start, ready.crop_stop))
    grid = resampled_grid(array[box].shape, OBLIQUE, config.spacing)
    np.testing.assert_array_equal(ready.excluded, resample_mask(excluded[box], grid))
    np.testing.assert_array_equal(ready.foreground, resample_mask(anatomy[box], grid))
    assert plain.excluded is None
    np.testing.assert_array_equal(plain.foreground, resample_mask(array[box] != 0, grid))
    for mask in (ready.excluded, ready.foreground, plain.foreground):
        assert (mask.dtype, mask.shape) == (bool, ready.array.shape)


def test_foreground_is_what_stands_out_of_noise(body):
    array = body(air=-1000, shape=(60, 50, 40))
    tissue = array != -1000
    array[~tissue] = np.random.default_rng(1).normal(-1000, 15, (~tissue).sum())
    ready = prepare(volume(array), PreprocessConfig(spacing=(0.8, 1.3, 1.0)))
    grid = resampled_grid(array.shape, np.eye(4), (0.8, 1.3, 1.0))
    assert (ready.foreground == resample_mask(tissue, grid)).mean() > 0.99


def test_masks_that_say_nothing(body):
    array = body()
    outside = np.zeros(array.shape, bool)
    outside[:3] = True  # excluded voxels that the crop removes
    ready = prepare(volume(array), KEEP, excluded=outside, anatomy=np.zeros(array.shape, bool))
    assert ready.excluded is None
    assert ready.foreground.all()
    assert [notice.code for notice in ready.warnings] == ["labels.empty"]


def test_absurd_voxels_are_clipped_with_a_warning(body):
    array = body()
    plain = prepare(volume(array), KEEP)
    spiked = array.copy()
    spiked[15, 15, 15], spiked[16, 16, 16] = 3e38, -3e38
    with np.errstate(over="raise", invalid="raise"):
        for config in (KEEP, PreprocessConfig(spacing=(0.7, 0.7, 0.7))):
            ready = prepare(volume(spiked), config)
            assert np.isfinite(ready.array).all()
            (notice,) = ready.warnings
            assert notice.code == "intensity.clipped"
            assert notice.message.startswith("some.nii: 2 voxels")
    ready = prepare(volume(spiked), KEEP)
    assert ready.array.max() <= plain.array.max() + 0.1
    assert (ready.mean, ready.std) == pytest.approx((plain.mean, plain.std), rel=1e-2)


def test_a_window_of_hounsfield_units_on_something_else_is_a_warning(body):
    config = PreprocessConfig(normalization="ct")
    assert prepare(volume(body(air=-1000)), config).warnings == ()
    codes = [notice.code for notice in prepare(volume(body().clip(0)), config).warnings]
    assert codes == ["intensity.not_hounsfield"]


def test_refusals_name_file_and_remedy(body):
    with pytest.raises(VolumeError, match=r"some.nii: .*remove the file") as error:
        prepare(volume((body() != 0).astype(np.float32)), KEEP)
    assert error.value.code == "intensity.flat"
    huge = volume(body(), np.diag([40.0, 40, 40, 1]))
    tracemalloc.start()
    for spacing in ((0.01, 0.01, 0.01), (1e-300, 1, 1), (0.3, 0.3, 0.3)):
        with pytest.raises(VolumeError, match=r"some.nii: .*choose a larger --spacing") as error:
            prepare(huge, PreprocessConfig(spacing=spacing))
        assert error.value.code == "geometry.too_large"
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    exact = PreprocessConfig(spacing=(0.5, 1, 1), max_voxels=46 * 19 * 15)
    assert prepare(volume(body()), exact).array.shape == (46, 19, 15)


def test_the_volume_is_not_changed_and_memory_is_bounded(body):
    array = body(shape=(130, 120, 110), inside=slice(2, -2))
    array.flags.writeable = False
    for spacing in (None, (0.9, 0.9, 0.9), (1.5, 0.7, 1.0)):
        tracemalloc.start()
        ready = prepare(volume(array), PreprocessConfig(spacing=spacing))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        tiles = 40e6  # a dozen tiles of 4 MiB in a cache
        assert peak < 14 * max(array.size, ready.array.size) + tiles


def test_a_head_at_its_own_size():
    array, affine = draw_head(0, size=48)
    ready = prepare(volume(array, affine), PreprocessConfig(spacing=(4.0, 4.0, 4.0)))
    inside = ready.array[ready.foreground]
    assert abs(inside.mean(dtype=np.float64)) < 0.2
    assert 0.8 < inside.std(dtype=np.float64) < 1.1
    assert ready.array[~ready.foreground].mean() < -1
