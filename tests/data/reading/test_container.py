"""Files, names, compressed streams and pairs: what is read, and what is warned about."""

import gzip
import os
import zlib

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.data.read import read_volume, sniff

ODD_NAMES = [
    "two words.nii.gz",
    "new\nline.nii.gz",
    "-rf.nii.gz",
    "'quo\"ted'.nii.gz",
    "$(touch x) `y` %s {0} a,b;c.nii.gz",
    "Prüfung_脳_🧠.nii.gz",
    "\x1b[31mred.nii.gz",
    os.fsdecode(b"latin-\xe9.nii.gz"),
    "n" * 248 + ".nii.gz",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_odd_names_are_read_and_shown_on_one_line(tmp_path, name, put, ramp, refused):
    assert np.array_equal(read_volume(put(tmp_path / name)).array, ramp())
    (tmp_path / name).write_bytes(b"text")
    message = refused(tmp_path / name, "container.not_nifti")
    message.encode()  # no lone surrogate is left in it


def test_a_name_no_file_can_have(tmp_path, refused):
    for name in ("nul\0.nii", "\ud800.nii"):
        refused(tmp_path / name, "container.missing")
    refused(tmp_path / ("n" * 300), "container.unreadable")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "below.nii", "container.missing")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission(tmp_path, put, refused):
    put(tmp_path / "a.nii").chmod(0)
    refused(tmp_path / "a.nii", "container.permission")


def test_what_the_system_refuses(tmp_path, put, refused, monkeypatch):
    path = put(tmp_path / "a.nii")

    def fail(error):
        def call(*arguments, **options):
            raise error

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fail(PermissionError(13, "Permission denied")))
        refused(path, "container.permission")
        patch.setattr(os, "open", fail(OSError(5, "Input/output error")))
        assert "Input/output error" in refused(path, "container.unreadable")
    assert read_volume(path).path == path


@pytest.mark.timeout(60)
def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path, put, refused, monkeypatch):
    """Between looking and opening, anything may take a file's place."""
    status = os.stat(put(tmp_path / "a.nii"))
    os.mkfifo(tmp_path / "pipe")
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", lambda *_, **__: status)
        refused(tmp_path / "pipe", "container.not_file")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nothing_is_allocated_for_a_file_too_small_for_its_voxels(
    tmp_path, put, refused, monkeypatch, name
):
    def allocate(*_):
        raise AssertionError("the voxels were asked for")

    monkeypatch.setattr("sparsemae.data.read.read_intensities", allocate)
    for size in (250, 800):  # below and above the size from which voxels are read ahead
        path = put(tmp_path / name, dim=[3, size, size, size, 1, 1, 1, 1])
        refused(path, "container.short")
    refused(put(tmp_path / name, dim=[3, 900, 900, 900, 1, 1, 1, 1]), "header.budget")


def test_no_memory_is_one_line(tmp_path, put, refused, monkeypatch):
    path = put(tmp_path / "a.nii")

    def exhausted(*_):
        raise MemoryError

    monkeypatch.setattr("sparsemae.data.read.read_intensities", exhausted)
    refused(path, "container.memory")


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
def test_content_decides_not_the_extension(tmp_path, name, version, put, ramp):
    path = put(tmp_path / name, version=version)
    for other in ("b.nii.gz", "b.nii", "b.img", "b.hdr", "b.mha", "b", "b.dcm"):
        path = path.rename(tmp_path / other)
        assert np.array_equal(read_volume(path).array, ramp())
        assert sniff(path) == f"nifti{version}"


def test_sniff_reads_the_head_only(tmp_path, nifti, ramp):
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(nifti(ramp((9, 9, 9))))[:-20])
    assert sniff(path) == "nifti1"
    with pytest.raises(VolumeError):
        read_volume(path)


@pytest.mark.parametrize("size", [1 << 11, 1 << 16, 1 << 20, (1 << 20) + 1])
def test_many_members_are_one_stream(tmp_path, nifti, size):
    array = np.random.default_rng(0).integers(0, 999, (90, 91, 92)).astype("i2")
    data = nifti(array)
    parts = [data[i : i + size] for i in range(0, len(data), size)]
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"".join(gzip.compress(part, 1) for part in [*parts, b""]))
    volume = read_volume(path)
    assert np.array_equal(volume.array, array)
    assert volume.warnings == ()


@pytest.mark.parametrize("level", [0, 1, 9])
def test_any_compression_level(tmp_path, nifti, level):
    array = np.random.default_rng(0).integers(0, 999, (90, 91, 92)).astype("i2")
    (tmp_path / "a").write_bytes(gzip.compress(nifti(array), level))
    assert np.array_equal(read_volume(tmp_path / "a").array, array)


