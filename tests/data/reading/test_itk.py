"""NRRD and MetaImage: the same volume as NIfTI, and refused for the same reasons."""

import gzip
import os
import sys
import zlib

import numpy as np
import pytest

from sparsemae.data.read import read_labels, read_volume, sniff

WRITTEN = [
    *("a.nrrd", "packed.nrrd", "a.mha", "packed.mha"),
    *("a.nhdr", "packed.nhdr", "a.mhd", "packed.mhd"),
]
NRRD = """NRRD0004
# made by hand
type: short
dimension: 3
space: left-posterior-superior
sizes: 5 6 7
space directions: (2,0,0) (0,1.5,0) (0,0,3)
endian: little
encoding: raw
space origin: (7,-3,11)
"""
META = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = 7 -3 11
ElementSpacing = 2 1.5 3
DimSize = 5 6 7
ElementType = MET_SHORT
ElementDataFile = LOCAL
"""


@pytest.fixture
def itk():
    return pytest.importorskip("SimpleITK", reason="the extra sparsemae[itk] is not installed")


@pytest.fixture
def image(itk, ramp, affine):
    """The volume of `put(path)`, in ITK's words."""
    image = itk.GetImageFromArray(np.ascontiguousarray(ramp().T))
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    return image


@pytest.fixture
def write(itk, tmp_path, voxels):
    """`write(name, text, data)`: a header by hand, its voxels after it."""

    def make(name, text, data=None):
        end = "\n" if text.startswith("NRRD") else ""
        (tmp_path / name).write_bytes(os.fsencode(text + end) + (voxels if data is None else data))
        return tmp_path / name

    return make


@pytest.fixture
def voxels(ramp):
    return ramp().tobytes(order="F")


@pytest.mark.parametrize("name", WRITTEN)
def test_the_same_volume_as_nifti(tmp_path, itk, image, put, name, warned):
    expected = read_volume(put(tmp_path / "a.nii"))
    itk.WriteImage(image, str(tmp_path / name), name.startswith("packed"))
    volume = read_volume(tmp_path / name)
    assert np.array_equal(volume.array, expected.array)
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)
    np.testing.assert_allclose(volume.spacing, expected.spacing, rtol=1e-6)
    warned(volume)
    assert sniff(tmp_path / name) == ("nrrd" if name[-4:] in ("nrrd", "nhdr") else "meta")


@pytest.mark.parametrize("ending", ["nrrd", "mha"])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_every_numeric_type(tmp_path, itk, ramp, dtype, ending):
    array = (ramp() % 100).astype(dtype)
    itk.WriteImage(itk.GetImageFromArray(array), str(tmp_path / f"a.{ending}"))
    volume = read_volume(tmp_path / f"a.{ending}")
    assert np.array_equal(np.sort(volume.array, None), np.sort(array.astype("f4"), None))
    assert np.array_equal(volume.array[::-1, ::-1].T, array)  # LPS to RAS: two axes turn


@pytest.mark.parametrize("name", WRITTEN)
def test_damage_is_seen_where_simple_itk_sees_none(tmp_path, itk, image, refused, name):
    packed = name.startswith("packed")
    itk.WriteImage(image, str(tmp_path / name), packed)
    beside = [path for path in tmp_path.iterdir() if path.name != name]
    holder = beside[0] if beside else tmp_path / name
    data = holder.read_bytes()
    holder.write_bytes(data[:-1])
    code = "container.truncated" if packed else "container.short"
    refused(tmp_path / name, code, names=holder)
    if packed:  # raw voxels carry no checksum
        holder.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
        refused(tmp_path / name, "container.damaged", names=holder)


def test_by_hand(write, ramp, affine, warned):
    expected = np.diag([2.0, 1.5, 3.0, 1.0])
    expected[:3, 3] = -7 - 4 * 2, 3 - 5 * 1.5, 11
    for name, text in (("a.nrrd", NRRD), ("a.mha", META)):
        volume = read_volume(write(name, text))
        assert np.array_equal(volume.array, ramp()[::-1, ::-1])
        np.testing.assert_allclose(volume.affine, expected)
        warned(volume)


