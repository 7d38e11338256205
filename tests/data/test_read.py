import gzip
import itertools
import os
import pickle

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import find_volumes, read_volume
from sparsemae.errors import UserError

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


def header_of(path, **fields):
    """Rewrite header fields of an uncompressed file behind nibabel's checks."""
    data = bytearray(path.read_bytes())
    header = np.frombuffer(data, dtype=nib.nifti1.header_dtype, count=1)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(data)
    return path


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


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_content_decides_not_the_extension(tmp_path, name, kind):
    nib.save(kind(ramp(), AFFINE), tmp_path / name)
    other = (tmp_path / name).rename(tmp_path / ("b.nii" if name.endswith("gz") else "b.nii.gz"))
    assert np.array_equal(read_volume(other).array, ramp())


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


def truncated(path):
    data = save(path, ramp()).read_bytes()
    path.write_bytes(data[:-1])


def cut_payload(path):
    save(path.with_suffix(".nii"), ramp())
    path.write_bytes(gzip.compress(path.with_suffix(".nii").read_bytes()[:-1]))


def bit_flipped(path):
    noise = np.random.default_rng(0).integers(0, 9999, (12, 12, 12)).astype(np.int16)
    data = bytearray(save(path, noise).read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def wrong_checksum(path):
    data = bytearray(save(path, ramp()).read_bytes())
    data[-6] ^= 1  # inside the trailer's CRC-32: nibabel alone reads this file without a word
    path.write_bytes(data)


def rgb(path):
    save(path, np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]))


def not_finite(path):
    array = ramp().astype(np.float32)
    array[1, 2, 3:6] = np.nan
    save(path, array)


def uncompressed(**fields):
    def make(path):
        save(path.with_suffix(".nii"), ramp())
        header_of(path.with_suffix(".nii"), **fields)
        path.with_suffix(".nii").rename(path)

    return make


def pair_header(path):
    data = bytearray(gzip.decompress(save(path, ramp()).read_bytes()))
    data[344:348] = b"ni1\0"
    path.write_bytes(data)


NO_TURN = {"qform_code": 0, "sform_code": 1}
BAD = {
    "missing": ("container.missing", lambda path: None),
    "empty": ("container.empty", lambda path: path.touch()),
    "text": ("container.not_nifti", lambda path: path.write_text("subject,age\n" * 99)),
    "directory": ("container.not_file", lambda path: path.mkdir()),
    "fifo": ("container.not_file", os.mkfifo),
    "truncated by one byte": ("container.truncated", truncated),
    "one bit flipped": ("container.damaged", bit_flipped),
    "wrong CRC": ("container.damaged", wrong_checksum),
    "payload one byte short": ("container.short", cut_payload),
    "header of a pair": ("container.pair", pair_header),
    "2D": ("header.dims", lambda path: save(path, ramp((5, 6)))),
    "one slice": ("header.dims", lambda path: save(path, ramp((5, 6, 1)))),
    "4D": ("header.frames", lambda path: save(path, ramp((3, 4, 5, 2)))),
    "RGB": ("header.dtype", rgb),
    "complex": ("header.dtype", lambda path: save(path, ramp().astype(np.complex64))),
    "unknown type": ("header.dtype", uncompressed(datatype=77)),
    "NaN": ("intensity.not_finite", not_finite),
    "constant": ("intensity.constant", lambda path: save(path, ramp() * 0 + 3)),
    "singular": ("geometry.affine", uncompressed(**NO_TURN, srow_x=[0, 0, 0, 1])),
    "flat": ("geometry.affine", uncompressed(**NO_TURN, srow_x=[2, 0, 0, 0], srow_y=[1, 0, 0, 0])),
    "affine NaN": ("geometry.affine", uncompressed(**NO_TURN, srow_x=[np.nan, 0, 0, 1])),
    "micrometres": ("geometry.spacing", lambda p: save(p, ramp(), np.diag([900, 900, 900, 1.0]))),
}


@pytest.mark.parametrize("name", BAD)
def test_refusal_has_a_code_and_names_the_file(tmp_path, name):
    code, make = BAD[name]
    path = tmp_path / "case one.nii.gz"
    make(path)
    with pytest.raises(VolumeError) as caught:
        read_volume(path)
    assert caught.value.code == code
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert ";" in message  # what is wrong; what to do
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.code, str(again)) == (code, message)


def test_find_volumes(tmp_path):
    for name in ("b/x.nii.gz", "a.nii", "b/c/Y.NII", ".hidden/x.nii", "b/._x.nii.gz", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = ["a.nii", "b/c/Y.NII", "b/x.nii.gz"]
    assert find_volumes([tmp_path]) == [tmp_path / n for n in names]
    assert find_volumes([tmp_path / "b", tmp_path]) == [tmp_path / n for n in names]
    given = save(tmp_path / "image.dat.nii", ramp()).rename(tmp_path / "image.dat")
    assert find_volumes([given]) == [given]


def test_find_volumes_refuses(tmp_path):
    (tmp_path / "readme.txt").write_text("text")
    for sources, message in (
        ([tmp_path], "no .nii or .nii.gz file"),
        ([tmp_path / "nowhere"], "no such file"),
        ([tmp_path / "readme.txt"], "not a NIfTI file"),
        ([], "no source given"),
    ):
        with pytest.raises(UserError, match=message):
            find_volumes(sources)
