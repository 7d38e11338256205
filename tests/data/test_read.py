import itertools

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.read import read_volume

AFFINE = np.array([[2.0, 0.1, 0, -7], [-0.1, 1.5, 0.2, 3], [0, -0.2, 3.0, 11], [0, 0, 0, 1]])
ALL_48 = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]


def ramp(shape=(5, 6, 7)):
    return np.arange(np.prod(shape), dtype=np.int16).reshape(shape)


def save(path, array, affine=AFFINE):
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def stored_as(image, codes):
    """The same image with its axes in the order and direction of `codes`."""
    have, want = nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    return image.as_reoriented(nib.orientations.ornt_transform(have, want))


@pytest.mark.parametrize("codes", ALL_48)
def test_every_orientation_is_one_volume(tmp_path, codes):
    image = nib.Nifti1Image(ramp(), AFFINE)
    stored = stored_as(image, codes)
    assert "".join(nib.aff2axcodes(stored.affine)) == codes
    nib.save(stored, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert np.array_equal(volume.array, ramp())
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, np.linalg.norm(AFFINE[:3, :3], axis=0), rtol=1e-6)


def test_real_orientations_are_one_volume(shared):
    paths = sorted((shared / "orientations").glob("*.nii.gz"))
    assert len(paths) == 6
    expected = read_volume(shared / "orientations" / "RAS.nii.gz")
    for path in paths:
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.array, expected.array, path.name)
        np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-3, err_msg=path.name)


def test_scaling_frames_and_byte_order(tmp_path):
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.int16)
    image = nib.Nifti1Image(ramp()[..., None], AFFINE, header)
    image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / "a.nii")
    raw = nib.load(tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    assert volume.array.shape == (5, 6, 7)
    np.testing.assert_allclose(volume.array, raw.get_fdata()[..., 0], rtol=1e-6)
