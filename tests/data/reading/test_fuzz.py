"""Small good files, damaged at random: a refusal with a known code, or a volume; never more."""

import gzip
import zlib

import numpy as np
import pytest

from sparsemae.data.codes import CODES, VolumeError
from sparsemae.data.read import read_volume

SEEDS = 400


def outcome(path):
    """The volume, or None after a refusal in a known code and one printable line."""
    volume, error = None, None
    try:
        volume = read_volume(path, max_voxels=10**6)
    except VolumeError as caught:
        error = caught
    if volume is None:
        assert CODES[error.code].level == "reject"
        assert str(error).isprintable()
        assert path.name in str(error)
        return None
    assert volume.array.dtype == np.float32
    assert volume.array.ndim == 3
    assert np.isfinite(volume.array).all()
    assert np.isfinite(volume.affine).all()
    assert all(0.01 <= size <= 50 for size in volume.spacing)
    for notice in volume.warnings:
        assert CODES[notice.code].level == "warn"
        assert notice.message.isprintable()
    return volume


def rewrite(path, data):
    """In place: a file that is emptied first is flushed to disk, thousands of times here."""
    path.touch()
    with path.open("r+b") as file:
        file.write(data)
        file.truncate()


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 999, (7, 6, 5)).astype("i2")


@pytest.mark.parametrize("version", [1, 2])
def test_header_bytes_at_random(tmp_path, nifti, noise, version):
    """Each seed sets 1 to 4 bytes of the header to anything."""
    sound = nifti(noise, version=version)
    path, read = tmp_path / "a.nii", 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        data = bytearray(sound)
        for _ in range(rng.integers(1, 5)):
            data[rng.integers(0, 352 if version == 1 else 544)] = rng.integers(0, 256)
        rewrite(path, data)
        read += outcome(path) is not None
    assert SEEDS / 10 < read < SEEDS * 9 / 10  # both ends of the guard are visited


def test_every_header_field_at_its_extremes(tmp_path, nifti, noise):
    sound = nifti(noise)
    patterns = [b"\0", b"\xff", b"\x7f", b"\x80", b"\1"]
    path = tmp_path / "a.nii"
    for at in range(0, 352, 2):
        for pattern in patterns:
            rewrite(path, sound[:at] + 2 * pattern + sound[at + 2 :])
            outcome(path)


def test_a_flipped_bit_of_a_compressed_file_is_refused_or_harmless(tmp_path, nifti, noise):
    sound = gzip.compress(nifti(noise))
    expected = noise.astype("f4")
    path = tmp_path / "a.nii.gz"
    accepted = set()
    for bit in range(8 * len(sound)):
        data = bytearray(sound)
        data[bit // 8] ^= 1 << bit % 8
        rewrite(path, data)
        if (volume := outcome(path)) is not None:
            assert np.array_equal(volume.array, expected), bit
            assert volume.warnings == (), bit
            accepted.add(bit // 8)
    # flags, time and system in gzip's header; and a few copies of equal bytes from elsewhere
    assert len(accepted - {3, 4, 5, 6, 7, 8, 9}) < len(sound) / 50


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_truncation_is_refused(tmp_path, nifti, noise, name):
    sound = nifti(noise)
    if name.endswith("gz"):
        sound = gzip.compress(sound)
    path = tmp_path / name
    for length in range(len(sound)):
        rewrite(path, sound[:length])
        assert outcome(path) is None, length


@pytest.mark.parametrize("kind", ["nrrd", "meta"])
def test_text_headers_at_random(tmp_path, noise, kind):
    pytest.importorskip("SimpleITK", reason="the extra sparsemae[itk] is not installed")
    voxels = noise.tobytes(order="F")
    if kind == "nrrd":
        text = (
            b"NRRD0004\ntype: short\ndimension: 3\nspace: LPS\nsizes: 7 6 5\nspace directions: "
            b"(1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: gzip\nspace origin: (0,0,0)\n\n"
        )
        sound = text + gzip.compress(voxels)
    else:
        text = (
            b"ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\n"
            b"CompressedData = True\nTransformMatrix = 1 0 0 0 1 0 0 0 1\nOffset = 0 0 0\n"
            b"ElementSpacing = 1 1 1\nDimSize = 7 6 5\nElementType = MET_SHORT\n"
            b"ElementDataFile = LOCAL\n"
        )
        sound = text + zlib.compress(voxels)
    path, read = tmp_path / "a.nrrd", 0
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        data = bytearray(sound)
        for _ in range(rng.integers(1, 3)):
            data[rng.integers(0, len(text))] = rng.choice(list(b"0123456789-. ,()=:\n\0\xff%/xe"))
        rewrite(path, data)
        read += outcome(path) is not None
    assert 0 < read < SEEDS / 2
    for length in range(0, len(sound), 7):
        rewrite(path, sound[:length])
        assert outcome(path) is None
