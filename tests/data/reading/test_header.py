"""Sizes, types, frames and offsets of NIfTI headers."""

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.read import read_volume

NUMERIC = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("dtype", NUMERIC)
def test_every_numeric_type_in_both_byte_orders(tmp_path, put, ramp, dtype, order, version):
    if dtype[0] == "f":
        array = ramp(dtype=dtype) / 7 - 3
    else:
        limits = np.iinfo(dtype)
        array = (ramp() % 100).astype(dtype)
        array[0, 0, :2] = max(limits.min, -100), limits.max
    volume = read_volume(put(tmp_path / "a.nii.gz", array, order=order, version=version))
    assert np.array_equal(volume.array, array.astype(np.float32))
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous


@pytest.mark.parametrize("dtype", NUMERIC)
def test_scaling_is_that_of_nibabel_rounded_once(tmp_path, put, ramp, dtype):
    path = put(tmp_path / "a.nii", ramp(dtype=dtype) % 100, scl_slope=0.1, scl_inter=-1000)
    exact = nib.load(path).get_fdata(dtype=np.float64)
    assert np.array_equal(read_volume(path).array, exact.astype(np.float32))


def test_trailing_sizes_of_one_are_dropped(tmp_path, put, ramp):
    for shape in ((3, 4, 5, 1), (3, 4, 5, 1, 1, 1, 1)):
        path = put(tmp_path / "a.nii", ramp(shape))
        assert np.array_equal(read_volume(path).array, ramp((3, 4, 5)))
    fields = {"dim": [4, 3, 4, 5, 1, 77, 0, 0]}  # beyond dim[0] they mean nothing
    read_volume(put(tmp_path / "b.nii", ramp((3, 4, 5)), **fields))


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_frame_is_read_when_named(tmp_path, put, ramp, refused, warned, name):
    array = ramp((3, 4, 5, 6))
    path = put(tmp_path / name, array)
    for frame in range(6):
        volume = read_volume(path, frame=frame)
        assert np.array_equal(volume.array, array[..., frame])
        warned(volume)
    for frame in (6, -1):
        refused(path, "header.frames", frame=frame)
    single = put(tmp_path / f"single{name}", array[..., 0])
    assert np.array_equal(read_volume(single, frame=0).array, array[..., 0])
    refused(single, "header.frames", frame=1)


def test_damage_in_another_frame_is_seen(tmp_path, put, ramp, refused):
    path = put(tmp_path / "a.nii.gz", ramp((3, 4, 5, 6)))
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)
    refused(path, "container.damaged", frame=0)
    path = put(tmp_path / "b.nii", ramp((3, 4, 5, 6)))
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "container.short", frame=0)


def test_the_limit_counts_voxels_of_a_frame(tmp_path, put, ramp, refused):
    path = put(tmp_path / "a.nii", ramp((3, 4, 5, 6)))
    read_volume(path, frame=1, max_voxels=60)
    refused(path, "header.budget", frame=1, max_voxels=59)


@pytest.mark.parametrize("value", [0, np.nan, -1, 351, 100, 352.5, -np.inf])
def test_an_unusable_vox_offset_is_352(tmp_path, put, ramp, warned, value):
    volume = read_volume(put(tmp_path / "a.nii.gz", vox_offset=value))
    assert np.array_equal(volume.array, ramp())
    warned(volume, "header.offset_assumed")


@pytest.mark.parametrize("gap", [1, 16, 1000, 2_000_000])
def test_voxels_may_begin_later(tmp_path, put, ramp, gap):
    between = bytes(4) + b"\xff" * gap
    for name in ("a.nii", "a.nii.gz"):
        volume = read_volume(put(tmp_path / name, between=between, vox_offset=352 + gap))
        assert np.array_equal(volume.array, ramp())
        assert volume.warnings == ()


@pytest.mark.parametrize("order", "<>")
def test_extensions_are_passed_over(tmp_path, put, ramp, warned, order):
    def entry(size):
        return np.array([size, 4], order + "i4").tobytes() + b"x" * (size - 8)

    for rest, codes in ((b"", ()), (bytes(32), ("header.padding",)), (b"\xff" * 4, ())):
        between = b"\1\0\0\0" + entry(16) + entry(4096) + entry(8) + rest
        path = put(tmp_path / "a.nii", order=order, between=between, vox_offset=348 + len(between))
        volume = read_volume(path)
        assert np.array_equal(volume.array, ramp())
        warned(volume, *codes)


def test_extensions_of_nibabel(tmp_path, ramp, affine):
    image = nib.Nifti1Image(ramp(), affine)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"x" * 999))
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_volume(tmp_path / "a.nii.gz")
    assert np.array_equal(volume.array, ramp())
    assert volume.warnings == ()


def test_bitpix_that_contradicts_datatype(tmp_path, put, ramp, warned):
    volume = read_volume(put(tmp_path / "a.nii", bitpix=8))
    assert np.array_equal(volume.array, ramp())
    warned(volume, "header.bitpix")
