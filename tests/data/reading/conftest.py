"""NIfTI files written field by field, and a catalogue of bad ones with the code each must get."""

import functools
import gzip
import os
import pickle
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.codes import CODES, VolumeError, one_line
from sparsemae.data.read import read_volume

AFFINE = np.eye(4)  # oblique: turned by 0.3 about one axis, 0.2 about another
AFFINE[:3, :3] = [
    [np.cos(0.3), -np.sin(0.3) * np.cos(0.2), np.sin(0.3) * np.sin(0.2)],
    [np.sin(0.3), np.cos(0.3) * np.cos(0.2), -np.cos(0.3) * np.sin(0.2)],
    [0, np.sin(0.2), np.cos(0.2)],
] * np.array([2.0, 1.5, 3.0])
AFFINE[:3, 3] = -7, 3, 11
DATATYPES = {
    **{"u1": 2, "i2": 4, "i4": 8, "f4": 16, "c8": 32, "f8": 64, "i1": 256, "u2": 512},
    **{"u4": 768, "i8": 1024, "u8": 1280, "f16": 1536, "c16": 1792},
}


def ramp(shape=(5, 6, 7), dtype="i2"):
    return np.arange(np.prod(shape)).astype(dtype).reshape(shape)


def header(array, *, affine=AFFINE, version=1, order="<", **fields):
    """The bytes of a header; `fields` replace what a sound one says."""
    layout = nib.nifti1.header_dtype if version == 1 else nib.nifti2.header_dtype
    block = np.zeros(1, layout.newbyteorder(order))
    usual = {
        "sizeof_hdr": layout.itemsize,
        "magic": b"n+1" if version == 1 else b"n+2\0\r\n\x1a\n",
        "dim": [array.ndim, *array.shape, *(1,) * (7 - array.ndim)],
        "datatype": DATATYPES[array.dtype.str[1:]],
        "bitpix": 8 * array.dtype.itemsize,
        "pixdim": [1, *np.linalg.norm(affine[:3, :3], axis=0), 1, 1, 1, 1],
        "vox_offset": layout.itemsize + 4,
        "xyzt_units": 2,
        "sform_code": 1,
        "srow_x": affine[0],
        "srow_y": affine[1],
        "srow_z": affine[2],
    }
    for name, value in (usual | fields).items():
        block[name] = value
    return block.tobytes()


def nifti(array=None, *, order="<", between=bytes(4), **options):
    """The bytes of a file: header, what lies `between`, voxels."""
    array = ramp() if array is None else array
    voxels = array.astype(array.dtype.newbyteorder(order)).tobytes(order="F")
    return header(array, order=order, **options) + between + voxels


def put(path, array=None, **options):
    """Write a NIfTI file, compressed if its name ends so."""
    data = nifti(array, **options)
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith("gz") else data)
    return path


