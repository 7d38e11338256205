"""Results go back to the grid of their file: array order, affine, codes and all."""

import gzip

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.read import NativeGrid, read_labels, read_volume
from sparsemae.data.reading.native import to_native
from sparsemae.errors import UserError
from sparsemae.predicting.write import label_dtype, write_like

KEPT = (
    *("sizeof_hdr", "dim_info", "dim", "pixdim", "xyzt_units", "descrip", "qform_code"),
    *("sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z", "toffset"),
)


def classes_of(array):
    """A label map on the grid of `array` that no flip or exchange of axes keeps."""
    return (np.arange(array.size).reshape(array.shape) * 7 // 3 % 5).astype(np.uint8)


def check(source, target, like=None):
    """A written map comes back, and its header is that of the source."""
    volume = read_volume(source)
    labels = classes_of(volume.array)
    write_like(target, labels, volume.native, label_dtype(5))
    back = read_labels(target, like=volume)
    assert np.array_equal(back.array, labels)
    np.testing.assert_allclose(back.affine, volume.affine, rtol=1e-7, atol=1e-7)
    image = nib.load(target)
    assert image.get_data_dtype() == np.uint8
    assert image.header.get_intent()[0] == "label"
    assert (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    assert (image.header["cal_min"], image.header["cal_max"]) == (0, 0)
    assert (image.header["bitpix"], image.header["magic"]) == (8, image.header.single_magic)
    if like is not None:
        np.testing.assert_array_equal(back.affine, volume.affine)
        assert image.shape == like.shape
        assert nib.aff2axcodes(image.affine) == nib.aff2axcodes(like.affine)
        np.testing.assert_array_equal(image.affine, like.affine)
        for field in KEPT:
            np.testing.assert_array_equal(image.header[field], like.header[field], field)
    return image, volume


def test_every_orientation_is_written_back(tmp_path, stored_as, codes):
    array = np.arange(5 * 6 * 7, dtype=np.int16).reshape(5, 6, 7)
    stored = stored_as(array, codes)
    nib.save(stored, tmp_path / "a.nii")
    image, volume = check(tmp_path / "a.nii", tmp_path / "out.nii", nib.load(tmp_path / "a.nii"))
    assert volume.native.shape == stored.shape
    np.testing.assert_array_equal(to_native(volume.array, volume.native), stored.dataobj)
    np.testing.assert_allclose(volume.native.affine, stored.affine, atol=1e-5)
    expected = stored_as(classes_of(array), codes)
    np.testing.assert_array_equal(image.dataobj, expected.dataobj)
    both = np.stack([volume.array, -volume.array])
    np.testing.assert_array_equal(to_native(both, volume.native)[1], -np.asarray(stored.dataobj))


@pytest.mark.parametrize("name", ["ASL", "LAS", "LPI", "PIR", "RAS", "SRP"])
def test_real_orientations_are_written_back(shared, tmp_path, name):
    source = shared / "orientations" / f"{name}.nii.gz"
    image, _ = check(source, tmp_path / "out.nii.gz", nib.load(source))
    assert "".join(nib.aff2axcodes(image.affine)) == name
    reference = read_volume(shared / "orientations" / "RAS.nii.gz")
    back = read_labels(tmp_path / "out.nii.gz").array
    np.testing.assert_array_equal(back, classes_of(reference.array))


def forms(image, sform, qform):
    image.set_sform(image.affine, sform)
    image.set_qform(image.affine, qform)


@pytest.mark.parametrize(("sform", "qform"), [(2, 0), (0, 3), (1, 4), (0, 0)])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f8"])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".img"])
@pytest.mark.parametrize("version", [1, 2])
def test_the_header_is_that_of_the_source(
    tmp_path, stored_as, sform, qform, dtype, ending, version
):
    array = (np.arange(5 * 6 * 7).reshape(5, 6, 7) % 200).astype(dtype)
    turned = stored_as(array, "PSR", np.diag([2, 1.5, 3, 1.0]))
    kind = {
        (1, False): nib.Nifti1Image,
        (1, True): nib.Nifti1Pair,
        (2, False): nib.Nifti2Image,
        (2, True): nib.Nifti2Pair,
    }[version, ending == ".img"]
    header = kind.header_class()
    header.set_data_dtype(dtype)
    image = kind(np.asarray(turned.dataobj), turned.affine, header)
    forms(image, sform, qform)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"], image.header["toffset"] = b"from a scanner", 2
    image.header["cal_max"] = 80
    image.header["intent_name"], image.header["intent_p1"] = b"other", 3
    if dtype != "f8":
        image.header.set_slope_inter(0.5, -3)
    nib.save(image, tmp_path / f"a{ending}")
    like = nib.load(tmp_path / f"a{ending}")
    for name in ("out.nii", "out.nii.gz"):
        written, _ = check(tmp_path / f"a{ending}", tmp_path / name, like)
        assert type(written) is (nib.Nifti1Image if version == 1 else nib.Nifti2Image)
        assert (written.header["intent_name"], written.header["intent_p1"]) == (b"", 0)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_big_endian_source(tmp_path, oblique, kind):
    array = np.arange(5 * 6 * 7, dtype=">i2").reshape(5, 6, 7)
    nib.save(kind(array, oblique), tmp_path / "little.nii")
    little = nib.load(tmp_path / "little.nii")
    fields = little.header.as_byteswapped(">")
    fields["vox_offset"], fields["scl_slope"], fields["scl_inter"] = fields["sizeof_hdr"] + 4, 1, 0
    (tmp_path / "a.nii").write_bytes(fields.binaryblock + bytes(4) + array.tobytes(order="F"))
    assert nib.load(tmp_path / "a.nii").header.endianness == ">"
    written, _ = check(tmp_path / "a.nii", tmp_path / "out.nii", little)
    assert written.header.endianness == "<"


def test_one_frame_of_a_series_is_a_volume(tmp_path, stored_as):
    array = np.asarray(stored_as(np.arange(210, dtype=np.int16).reshape(5, 6, 7), "SRP").dataobj)
    for frames in (array[..., None], np.stack([array, array + 1], -1)):
        image = nib.Nifti1Image(frames, np.diag([1, 2, 3, 1]))
        image.header["pixdim"][4] = 2.5
        nib.save(image, tmp_path / "a.nii.gz")
        volume = read_volume(tmp_path / "a.nii.gz", frame=frames.shape[3] - 1)
        write_like(tmp_path / "out.nii.gz", classes_of(volume.array), volume.native, np.uint8)
        written = nib.load(tmp_path / "out.nii.gz")
        assert written.shape == array.shape
        assert written.header["dim"].tolist() == [3, *array.shape, 1, 1, 1, 1]
        np.testing.assert_array_equal(read_labels(written.get_filename()).affine, volume.affine)


def test_units_stay_those_of_the_file(tmp_path, oblique):
    image = nib.Nifti1Image(np.arange(210, dtype=np.int16).reshape(5, 6, 7), oblique / 1e3)
    image.header.set_xyzt_units("meter")
    nib.save(image, tmp_path / "a.nii")
    check(tmp_path / "a.nii", tmp_path / "out.nii", nib.load(tmp_path / "a.nii"))


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
def test_other_formats_keep_their_grid(tmp_path, ending):
    itk = pytest.importorskip("SimpleITK")
    image = itk.GetImageFromArray(np.arange(210, dtype=np.int16).reshape(7, 6, 5))
    image.SetSpacing((0.7, 1.5, 3))
    image.SetOrigin((-20, 31, 7))
    image.SetDirection((0, -0.8, 0.6, 1, 0, 0, 0, 0.6, 0.8))
    source = tmp_path / f"a.{ending}"
    itk.WriteImage(image, str(source))
    written, volume = check(source, tmp_path / "out.nii.gz")
    assert volume.native.header is None
    assert written.shape == image.GetSize()
    assert written.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(written.header.get_zooms(), image.GetSpacing(), rtol=1e-6)
    twin = itk.ReadImage(str(tmp_path / "out.nii.gz"))
    np.testing.assert_allclose(twin.GetOrigin(), image.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(twin.GetDirection(), image.GetDirection(), atol=1e-5)


def test_a_sheared_grid_has_no_qform(tmp_path):
    affine = np.array([[1, 0.1, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7], [0, 0, 0, 1.0]])
    native = NativeGrid((5, 6, 7), affine, ((0, 1), (1, 1), (2, 1)))
    labels = classes_of(np.empty((5, 6, 7)))
    write_like(tmp_path / "out.nii", labels, native, np.uint8)
    header = nib.load(tmp_path / "out.nii").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)
    back = read_labels(tmp_path / "out.nii")
    np.testing.assert_allclose(back.affine, affine, atol=1e-6)
    assert [notice.code for notice in back.warnings] == ["geometry.shear"]


def test_a_grid_too_long_for_nifti1(tmp_path):
    native = NativeGrid((2, 2, 1 << 15), np.eye(4), ((0, 1), (1, 1), (2, 1)))
    labels = np.zeros(native.shape, np.uint8)
    labels[1, 0, -1] = 3
    write_like(tmp_path / "out.nii.gz", labels, native, np.uint8)
    assert np.array_equal(read_labels(tmp_path / "out.nii.gz").array, labels)


def test_probabilities_are_frames_without_the_label_intent(tmp_path, stored_as):
    nib.save(stored_as(np.arange(210, dtype=np.int16).reshape(5, 6, 7), "LSA"), tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    both = np.stack([volume.array, -volume.array, volume.array / 3])
    write_like(tmp_path / "out.nii.gz", both, volume.native, np.float32)
    written = nib.load(tmp_path / "out.nii.gz")
    assert written.header.get_intent()[0] == "none"
    assert written.shape == (*volume.native.shape, 3)
    np.testing.assert_array_equal(
        np.moveaxis(written.get_fdata(dtype=np.float32), 3, 0), to_native(both, volume.native)
    )


@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, "u1"), (256, "u1"), (257, "u2"), (65536, "u2"), (65537, "u4")]
)
def test_the_smallest_type_that_holds_the_classes(tmp_path, classes, dtype):
    assert label_dtype(classes) == np.dtype(dtype)
    labels = np.zeros((2, 3, 4), np.int64)
    labels[1, 2, 3] = classes - 1
    native = NativeGrid((2, 3, 4), np.eye(4), ((0, 1), (1, 1), (2, 1)))
    write_like(tmp_path / "out.nii", labels, native, label_dtype(classes))
    assert nib.load(tmp_path / "out.nii").get_data_dtype() == np.dtype(dtype)
    assert np.array_equal(read_labels(tmp_path / "out.nii").array, labels)


