"""Label maps and masks."""

import numpy as np
import pytest

from sparsemae.data.read import read_labels, read_mask, read_volume

SHAPE = (5, 6, 7)


def classes_map(dtype="u1"):
    return (np.arange(210) % 4).astype(dtype).reshape(SHAPE)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_any_type_of_whole_numbers(tmp_path, put, warned, dtype, name):
    labels = read_labels(put(tmp_path / name, classes_map(dtype)), classes=[0, 1, 2, 3])
    assert labels.array.dtype == np.int32
    assert np.array_equal(labels.array, classes_map())
    assert labels.array.flags.c_contiguous
    np.testing.assert_allclose(labels.spacing, (2, 1.5, 3), rtol=1e-6)
    warned(labels)


def test_scaled_labels_are_rounded(tmp_path, put):
    stored = (classes_map("f4") * 80).astype("i2")
    labels = read_labels(put(tmp_path / "a.nii", stored, scl_slope=1 / 80))
    assert np.array_equal(labels.array, classes_map())


def test_labels_are_turned_like_their_image(tmp_path, put, ramp, affine):
    turned = affine.copy()
    turned[:3, 0] *= -1
    turned[:3, 3] += affine[:3, 0] * (SHAPE[0] - 1)
    image = read_volume(put(tmp_path / "image.nii"))
    labels = read_labels(
        put(tmp_path / "labels.nii", classes_map()[::-1], affine=turned), like=image
    )
    assert np.array_equal(labels.array, classes_map())
    np.testing.assert_allclose(labels.affine, affine, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("labels.negative", -1),
        ("labels.fractional", 1.5),
        ("labels.fractional", 1.002),
        ("labels.not_finite", np.nan),
        ("labels.not_finite", np.inf),
        ("labels.range", 2.0**31),
    ],
)
def test_what_is_no_label(tmp_path, put, refused, code, value):
    array = classes_map("f8")
    array[2, 3, 4] = value
    assert "a.nii" in refused(put(tmp_path / "a.nii", array), code, read_labels)


def test_the_largest_label_and_rounding(tmp_path, put):
    array = classes_map("f8")
    array[0, 0, :3] = 2**31 - 1, 1.0009, -0.0009
    labels = read_labels(put(tmp_path / "a.nii", array))
    assert labels.array[0, 0, :3].tolist() == [2**31 - 1, 1, 0]


def test_an_unseen_class_is_named(tmp_path, put, refused):
    message = refused(
        put(tmp_path / "a.nii", classes_map()), "labels.classes", read_labels, classes={0, 1, 3}
    )
    assert "class 2 is not among 0, 1, 3" in message
    many = np.arange(210).reshape(SHAPE)
    message = refused(
        put(tmp_path / "b.nii", many), "labels.classes", read_labels, classes=range(100)
    )
    assert "class 100, 101, 102, 103, 104, ... is not among 0, 1, 2, 3, 4, 5, 6, 7, ..." in message


def test_one_channel_per_class(tmp_path, put, refused):
    array = np.eye(4, dtype="u1")[classes_map()]
    refused(put(tmp_path / "a.nii", array), "labels.one_hot", read_labels)


def test_background_only_is_a_warning(tmp_path, put, warned):
    labels = read_labels(put(tmp_path / "a.nii", classes_map() * 0))
    assert not labels.array.any()
    warned(labels, "labels.empty")


def test_a_large_empty_map_is_no_bomb(tmp_path, put, warned):
    """2^24 voxels and more at over 100:1 are read ahead; of a map one value is no fault."""
    array = np.zeros((257, 256, 256), "u1")
    warned(read_labels(put(tmp_path / "a.nii.gz", array)), "labels.empty")
    array[-1, -1, -1] = 7
    labels = read_labels(put(tmp_path / "b.nii.gz", array))
    assert labels.array[-1, -1, -1] == 7
    assert labels.array.sum() == 7


@pytest.mark.parametrize("read", [read_labels, read_mask])
def test_the_grid_of_the_image(tmp_path, put, affine, refused, read):
    image = read_volume(put(tmp_path / "image.nii"))
    message = refused(put(tmp_path / "a.nii", classes_map()[:-1]), "labels.shape", read, like=image)
    assert "(4, 6, 7)" in message
    assert "(5, 6, 7)" in message
    moved, wider = affine.copy(), affine.copy()
    moved[1, 3] += 0.37
    read(put(tmp_path / "b.nii", classes_map(), affine=moved), like=image)
    moved[1, 3] += 0.01  # over a quarter of 1.5 mm
    wider[:3, 0] *= 1.1
    for other in (moved, wider):
        path = put(tmp_path / "b.nii", classes_map(), affine=other)
        refused(path, "labels.affine", read, like=image)


@pytest.mark.parametrize("dtype", ["u1", "i2", "f4"])
def test_a_mask_is_what_is_not_zero(tmp_path, put, dtype):
    image = read_volume(put(tmp_path / "image.nii"))
    array = classes_map(dtype) / 4 - 0.25 if dtype == "f4" else classes_map(dtype)
    mask = read_mask(put(tmp_path / "a.nii", array.astype(dtype)), image)
    assert mask.dtype == np.bool_
    assert np.array_equal(mask, array != 0)
    assert not read_mask(put(tmp_path / "b.nii", array.astype(dtype) * 0), image).any()


def test_a_mask_without_values(tmp_path, put, refused, ramp):
    image = read_volume(put(tmp_path / "image.nii"))
    array = classes_map("f4")
    array[0, 0, 0] = np.nan
    refused(put(tmp_path / "a.nii", array), "labels.not_finite", read_mask, like=image)


def test_real_label_maps(shared):
    paths = sorted((shared / "labels").glob("brain_*.nii.gz"))
    assert len(paths) == 12
    for path in (paths[0], paths[1]):  # float32 and int32
        labels = read_labels(path)
        assert labels.array.shape == (256, 256, 256)
        assert 50 <= len(np.unique(labels.array)) <= 60