def test_tiny_members_are_refused(tmp_path, nifti, ramp, refused):
    data = nifti(ramp((90, 30, 30)))
    parts = [gzip.compress(data[i : i + 64], 1) for i in range(0, len(data), 64)]
    (tmp_path / "a").write_bytes(b"".join(parts))
    refused(tmp_path / "a", "container.excess")


def test_a_damaged_later_member_is_refused(tmp_path, nifti, refused):
    data = nifti()
    second = bytearray(gzip.compress(data[400:]))
    second[-6] ^= 1
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(data[:400]) + second)
    refused(path, "container.damaged")
    path.write_bytes(gzip.compress(data) + gzip.compress(b"more")[:-1])
    refused(path, "container.truncated")
    path.write_bytes(gzip.compress(data[:400]) + b"BZh" + second[3:])
    refused(path, "container.short")


@pytest.mark.parametrize(
    "make",
    [
        lambda data: data + b"x",
        lambda data: gzip.compress(data + bytes(1 << 20)),
        lambda data: gzip.compress(data) + b"garbage",
        lambda data: gzip.compress(data) + bytes(1 << 16),
        lambda data: gzip.compress(data) + b"\x1f",
    ],
    ids=["after the voxels", "1 MiB inside", "after the stream", "zeros", "half a magic"],
)
def test_bytes_after_the_voxels_are_ignored_with_a_warning(tmp_path, nifti, ramp, warned, make):
    (tmp_path / "a").write_bytes(make(nifti()))
    volume = read_volume(tmp_path / "a")
    assert np.array_equal(volume.array, ramp())
    warned(volume, "container.trailing")


def test_more_than_a_mebibyte_inside_the_stream_is_refused(tmp_path, nifti, refused):
    (tmp_path / "a").write_bytes(gzip.compress(nifti() + bytes((1 << 20) + 1)))
    refused(tmp_path / "a", "container.excess")


@pytest.mark.parametrize("packed", [False, True])
def test_a_terabyte_of_trailing_hole_costs_nothing(tmp_path, nifti, warned, packed):
    path = tmp_path / "a"
    path.write_bytes(gzip.compress(nifti()) if packed else nifti())
    os.truncate(path, 1 << 40)
    warned(read_volume(path), "container.trailing")


def test_a_zlib_stream_is_no_volume(tmp_path, nifti, refused):
    (tmp_path / "a").write_bytes(zlib.compress(nifti()))
    refused(tmp_path / "a", "container.not_nifti")


PAIRS = [(".hdr", ".img"), (".hdr.gz", ".img.gz"), (".hdr", ".img.gz"), (".HDR", ".IMG")]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endings", PAIRS, ids="".join)
def test_either_half_of_a_pair_may_be_named(tmp_path, nifti, ramp, endings, version):
    magic = b"ni1" if version == 1 else b"ni2\0\r\n\x1a\n"
    data = nifti(version=version, magic=magic, vox_offset=16)
    size = 352 if version == 1 else 544
    halves = data[:size], bytes(16) + data[size:]
    for ending, half in zip(endings, halves, strict=True):
        (tmp_path / f"a{ending}").write_bytes(
            gzip.compress(half) if ending.endswith("gz") else half
        )
    for ending in endings:
        volume = read_volume(tmp_path / f"a{ending}")
        assert np.array_equal(volume.array, ramp())
        assert volume.path.name == f"a{ending}"
        assert volume.warnings == ()
        assert sniff(volume.path) == f"pair{version}"


def test_pairs_of_nibabel(tmp_path, ramp, affine):
    nib.save(nib.Nifti1Pair(ramp(), affine), tmp_path / "a.img")
    assert np.array_equal(read_volume(tmp_path / "a.hdr").array, ramp())


def test_broken_pairs_name_the_broken_half(tmp_path, nifti, refused):
    data = nifti(magic=b"ni1", vox_offset=0)
    header, voxels = tmp_path / "a.hdr", tmp_path / "a.img"
    voxels.write_bytes(data[352:])
    assert "a.hdr is missing" in refused(voxels, "container.pair")
    header.write_bytes(data[:348])
    voxels.write_bytes(data[352:-1])
    assert str(voxels) in refused(voxels, "container.short")
    voxels.unlink()
    assert "a.img is missing" in refused(header, "container.pair")
    voxels.symlink_to("nowhere")
    with pytest.raises(VolumeError) as caught:
        read_volume(header)
    assert caught.value.code == "container.missing"
    assert str(voxels) in str(caught.value)
    packed = bytearray(gzip.compress(data[:348] + bytes(5000)))  # longer than what is sniffed
    packed[-6] ^= 1
    (tmp_path / "b.hdr.gz").write_bytes(packed)
    (tmp_path / "b.img.gz").write_bytes(gzip.compress(data[352:]))
    refused(tmp_path / "b.hdr.gz", "container.damaged")