def test_equal_maps_are_equal_files_and_none_is_half(tmp_path, monkeypatch):
    native = NativeGrid((5, 6, 7), np.eye(4), ((2, -1), (1, 1), (0, 1)))
    labels = classes_of(np.empty((7, 6, 5)))
    for name in ("one.nii.gz", "two.nii.gz"):
        write_like(tmp_path / name, labels, native, np.uint8)
    first = (tmp_path / "one.nii.gz").read_bytes()
    assert first == (tmp_path / "two.nii.gz").read_bytes()
    write_like(tmp_path / "plain.nii", labels, native, np.uint8)
    assert gzip.decompress(first) == (tmp_path / "plain.nii").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_like(tmp_path / "one.nii.gz", labels[::-1], native, np.uint8)
    assert (tmp_path / "one.nii.gz").read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 3


def test_refusals(tmp_path):
    native = NativeGrid((5, 6, 7), np.eye(4), ((2, -1), (1, 1), (0, 1)))
    labels = np.zeros((7, 6, 5), np.int32)
    with pytest.raises(UserError, match=r"out.mha: .*\.nii\.gz or \.nii"):
        write_like(tmp_path / "out.mha", labels, native, np.uint8)
    with pytest.raises(ValueError, match=r"\(5, 6, 7\)"):
        write_like(tmp_path / "out.nii", labels.T, native, np.uint8)
    for value in (-1, 256):
        labels[0, 0, 0] = value
        with pytest.raises(ValueError, match=rf"{value}.* do not fit uint8"):
            write_like(tmp_path / "out.nii", labels, native, np.uint8)
    assert not list(tmp_path.iterdir())
