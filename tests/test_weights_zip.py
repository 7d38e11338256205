"""The zip archive around torch weights: cut, flipped, crafted; refused or read exactly the same."""

import io
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib

import pytest
import torch

from sparsemae import weights_zip
from sparsemae.errors import UserError
from sparsemae.weights import read_weights
from sparsemae.weights_zip import read_directory

MB = 2**20


@pytest.fixture
def path(tmp_path):
    """A small torch file of two tensors."""
    torch.save({"model": {"a": torch.randn(5), "b": torch.arange(3)}, "epoch": 4}, tmp_path / "w")
    return tmp_path / "w"


def entries(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path, content, *, method=zipfile.ZIP_STORED):
    """Write entries as a zip archive; `content` are pairs of a name and bytes."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as archive:
        warnings.simplefilter("ignore", UserWarning)  # of a name that is there twice
        for name, data in content:
            archive.writestr(name, data)


def problem(path) -> str:
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert ";" in message or ": check" in message, "no remedy"
    return message


def assert_same(found, expected):
    assert (found.kind, found.extra) == (expected.kind, expected.extra)
    assert list(found.tensors) == list(expected.tensors)
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)


def test_a_file_cut_anywhere_is_refused(path):
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        problem(path)


def test_bytes_after_the_end_are_refused(path):
    data = path.read_bytes()
    for more in (b"\0", b"x" * 100, data):
        path.write_bytes(data + more)
        assert problem(path)
    for before in (b"\0", data):
        path.write_bytes(before + data)
        assert problem(path)


def refused_or_harmless(path, places, flips) -> int:
    """Flip bits at each place in turn; how many times the file was refused."""
    expected, data, refused = read_weights(path), path.read_bytes(), 0
    for place in places:
        for bits in flips:
            flipped = bytearray(data)
            flipped[place] ^= bits
            path.write_bytes(flipped)
            try:
                found = read_weights(path)
            except UserError:
                refused += 1
            else:
                assert_same(found, expected)
    return refused


@pytest.mark.parametrize("bits", [0x01, 0xFF])
def test_a_flip_of_any_byte_is_refused_or_harmless(path, bits):
    data = path.read_bytes()
    refused = refused_or_harmless(path, range(len(data)), [bits])
    assert refused > sum(map(len, entries_of(data).values()))


def test_a_flip_of_any_bit_of_the_directory_is_refused_or_harmless(path):
    """Among them the mark of a folder: torch would return memory that nobody has written."""
    data = path.read_bytes()
    begin = data.index(b"PK\1\2")
    refused = refused_or_harmless(path, range(begin, len(data)), [1 << bit for bit in range(8)])
    assert refused > len(data) - begin


@pytest.mark.parametrize("name", ["w/data.pkl", "w/data/0", "w/version"])
def test_an_entry_marked_as_a_folder_is_refused(path, name):
    patched(path, name, attributes=0x10)
    assert f"zip entry {name} is marked as a folder" in problem(path)


def test_what_torch_reads_must_be_what_was_checked(path, monkeypatch):
    """Whatever else its reader of archives may do, or somebody to the file in between."""
    torch_load, expected = torch.load, read_weights(path)

    def load(*args, **kwargs):
        content = torch_load(*args, **kwargs)
        content["model"]["b"][1] += 1
        return content

    monkeypatch.setattr(torch, "load", load)
    assert "torch reads other bytes than those checked" in problem(path)
    monkeypatch.undo()
    assert_same(read_weights(path), expected)


def test_another_byte_order_is_refused(path):
    rewrite(path, (entries(path) | {"w/byteorder": b"big"}).items())
    assert "of another byte order" in problem(path)


def entries_of(data):
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_every_bit_of_the_data_is_guarded(path):
    data = path.read_bytes()
    with path.open("rb") as file:
        places = read_directory(file, path)
    assert {"data.pkl", "data/0", "data/1"} <= places.keys()
    for name in ("data.pkl", "data/0", "data/1"):
        entry = places[name]
        for bit in range(entry.start * 8, (entry.start + entry.size) * 8):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            assert f"checksum of zip entry {name} is wrong; copy" in problem(path)


def test_an_archive_as_python_writes_it_is_read_too(path):
    expected = read_weights(path)
    rewrite(path, entries(path).items())
    assert_same(read_weights(path), expected)


def test_a_file_without_checksums_is_refused(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert "saved without checksums" in problem(tmp_path / "w.pth")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries_are_refused(path, method):
    rewrite(path, entries(path).items(), method=method)
    assert "is compressed, which torch never writes" in problem(path)


@pytest.mark.parametrize(
    "name",
    ["/etc/x", "w/../x", "w/./x", "w//x", "w/", "v/x", "x", "w\\x", "w/a\\b", "w/ü", "w/a\nb"],
)
def test_odd_names_are_refused(path, name):
    rewrite(path, [*entries(path).items(), (name, b"x")])
    assert "has a name that torch does not write" in problem(path)


def test_a_name_with_a_null_byte_is_refused(path):
    rewrite(path, [*entries(path).items(), ("w/aXb", b"x")])
    path.write_bytes(path.read_bytes().replace(b"w/aXb", b"w/a\0b"))
    assert "has a name that torch does not write" in problem(path)


@pytest.mark.parametrize("name", ["w/data.pkl", "w/DATA.pkl", "w/Data/0"])
def test_entries_of_the_same_name_are_refused(path, name):
    rewrite(path, [*entries(path).items(), (name, b"x")])
    assert "two zip entries have the same name" in problem(path)


def test_a_zip_archive_without_weights_is_refused(path):
    rewrite(path, [])
    assert "no torch file" in problem(path) or "neither" in problem(path)
    rewrite(path, [("readme.txt", b"x")])
    assert "no torch file" in problem(path)


def test_too_many_entries_are_refused_before_they_are_read(path, monkeypatch):
    monkeypatch.setattr(weights_zip, "MOST_ENTRIES", 20)
    content = entries(path)
    rewrite(path, [*content.items(), *[(f"w/x{i}", b"") for i in range(20 - len(content))]])
    read_weights(path)
    rewrite(path, [*content.items(), *[(f"w/x{i}", b"") for i in range(21 - len(content))]])
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert "21 zip entries" in problem(path)


def test_a_directory_with_more_entries_than_it_counts_is_refused(path):
    rewrite(path, entries(path).items())
    data = bytearray(path.read_bytes())
    count = struct.unpack("<H", data[-14:-12])[0]
    data[-14:-10] = struct.pack("<2H", count - 1, count - 1)
    path.write_bytes(data)
    assert f"lists {count} entries instead of {count - 1}" in problem(path)


def patched(path, name, **changes):
    """Change fields of an entry's record in the directory."""
    fields = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I")}
    fields |= {
        "packed": (20, "<I"),
        "size": (24, "<I"),
        "attributes": (38, "<I"),
        "offset": (42, "<I"),
    }
    data = bytearray(path.read_bytes())
    place = data.rindex(name.encode()) - 46
    assert data[place : place + 4] == b"PK\1\2"
    for field, value in changes.items():
        where, kind = fields[field]
        struct.pack_into(kind, data, place + where, value)
    path.write_bytes(data)