def changed(*, at=None, cut=None, flip=1, array=None):
    """A compressed file of noise with the byte `at` changed, or `cut` bytes fewer at the end."""

    def make(path):
        noise = np.random.default_rng(0).integers(0, 9999, (12, 12, 12)).astype("i2")
        data = bytearray(gzip.compress(nifti(noise if array is None else array)))
        if at is not None:
            data[at if at < 0 else len(data) // at] ^= flip
        path.write_bytes(data[: len(data) - (cut or 0)])

    return make


def raw(data):
    return lambda path: path.write_bytes(data)


def packed(data):
    return lambda path: path.write_bytes(gzip.compress(data))


def with_header(array=None, **options):
    return lambda path: put(path, array, **options)


@functools.cache
def zeros():
    """A gzip member of 256 MiB of zero bytes."""
    engine = zlib.compressobj(9, wbits=31)
    parts = [engine.compress(bytes(1 << 22)) for _ in range(64)]
    return b"".join([*parts, engine.flush()])


def bomb(path):
    """1 GiB of zeros: one volume of the largest size, in 1 MB."""
    shape = np.broadcast_to(np.int16(0), (1024, 1024, 512))
    path.write_bytes(gzip.compress(header(shape) + bytes(4)) + 4 * zeros())


def bomb_of_int8(path):
    """512 MiB of zeros with one other voxel after 256 MiB."""
    shape = np.broadcast_to(np.uint8(0), (1024, 1024, 512))
    end = gzip.compress(b"\1")
    path.write_bytes(gzip.compress(header(shape) + bytes(4)) + zeros() + end + zeros())


def lying_bomb(path):
    """A small volume, and 1 GiB of zeros after it."""
    path.write_bytes(gzip.compress(nifti()) + 4 * zeros())


def sparse_file(path):
    """256 MiB on paper, next to nothing on disk."""
    with path.open("wb") as file:
        file.write(header(np.broadcast_to(np.uint8(0), (1024, 1024, 256))) + bytes(4))
        file.truncate(352 + (1 << 28))


def symlink_loop(path):
    path.symlink_to(path)


def with_values(change, dtype="f4"):
    def make(path):
        array = ramp(dtype=dtype)
        change(array)
        put(path, array)

    return make


def not_finite(array):
    array[0, 0, :3] = np.nan, np.inf, -np.inf


SHEARED = np.array([[2, 1.5, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1.0]])
HUGE = np.broadcast_to(np.int16(0), (2000, 2000, 2000))
ONLY_QFORM = {"sform_code": 0, "qform_code": 1}
NO_FORM = {"sform_code": 0, "qform_code": 0}
BAD = {
    "missing": ("container.missing", lambda path: None),
    "dangling link": ("container.missing", lambda path: path.symlink_to("nowhere")),
    "symlink loop": ("container.link", symlink_loop),
    "empty": ("container.empty", raw(b"")),
    "directory": ("container.not_file", lambda path: path.mkdir()),
    "FIFO": ("container.not_file", os.mkfifo),
    "device": ("container.not_file", lambda path: path.symlink_to("/dev/zero")),
    "LFS pointer": (
        "container.lfs",
        raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"),
    ),
    "text": ("container.not_nifti", raw(b"subject,age\n" * 99)),
    "one byte": ("container.not_nifti", raw(b"n")),
    "zip": ("container.not_nifti", raw(b"PK\x03\x04" + bytes(500))),
    "DICOM": ("container.not_nifti", raw(bytes(128) + b"DICM" + bytes(500))),
    "zeros": ("container.not_nifti", raw(bytes(4096))),
    "compressed twice": ("container.not_nifti", packed(gzip.compress(nifti()))),
    "gzip of text": ("container.not_nifti", packed(b"subject,age\n" * 99)),
    "header of a pair alone": ("container.pair", packed(nifti(magic=b"ni1"))),
    "truncated by one byte": ("container.truncated", changed(cut=1)),
    "truncated to 30 %": ("container.truncated", changed(cut=2500)),
    "gzip magic only": ("container.truncated", raw(b"\x1f\x8b")),
    "endless name in gzip": ("container.excess", raw(b"\x1f\x8b\x08\x08" + b"x" * (1 << 26))),
    "one bit flipped": ("container.damaged", changed(at=2)),
    "wrong CRC": ("container.damaged", changed(at=-6)),
    "wrong length in gzip": ("container.damaged", changed(at=-1)),
    "gzip method unknown": ("container.damaged", raw(b"\x1f\x8b\x07" + bytes(500))),
    "payload one byte short": ("container.short", packed(nifti()[:-1])),
    "file one byte short": ("container.short", raw(nifti()[:-1])),
    "header only": ("container.short", raw(nifti()[:352])),
    "header cut": ("container.short", raw(nifti()[:351])),
    "69 bytes for 4 GB": (
        "container.short",
        packed(header(np.broadcast_to(np.int16(0), (800, 800, 800)))),
    ),
    "empty members": (
        "container.excess",
        raw(gzip.compress(nifti()) + gzip.compress(b"") * 1_000_000),
    ),
    "empty blocks": (
        "container.excess",
        raw(gzip.compress(b"")[:10] + b"\0\0\0\xff\xff" * 5_000_000),
    ),
    "wrong magic": ("header.magic", with_header(magic=b"abc")),
    "Analyze": ("header.magic", with_header(magic=b"")),
    "sizeof_hdr": ("header.sizeof", with_header(sizeof_hdr=352)),
    "no dimension": ("header.dims", with_header(dim=[0] * 8)),
    "8 dimensions": ("header.dims", with_header(dim=[8] * 8)),
    "zero size": ("header.dims", with_header(dim=[3, 5, 0, 7, 1, 1, 1, 1])),
    "negative size": ("header.dims", with_header(dim=[3, 5, -6, 7, 1, 1, 1, 1])),
    "2D": ("header.dims", with_header(ramp((5, 6)))),
    "one slice": ("header.dims", with_header(ramp((5, 6, 1)))),
    "one column": ("header.dims", with_header(ramp((1, 6, 5)))),
    "5D": ("header.dims", with_header(ramp((3, 4, 5, 1, 3)))),
    "4D": ("header.frames", with_header(ramp((3, 4, 5, 2)))),
    "too many voxels": ("header.budget", with_header(ramp(), dim=[3, *HUGE.shape, 1, 1, 1, 1])),
    "product beyond int64": (
        "header.budget",
        with_header(version=2, dim=[3, *(2**40,) * 3, 1, 1, 1, 1]),
    ),
    "RGB": ("header.dtype", with_header(datatype=128, bitpix=24)),
    "RGBA": ("header.dtype", with_header(datatype=2304, bitpix=32)),
    "complex": ("header.dtype", with_header(ramp(dtype="c8"))),
    "float128": ("header.dtype", with_header(ramp(dtype="f16"))),
    "single bits": ("header.dtype", with_header(datatype=1, bitpix=1)),
    "no type": ("header.dtype", with_header(datatype=0)),
    "unknown type": ("header.dtype", with_header(datatype=77)),
    "huge vox_offset": ("header.offset", with_header(vox_offset=1e12)),
    "infinite vox_offset": ("header.offset", with_header(vox_offset=np.inf)),
    "vox_offset beyond the file": ("container.short", with_header(vox_offset=1e6)),
    "vox_offset 0 and extensions": (
        "header.offset",
        with_header(vox_offset=0, between=b"\1\0\0\0" + b"\x10\0\0\0" + bytes(12)),
    ),
    "huge extension": (
        "header.extension",
        with_header(vox_offset=368, between=b"\1\0\0\0" + b"\xf0\xff\xff\x7f" + bytes(12)),
    ),
    "negative extension": (
        "header.extension",
        with_header(vox_offset=368, between=b"\1\0\0\0" + b"\xf0\xff\xff\xff" + bytes(12)),
    ),
    "NaN": ("intensity.not_finite", with_values(not_finite)),
    "NaN only": ("intensity.not_finite", with_header(ramp(dtype="f4") * np.nan)),
    "beyond float32": ("intensity.not_finite", with_header(ramp(dtype="f8") * 1e300)),
    "constant": ("intensity.constant", with_header(ramp() * 0 + 3)),
    "constant by slope": ("intensity.constant", with_header(scl_slope=1e-45, scl_inter=9)),
    "infinite slope": ("intensity.slope", with_header(scl_slope=np.inf)),
    "infinite slope of floats": (
        "intensity.slope",
        with_header(ramp(dtype="f4"), scl_slope=-np.inf),
    ),
    "slope too large": ("intensity.slope", with_header(scl_slope=3e38)),
    "NaN intercept": ("intensity.slope", with_header(scl_slope=2, scl_inter=np.nan)),
    "singular": ("geometry.affine", with_header(srow_x=[0, 0, 0, 1])),
    "zero affine": ("geometry.affine", with_header(affine=np.zeros((4, 4)))),
    "flat": ("geometry.affine", with_header(srow_x=[2, 0, 0, 0], srow_y=[1, 0, 0, 0])),
    "NaN affine": ("geometry.affine", with_header(srow_x=[np.nan, 0, 0, 1])),
    "huge affine": ("geometry.spacing", with_header(srow_x=[3e38, 0, 0, 1])),
    "invalid quaternion": ("geometry.quaternion", with_header(**ONLY_QFORM, quatern_b=2)),
    "NaN quaternion": ("geometry.quaternion", with_header(**ONLY_QFORM, quatern_c=np.nan)),
    "qform, zero pixdim": (
        "geometry.quaternion",
        with_header(**ONLY_QFORM, pixdim=[1, 0, 1, 1, 1, 1, 1, 1]),
    ),
    "zero pixdim": ("geometry.pixdim", with_header(**NO_FORM, pixdim=[1, 0, 1, 1, 1, 1, 1, 1])),
    "NaN pixdim": ("geometry.pixdim", with_header(**NO_FORM, pixdim=[1, 1, np.nan, 1, 1, 1, 1, 1])),
    "voxels of 900 mm": ("geometry.spacing", with_header(affine=np.diag([900, 900, 900, 1.0]))),
    "metres that are mm": ("geometry.spacing", with_header(xyzt_units=1)),
    "sheared": ("geometry.sheared", with_header(affine=SHEARED)),
}
COSTLY = {
    "bomb": ("container.bomb", bomb),
    "bomb with a spark": ("container.bomb", bomb_of_int8),
    "file with a hole": ("intensity.constant", sparse_file),
    "bomb after the voxels": ("container.excess", lying_bomb),
}


def pytest_generate_tests(metafunc):
    if "bad" in metafunc.fixturenames:
        metafunc.parametrize("bad", BAD.values(), ids=BAD.keys())


@pytest.fixture
def bad_files():
    return BAD | COSTLY


@pytest.fixture(name="put")
def put_fixture():
    """`put(path, array=None, **fields)`: a NIfTI file, its header field by field."""
    return put


@pytest.fixture(name="nifti")
def nifti_fixture():
    return nifti


@pytest.fixture(name="ramp")
def ramp_fixture():
    return ramp


@pytest.fixture
def affine():
    return AFFINE.copy()


@pytest.fixture
def refused():
    """`refused(path, code, read=read_volume, names=path, **options)`: the message, checked."""

    def check(path, code, read=read_volume, names=None, **options):
        with pytest.raises(VolumeError) as caught:
            read(path, **options)
        error, message = caught.value, str(caught.value)
        assert error.code == code, message
        again = pickle.loads(pickle.dumps(error))
        assert (again.code, str(again)) == (code, message)
        assert CODES[code].level == "reject"
        assert message.isprintable()
        assert one_line(Path(path).name) in message
        assert one_line(Path(names or path).name) in message
        assert ";" in message  # what is wrong; what to do
        return message

    return check


@pytest.fixture
def warned():
    """`warned(volume, *codes)`: it came with exactly these warnings, each a line with the file."""

    def check(volume, *codes):
        assert [notice.code for notice in volume.warnings] == list(codes)
        for notice in volume.warnings:
            assert CODES[notice.code].level == "warn"
            assert notice.message.isprintable()
            assert volume.path.name in notice.message
        return [notice.message for notice in volume.warnings]

    return check