def test_variants_of_the_headers(write, voxels, ramp, warned):
    swapped = ramp().astype(">i2").tobytes(order="F")
    packed = gzip.compress(voxels[:99]) + gzip.compress(voxels[99:])
    directions = "space directions: (2,0,0) (0,1.5,0) (0,0,3)\n"
    for text, data, codes in (
        (NRRD.replace("short", "int16").replace("\n", "\r\n"), b"\r\n" + voxels, ()),
        (NRRD.replace("little", "big"), swapped, ()),
        (NRRD.replace("encoding: raw", "encoding: gz"), packed, ()),
        (NRRD.replace("encoding: raw", "byteskip: 3\nencoding: raw"), b"xyz" + voxels, ()),
        (NRRD.replace("left-posterior-superior", "LPS") + "key:=value\n", voxels, ()),
        (NRRD + 'space units: "um" "um" "um"\n', voxels, ("geometry.units",)),
        (META, voxels, ()),
        (META.replace("MSB = False", "MSB = True"), swapped, ()),
        (
            META.replace("CompressedData = False", "CompressedData = True"),
            zlib.compress(voxels),
            (),
        ),
        (META.replace("DimSize", "DistanceUnits = um\nDimSize"), voxels, ("geometry.units",)),
        (META.replace("TransformMatrix = 1 0 0 0 1 0 0 0 1\n", ""), voxels, ("geometry.none",)),
        (META, voxels + b"x", ("container.trailing",)),
        (
            NRRD.replace("space: left-posterior-superior\n", "")
            .replace(directions, "spacings: 2 1.5 3\n")
            .replace("space origin: (7,-3,11)\n", ""),
            voxels,
            ("geometry.none",),
        ),
    ):
        if "um" in text:
            text = text.replace("(2,0,0) (0,1.5,0) (0,0,3)", "(2e3,0,0) (0,1500,0) (0,0,3e3)")
            text = text.replace("ElementSpacing = 2 1.5 3", "ElementSpacing = 2000 1500 3000")
        name = "a.nrrd" if text.startswith("NRRD") else "a.mha"
        if "\r" in text:
            volume = read_volume(write(name, text[:-1], data[1:]))
        else:
            volume = read_volume(write(name, text, data))
        assert np.array_equal(volume.array, ramp()[::-1, ::-1]), text
        np.testing.assert_allclose(volume.spacing, (2, 1.5, 3), rtol=1e-6)
        warned(volume, *codes)