def test_entries_that_overlap_are_refused(path):
    """Many names for the same bytes: each is short, all together are huge."""
    inner = zipfile.ZipInfo("w/inner")
    inner.CRC, inner.file_size, inner.compress_size = zlib.crc32(b"xyz"), 3, 3
    rewrite(
        path,
        [*entries(path).items(), ("w/outer", inner.FileHeader() + b"xyz"), ("w/inner", b"xyz")],
    )
    read_weights(path)
    with path.open("rb") as file:
        outer = read_directory(file, path)["outer"]
    patched(path, "w/inner", offset=outer.start)
    assert "w/inner overlaps another one" in problem(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"packed": 10**6, "size": 10**6}, "reaches beyond the data"),
        ({"packed": 2**32 - 2, "size": 2**32 - 2}, "reaches beyond the data"),
        ({"size": 2**31}, "is compressed"),
        ({"method": 8}, "is compressed"),
        ({"flags": 1}, "is encrypted"),
        ({"flags": 32}, ""),
        ({"offset": 0}, "does not begin where it should"),
        ({"offset": 2**31}, "does not begin where it should"),
        ({"offset": 2**32 - 1}, ""),
        ({"crc": 1}, "the checksum of zip entry data/1 is wrong"),
        ({"packed": 23, "size": 23}, "the checksum of zip entry data/1 is wrong"),
    ],
)
def test_a_directory_that_does_not_fit_the_file_is_refused(path, changes, words):
    rewrite(path, entries(path).items())
    patched(path, "w/data/1", **changes)
    assert words in problem(path)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (-2, "is not where it should be"),  # a comment follows, or so it says
        (-34, "cannot be read"),  # where readers other than Python's look for the end record
        (-38, "cannot be read"),
        (-26, "cannot be read"),
    ],
)
def test_end_records_that_disagree_are_refused(path, place, words):
    data = bytearray(path.read_bytes())
    data[place] ^= 2
    path.write_bytes(data)
    assert f"the zip directory {words}" in problem(path)


def test_a_local_header_that_disagrees_is_refused(path):
    rewrite(path, entries(path).items())
    data = path.read_bytes()
    place = data.index(b"w/data/1") - 30
    for where, value in ((0, b"PK\1\2"), (6, b"\1"), (8, b"\x08"), (37, b"2")):
        changed = bytearray(data)
        changed[place + where : place + where + len(value)] = value
        path.write_bytes(changed)
        assert "w/data/1 does not begin where it should" in problem(path)


def grown_by(path, code=None) -> int:
    """Bytes that a process grows by while it refuses the file, from the size of a fresh one."""
    code = code or (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from sparsemae.errors import UserError\n"
        "from sparsemae.weights import read_weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "import torch; torch.serialization._legacy_load; before = peak()\n"
        "try:\n    read_weights(Path(sys.argv[1]))\n"
        "except UserError:\n    print(peak() - before)\n"
        "else:\n    print('accepted')\n"
    )
    run = [sys.executable, "-c", code, str(path)]
    return int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_bomb_takes_no_memory(path, method):
    """Less than 1 MB for 256: compressed, or a tensor's size that its bytes do not have."""
    size = 2**28
    with zipfile.ZipFile(path, "w", method) as archive:
        pickled = io.BytesIO()
        torch.save({"model": {"a": torch.zeros(2**10)}}, pickled)
        for name, data in entries_of(pickled.getvalue()).items():
            if method == zipfile.ZIP_STORED:
                data = data.replace(b"M\x00\x04", b"J" + struct.pack("<i", size // 4))
            elif name.endswith("data/0"):
                with archive.open(name, "w", force_zip64=True) as entry:
                    for _ in range(size // MB):
                        entry.write(bytes(MB))
                continue
            archive.writestr(name, data)
    assert path.stat().st_size < MB
    assert grown_by(path) < 64 * MB


def test_a_large_file_that_is_refused_takes_its_size_once(tmp_path):
    state = {name: torch.zeros(2**24) for name in "abc"}
    state["c"][-1] = float("nan")
    torch.save({"model": state}, tmp_path / "w.pth")
    size = (tmp_path / "w.pth").stat().st_size
    assert size > 190 * MB
    assert grown_by(tmp_path / "w.pth") < size + 64 * MB
