"""From sform, qform, voxel sizes and units to one affine."""

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.read import read_volume, voxel_sizes

DIAGONAL = np.diag([2.0, 1.5, 3.0, 1.0])


def qform(affine):
    """The fields of a header that say `affine` by quaternion alone."""
    fields = nib.Nifti1Header()
    fields.set_data_shape((5, 6, 7))
    fields.set_qform(affine, code=1)
    names = ("pixdim", "quatern_b", "quatern_c", "quatern_d")
    offsets = ("qoffset_x", "qoffset_y", "qoffset_z")
    return {name: fields[name] for name in (*names, *offsets)} | {"qform_code": 1}


def test_sform_alone_and_qform_alone(tmp_path, put, affine, ramp, warned):
    for options in ({}, qform(affine) | {"sform_code": 0}, qform(affine)):
        volume = read_volume(put(tmp_path / "a.nii", **options))
        np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
        np.testing.assert_allclose(volume.spacing, (2, 1.5, 3), atol=1e-5)
        assert np.array_equal(volume.array, ramp())
        warned(volume)


@pytest.mark.parametrize("qfac", [-1, 0, 1])
def test_qfac_turns_the_third_axis_and_0_means_1(tmp_path, put, ramp, warned, qfac):
    fields = qform(DIAGONAL) | {"sform_code": 0}
    fields["pixdim"] = [qfac, *fields["pixdim"][1:]]
    volume = read_volume(put(tmp_path / "a.nii", **fields))
    assert np.array_equal(volume.array, ramp()[..., :: -1 if qfac < 0 else 1])
    warned(volume)


def test_the_sform_wins_and_a_difference_is_told(tmp_path, put, affine, warned):
    moved = affine.copy()
    moved[0, 3] += 0.7
    volume = read_volume(put(tmp_path / "a.nii", **qform(moved)))
    warned(volume)  # less than half a voxel
    moved[0, 3] += 0.2
    volume = read_volume(put(tmp_path / "a.nii", **qform(moved)))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    (message,) = warned(volume, "geometry.forms")
    assert "0.9" in message
    mirrored = affine @ np.diag([-1, 1, 1, 1])
    warned(read_volume(put(tmp_path / "a.nii", **qform(mirrored))), "geometry.forms")


@pytest.mark.parametrize(
    "broken",
    [
        {"srow_x": [0, 0, 0, 0], "srow_y": [0, 0, 0, 0], "srow_z": [0, 0, 0, 0]},
        {"srow_x": [np.nan, 0, 0, 0]},
        {"srow_x": [0, 0, np.inf, 0]},
    ],
)
def test_an_invalid_sform_gives_way_to_the_qform(tmp_path, put, affine, warned, broken):
    volume = read_volume(put(tmp_path / "a.nii", **qform(affine) | broken))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    (message,) = warned(volume, "geometry.fallback")
    assert "the sform is invalid" in message


@pytest.mark.parametrize(
    "broken",
    [
        {"quatern_b": 1.5},
        {"quatern_b": np.nan},
        {"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]},
        {"pixdim": [1, 1, -1, 1, 1, 1, 1, 1]},
        {"pixdim": [1, 1, 1, np.nan, 1, 1, 1, 1]},
        {"qoffset_x": np.inf},
    ],
)
def test_an_invalid_qform_gives_way_to_the_sform(tmp_path, put, affine, warned, broken):
    volume = read_volume(put(tmp_path / "a.nii", **qform(affine) | broken))
    np.testing.assert_allclose(volume.affine, affine, atol=1e-5)
    (message,) = warned(volume, "geometry.fallback")
    assert "the qform is invalid" in message


def test_invalid_forms_are_refused_together(tmp_path, put, affine, refused):
    broken = qform(affine) | {"srow_x": [0, 0, 0, 0], "quatern_b": 2}
    refused(put(tmp_path / "a.nii", **broken), "geometry.affine")


def test_without_forms_only_voxel_sizes_are_known(tmp_path, put, ramp, warned):
    path = put(tmp_path / "a.nii", sform_code=0, pixdim=[1, 2, 1.5, 3, 1, 1, 1, 1])
    volume = read_volume(path)
    assert np.array_equal(volume.array, ramp()[::-1])  # Analyze's first axis runs to the left
    assert volume.spacing == (2, 1.5, 3)
    np.testing.assert_allclose(
        nib.as_closest_canonical(nib.load(path)).affine, volume.affine, atol=1e-6
    )
    warned(volume, "geometry.none")
    path = put(tmp_path / "b.nii", sform_code=0, pixdim=[1, -2, 1.5, 3, 1, 1, 1, 1])
    assert np.array_equal(read_volume(path).affine, volume.affine)


@pytest.mark.parametrize(("code", "factor"), [(1, 1e-3), (3, 1e3), (11, 1e3), (0, 1), (10, 1)])
def test_units_are_converted_to_millimetres(tmp_path, put, affine, warned, code, factor):
    written = np.diag([factor, factor, factor, 1]) @ affine
    for options in ({"affine": written}, qform(written) | {"sform_code": 0}):
        volume = read_volume(put(tmp_path / "a.nii", xyzt_units=code, **options))
        np.testing.assert_allclose(volume.affine, affine, rtol=1e-4, atol=1e-4)
        warned(volume, *(("geometry.units",) if factor != 1 else ()))


@pytest.mark.parametrize("size", [0.0099, 50.1, 1000.0])
def test_voxel_sizes_have_limits(tmp_path, put, refused, size):
    refused(put(tmp_path / "a.nii", affine=np.diag([1, size, 1, 1.0])), "geometry.spacing")


@pytest.mark.parametrize("size", [0.0101, 49.9])
def test_voxel_sizes_within_the_limits(tmp_path, put, warned, size):
    warned(read_volume(put(tmp_path / "a.nii", affine=np.diag([1, size, 1, 1.0]))))


@pytest.mark.parametrize(
    ("degrees", "code"),
    [(0.9, None), (1.1, "geometry.shear"), (29, "geometry.shear"), (31, "geometry.sheared")],
)
@pytest.mark.parametrize("axes", [(0, 1), (1, 2), (2, 0)])
def test_shear(tmp_path, put, warned, refused, degrees, code, axes):
    sheared = np.eye(4)
    sheared[axes] = np.tan(np.radians(degrees))
    path = put(tmp_path / "a.nii", affine=sheared)
    if code == "geometry.sheared":
        refused(path, code)
    else:
        warned(read_volume(path), *([code] if code else []))


def test_voxel_sizes_of_an_affine(affine):
    np.testing.assert_allclose(voxel_sizes(affine), (2, 1.5, 3))
