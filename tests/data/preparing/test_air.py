"""What is air: in MR, CT and normalised images, quiet or noisy, with tissue on the faces."""

import numpy as np
import pytest

from sparsemae.data.preparing.air import Air, find_air
from sparsemae.data.read import read_volume


def value_of(array):
    return find_air(array).value


def test_air_is_0_where_nothing_is_negative(body):
    assert value_of(body().clip(0)) == 0
    assert value_of(body(air=7.0).clip(3)) == 0


def test_air_of_ct_and_of_a_normalised_image(body):
    rng = np.random.default_rng(0)
    assert value_of(body(air=-1024)) == -1024
    assert value_of(body(air=-1.25)) == -1.25
    noisy = body(air=-1000)
    noisy[noisy == -1000] += np.round(rng.normal(0, 15, (noisy == -1000).sum()))
    assert value_of(noisy) == pytest.approx(-1000, abs=3)
    assert value_of(noisy) in noisy  # a value that voxels have, so the crop can find it
    bright = body(air=3)  # where some filter left a little below 0
    bright[20, 20, 20] = -1
    assert value_of(bright) == 0
    ringing = body()
    ringing[20, 20, 20] = -3
    assert value_of(ringing) == 0


def test_air_where_the_faces_cut_through_tissue(body):
    """Padding is dark even there, never water or fat."""
    chest = body((30, 30, 30), inside=slice(0, None))
    chest[8:22, 8:22, 8:22] = -850
    assert value_of(chest) == -850
    abdomen = body((30, 30, 30), inside=slice(0, None)) - 110  # fat, about -70, on the faces
    assert value_of(abdomen) < abdomen.mean() - 2 * abdomen.std()


def test_the_air_of_a_real_ct(shared):
    array = read_volume(shared / "images" / "example_ct.nii.gz").array
    assert -1010 < value_of(array) < -950


def test_crop_is_the_smallest_box():
    array = np.full((6, 7, 8), 2, np.float32)
    array[1, 2, 3] = array[4, 2, 6] = -1
    assert Air(2.0).crop(array) == ((1, 2, 3), (5, 3, 7))
    assert Air(0.0).crop(array) == ((0, 0, 0), (6, 7, 8))
    with pytest.raises(ValueError, match="every voxel is 0"):
        Air(0.0).crop(np.zeros((2, 2, 2), np.float32))


@pytest.mark.parametrize(("air", "noise"), [(-1000, 12.0), (0, 3.0)])
def test_noise_is_no_foreground(body, air, noise):
    """As in the CT and the MR image that a scanner gives, where hardly a voxel is exactly air."""
    array = body(air=air, shape=(60, 50, 40))
    tissue = array != air
    array[tissue] += 60 if air == 0 else 0
    outside = np.random.default_rng(1).normal(air, noise, (~tissue).sum())
    array[~tissue] = np.abs(outside) if air == 0 else outside
    found = find_air(array).foreground(array)
    assert found[tissue].mean() > 0.99
    assert found[~tissue].mean() < 0.01
    assert find_air(array).crop(array) == ((0, 0, 0), array.shape)


def test_noise_reaches_over_three_deviations_but_not_into_tissue(body):
    array = body(air=-1000, shape=(60, 50, 40))
    outside = array == -1000
    rng = np.random.default_rng(1)
    for deviation, reach in ((10.0, 3.37 * 10), (100.0, 0.25 * 1065)):
        array[outside] = rng.normal(-1000, deviation, outside.sum())
        assert find_air(array).noise == pytest.approx(reach, rel=0.05)


def test_without_noise_whatever_is_not_air_is_foreground(body):
    array = body(air=-1.25)
    array[20, 20, 20], array[20, 20, 21] = -1.2501, -1.2499
    np.testing.assert_array_equal(find_air(array).foreground(array), array != -1.25)


def test_tissue_on_the_faces_is_not_noise(body):
    array = body((30, 30, 30), inside=slice(0, None)) + 200
    assert find_air(array) == Air(0.0)
    assert find_air(array).foreground(array).all()
    array[:, :15] = 3.0  # half of each face in air: the median is in tissue or in air
    found = find_air(array).foreground(array)
    assert found[:, 15:].all()


def test_the_body_in_a_real_ct(shared):
    array = read_volume(shared / "images" / "example_ct.nii.gz").array
    found = find_air(array).foreground(array)
    assert found[array > -200].mean() > 0.999
    assert found[array < -950].mean() < 0.1
