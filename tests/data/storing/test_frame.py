"""A case's file: what is written is read, by us and by others, in part and whole."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import blosc2
import numpy as np
import pytest
from scipy import ndimage

from sparsemae.data.store import write_image, write_mask
from sparsemae.data.storing.frame import read_array
from sparsemae.errors import UserError

SHAPE = (70, 33, 20)


def volume(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal((1, *shape)).astype(np.float32)


def constant_parts():
    """Chunks that blosc2 stores in special ways: zeros, one value, and mixed."""
    array = np.zeros((1, 200, 20, 20), np.float32)
    array[:, 64:128] = -1.5
    array[:, 140:150] = volume(0, (10, 20, 20))
    return array


ARRAYS = {
    "odd": volume(0),
    "tiny": volume(1, (1, 1, 1)),
    "thin": volume(2, (130, 1, 5)),
    "two chunks everywhere": volume(3, (65, 66, 67)),
    "parts": constant_parts(),
    "zeros": np.zeros((1, 70, 70, 70), np.float32),
    "background": np.full((1, 70, 70, 70), -1.5, np.float32),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS.keys())
def test_round_trip(tmp_path, array, dtype):
    stored = write_image(tmp_path, "a", array, dtype)
    got = read_array(tmp_path, stored, (0, 0, 0), array.shape[1:])
    assert got.dtype == dtype
    assert np.array_equal(got, array.astype(dtype))
    assert stored.file == "cases/a.b2nd"
    assert stored.bytes == (tmp_path / stored.file).stat().st_size


@pytest.mark.parametrize("name", ["odd", "two chunks everywhere", "parts"])
def test_a_box_is_a_slice(tmp_path, name):
    array = ARRAYS[name].astype(np.float16)
    stored = write_image(tmp_path, "a", array)
    rng = np.random.default_rng(0)
    for _ in range(60):
        start = rng.integers(0, array.shape[1:])
        stop = rng.integers(start + 1, np.add(array.shape[1:], 1))
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        got = read_array(tmp_path, stored, start, stop)
        assert np.array_equal(got, array[(slice(None), *box)])


def test_masks_are_small(tmp_path):
    mask = np.zeros((1, 128, 128, 128), bool)
    mask[:, :40, 50:] = True
    stored = write_mask(tmp_path, "a", mask)
    assert stored.file == "excluded/a.b2nd"
    assert stored.bytes < 10_000
    got = read_array(tmp_path, stored, (0, 0, 0), (128, 128, 128))
    assert got.dtype == np.uint8
    assert np.array_equal(got, mask)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_programs_read_it_the_way_nnunet_does(tmp_path, dtype):
    array = volume(3, (65, 66, 67)).astype(dtype)
    stored = write_image(tmp_path, "a", array, dtype)
    path = str(tmp_path / stored.file)
    theirs = blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, mmap_mode="r")
    assert theirs.shape == array.shape
    assert theirs.dtype == dtype
    assert theirs.schunk.cparams.codec == blosc2.Codec.LZ4HC
    assert np.array_equal(theirs[:], array)
    assert np.array_equal(theirs[:, 5:70, 60:, 1:3], array[:, 5:70, 60:, 1:3])


def test_equal_input_gives_equal_bytes(tmp_path):
    one = write_image(tmp_path / "one", "a", ARRAYS["parts"])
    two = write_image(tmp_path / "two", "a", np.asfortranarray(ARRAYS["parts"]))
    assert one == two
    files = [(tmp_path / name / one.file).read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]


def test_bytes_are_shuffled_where_that_is_smaller(tmp_path):
    levels = np.random.default_rng(0).integers(0, 40, (1, 70, 70, 70)) / 7
    smooth = ndimage.gaussian_filter(volume(0, (70, 70, 70)), (0, 2, 2, 2))
    for name, array, shuffled in (("levels", levels, False), ("smooth", smooth, True)):
        stored = write_image(tmp_path, name, array)
        assert np.array_equal(
            read_array(tmp_path, stored, (0, 0, 0), (70, 70, 70)), array.astype(np.float16)
        )
        filters = blosc2.open(str(tmp_path / stored.file), mode="r").schunk.cparams.filters
        assert (blosc2.Filter.SHUFFLE in filters) == shuffled


@pytest.mark.parametrize("value", [65520.0, -1e30, np.inf, np.nan])
def test_what_float16_cannot_hold_is_refused(tmp_path, value):
    array = volume(0)
    array[0, 3, 4, 5] = value
    with pytest.raises(ValueError, match=r"case a: the value .* cannot be stored as float16"):
        write_image(tmp_path, "a", array)
    assert list(tmp_path.rglob("*.*")) == []
    array[0, 3, 4, 5] = 65519.0
    stored = write_image(tmp_path, "a", array)
    assert read_array(tmp_path, stored, (3, 4, 5), (4, 5, 6)) == 65504


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    write_image(tmp_path, "a", volume(0))
    before = (tmp_path / "cases/a.b2nd").read_bytes()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    for case_id in ("a", "b"):
        with pytest.raises(OSError, match="No space left") as caught:
            write_image(tmp_path, case_id, volume(1))
        assert caught.value.errno == errno.ENOSPC
    assert [file.name for file in (tmp_path / "cases").iterdir()] == ["a.b2nd"]
    assert (tmp_path / "cases/a.b2nd").read_bytes() == before


def test_writers_of_one_case_do_not_meet(tmp_path):
    array = volume(0)
    with ThreadPoolExecutor(8) as pool:
        all_stored = set(pool.map(lambda _: write_image(tmp_path, "a", array), range(24)))
    assert len(all_stored) == 1
    got = read_array(tmp_path, all_stored.pop(), (0, 0, 0), SHAPE)
    assert np.array_equal(got, array.astype(np.float16))
    assert len(list((tmp_path / "cases").iterdir())) == 1


def test_air_takes_no_room(tmp_path):
    stored = write_image(tmp_path, "a", ARRAYS["parts"])
    crcs = [stored.crcs[at : at + 8] for at in range(0, len(stored.crcs), 8)]
    assert [crc == "00000000" for crc in crcs] == [False, True, False, False, True]
    air = ARRAYS["background"]
    assert write_image(tmp_path, "b", air).bytes < 0.02 * 2 * air.size


def test_a_box_reads_its_own_chunks_only(tmp_path, monkeypatch):
    array = volume(0, (128, 128, 128))
    stored = write_image(tmp_path, "a", array, "float32")
    real, counts = os.preadv, []
    monkeypatch.setattr(os, "preadv", lambda *args: counts.append(n := real(*args)) or n)
    read_array(tmp_path, stored, (0, 0, 0), (64, 64, 64))
    assert sum(counts) < stored.bytes / 7
    counts.clear()
    read_array(tmp_path, stored, (60, 0, 0), (70, 64, 64))
    assert stored.bytes / 5 < sum(counts) < stored.bytes / 3.5


def test_a_file_system_may_answer_in_pieces(tmp_path, monkeypatch):
    array = volume(0)
    stored = write_image(tmp_path, "a", array)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: real(fd, [parts[0][:1000]], at))
    got = read_array(tmp_path, stored, (0, 0, 0), SHAPE)
    assert np.array_equal(got, array.astype(np.float16))


def test_a_failing_disk_is_named(tmp_path, monkeypatch):
    stored = write_image(tmp_path, "a", volume(0))

    def broken(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UserError, match=r"cases/a\.b2nd: cannot be read \(Input/output error\)"):
        read_array(tmp_path, stored, (0, 0, 0), SHAPE)


def test_a_file_cut_short_under_the_reader_is_named(tmp_path, monkeypatch):
    stored = write_image(tmp_path, "a", volume(0))
    real = os.preadv

    def shrinking(descriptor, parts, at):
        if at > 0:
            os.truncate(tmp_path / stored.file, 300)
        return real(descriptor, parts, at)

    monkeypatch.setattr(os, "preadv", shrinking)
    with pytest.raises(UserError, match=r"cases/a\.b2nd: damaged: cut short"):
        read_array(tmp_path, stored, (0, 0, 0), SHAPE)


def test_a_forked_process_reads_too(tmp_path):
    array = volume(0, (128, 64, 64))
    stored = write_image(tmp_path, "a", array, "float32")
    read_array(tmp_path, stored, (0, 0, 0), (128, 64, 64))
    child = os.fork()
    if child == 0:
        same = np.array_equal(read_array(tmp_path, stored, (0, 0, 0), (128, 64, 64)), array)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0