REFUSED = {
    "four axes": ("header.dims", NRRD.replace("dimension: 3", "dimension: 4")),
    "one size": ("header.dims", NRRD.replace("5 6 7", "210")),
    "zero size": ("header.dims", NRRD.replace("5 6 7", "5 0 7")),
    "negative size": ("header.dims", META.replace("5 6 7", "5 -6 7")),
    "NDims": ("header.dims", META.replace("NDims = 3", "NDims = 2")),
    "huge": ("header.budget", META.replace("5 6 7", "5000 6000 7000")),
    "larger than the file": ("container.short", NRRD.replace("5 6 7", "500 600 700")),
    "block": ("header.field", NRRD.replace("type: short", "type: block")),
    "no type": ("header.field", NRRD.replace("type: short\n", "")),
    "text": ("header.field", NRRD.replace("encoding: raw", "encoding: ascii")),
    "no endian": ("header.field", NRRD.replace("endian: little\n", "")),
    "line skip": ("header.field", NRRD + "line skip: 1\n"),
    "byte skip -1": ("header.field", NRRD + "byte skip: -1\n"),
    "gzip and byte skip": ("header.field", NRRD.replace(": raw", ": gzip") + "byte skip: 1\n"),
    "channels": ("header.field", META.replace("DimSize", "ElementNumberOfChannels = 3\nDimSize")),
    "colour": ("header.field", META.replace("MET_SHORT", "MET_UCHAR_ARRAY")),
    "text voxels": ("header.field", META.replace("BinaryData = True", "BinaryData = False")),
    "a mesh": ("header.field", META.replace("ObjectType = Image", "ObjectType = Mesh")),
    "scaled": (
        "header.field",
        META.replace("DimSize", "ElementToIntensityFunctionSlope = 2\nDimSize"),
    ),
    "a list": ("header.field", META.replace("LOCAL", "LIST")),
    "a pattern": ("header.field", NRRD + "data file: slice%03d.raw 1 7 1\n"),
    "digits without end": ("header.field", META.replace("5 6 7", "9" * 5000)),
    "units": ("header.field", META.replace("DimSize", "DistanceUnits = inch\nDimSize")),
    "space": ("geometry.affine", NRRD.replace("left-posterior-superior", "banana")),
    "not UTF-8": ("geometry.affine", NRRD.replace("left-posterior-superior", "\udcff")),
    "no direction": ("header.field", NRRD.replace("(0,1.5,0)", "none")),
    "NaN direction": ("geometry.affine", NRRD.replace("(0,1.5,0)", "(0,nan,0)")),
    "zero direction": ("geometry.affine", NRRD.replace("(0,1.5,0)", "(0,0,0)")),
    "no spacing": ("geometry.affine", META.replace("Spacing = 2 1.5 3", "Spacing = 2 1.5")),
    "zero spacing": ("geometry.affine", META.replace("Spacing = 2 1.5 3", "Spacing = 2 0 3")),
    "negative spacing": ("geometry.affine", META.replace("Spacing = 2", "Spacing = -2")),
    "infinite origin": ("geometry.affine", META.replace("Offset = 7", "Offset = inf")),
    "singular": ("geometry.affine", META.replace("1 0 0 0 1 0 0 0 1", "1 0 0 1 0 0 0 0 1")),
    "too large": ("geometry.spacing", META.replace("Spacing = 2", "Spacing = 200")),
    "escaping": ("container.escape", META.replace("LOCAL", "../a.raw")),
    "escaping below": ("container.escape", NRRD + "data file: b/../../a.raw\n"),
    "absolute": ("container.escape", NRRD + "datafile: /etc/passwd\n"),
    "missing data": ("container.missing", META.replace("LOCAL", "nowhere.raw")),
    "a device": ("container.not_file", META.replace("LOCAL", "zero")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(tmp_path, write, refused, name):
    code, text = REFUSED[name]
    (tmp_path / "zero").symlink_to("/dev/zero")
    culprit = {"missing data": "nowhere.raw", "a device": "zero"}.get(name, "a.mha")
    refused(write("a.mha", text), code, names=tmp_path / culprit)


def test_headers_without_an_end(tmp_path, write, refused):
    refused(write("a.nrrd", NRRD[:-30], b""), "header.field")
    refused(write("a.mha", META[: META.index("ElementDataFile")], b""), "header.field")
    refused(write("b.mha", META[: META.index("ElementDataFile")], b"x" * (1 << 21)), "header.field")


def test_simple_itk_never_sees_the_file(write, monkeypatch, itk):
    """Neither its name, which need not be UTF-8, nor its voxels: a header is all it is given."""
    path = write(os.fsdecode(b"latin-\xe9\n.nrrd"), NRRD)
    shown = []
    reader = itk.ImageFileReader

    def spy():
        made = reader()
        set_name = made.SetFileName
        made.SetFileName = lambda name: (shown.append(os.path.getsize(name)), set_name(name))
        return made

    monkeypatch.setattr(itk, "ImageFileReader", spy)
    read_volume(path)
    assert len(shown) == 1
    assert shown[0] < 300


def test_data_in_a_folder_below(tmp_path, write, voxels, ramp):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "my voxels.raw").write_bytes(voxels)
    path = write("a.mhd", META.replace("LOCAL", "data/my voxels.raw"), b"")
    assert np.array_equal(read_volume(path).array, ramp()[::-1, ::-1])


def test_a_compressed_file_of_raw_voxels(tmp_path, voxels, ramp, itk, refused):
    path = tmp_path / "a.mha.gz"
    path.write_bytes(gzip.compress(META.encode() + voxels))
    assert np.array_equal(read_volume(path).array, ramp()[::-1, ::-1])
    twice = META.replace("Data = False", "Data = True")
    path.write_bytes(gzip.compress(twice.encode() + zlib.compress(voxels)))
    refused(path, "header.field")


def test_labels(write, ramp):
    labels = read_labels(write("a.nrrd", NRRD), classes=range(210))
    assert np.array_equal(labels.array, ramp()[::-1, ::-1])


def test_without_simple_itk_the_extra_is_named(tmp_path, monkeypatch, refused, voxels):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for name, text in (("a.nrrd", NRRD + "\n"), ("a.mha", META)):
        (tmp_path / name).write_bytes(text.encode() + voxels)
        assert "pip install 'sparsemae[itk]'" in refused(tmp_path / name, "container.itk")
