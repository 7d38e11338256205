"""The directory of a torch file, which is a zip archive: checked before anything in it is used.

torch stores entries uncompressed and never checks their CRC-32. Its reader trusts sizes and places;
what it would read is settled here: one directory at the very end, entries that lie inside the file
one after the other, each as long as it says and with the checksum that it was written with.
"""

import os
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sparsemae.errors import UserError

PICKLE = "data.pkl"
MOST_ENTRIES = 2**15
_LARGEST_DIRECTORY = 2**22  # bytes
_CHUNK = 2**20  # bytes
_END, _END64, _LOCATOR, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\3\4"
_END_SIZE, _END64_SIZE, _LOCATOR_SIZE, _LOCAL_SIZE = 22, 56, 20, 30  # bytes
_FLAGS = 0x0808  # sizes repeated after the data, name in UTF-8: what torch sets
_FOLDER = 0x10  # attribute of an entry
_NAME = re.compile(r"[\x20-\x7e]+")
AGAIN = "copy or download it again"


@dataclass(frozen=True)
class Entry:
    """Where the bytes of one entry lie in the file."""

    start: int  # bytes
    size: int  # bytes
    crc: int


def read_directory(file: BinaryIO, path: Path) -> dict[str, Entry]:
    """The entries of the torch file `path`, by their names without the leading folder.

    The data itself is not read: see `check_sums`.

    Raises:
        UserError: It is cut short, no torch file, or laid out as torch never writes it.
    """
    size = file.seek(0, os.SEEK_END)
    begin, count = _find_directory(file, path, size)
    try:
        infos = zipfile.ZipFile(file).infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        raise damaged(path, "the zip directory cannot be read") from None
    if len(infos) != count:
        raise damaged(path, f"its zip directory lists {len(infos)} entries instead of {count}")
    _check_names(path, infos)
    for info in infos:
        _check_info(path, info)

    entries, end = {}, 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        entry = _locate(file, path, info)
        if info.header_offset < end:
            raise damaged(path, f"zip entry {info.filename} overlaps another one")
        end = entry.start + entry.size
        if end > begin:
            raise damaged(path, f"zip entry {info.filename} reaches beyond the data")
        entries[info.filename.partition("/")[2]] = entry
    return entries


def check_sums(file: BinaryIO, path: Path, entries: dict[str, Entry]) -> None:
    """Read every entry and compare its CRC-32 with the directory's.

    Raises:
        UserError: One differs, or the file was written without checksums.
    """
    if not any(entry.crc for entry in entries.values()):
        raise UserError(
            f"{path}: was saved without checksums (compute_crc32 is False), so damage would go "
            f"unnoticed; save it again with them"
        )
    for name, entry in entries.items():
        file.seek(entry.start)
        crc, left = 0, entry.size
        while left and (data := file.read(min(left, _CHUNK))):
            crc, left = zlib.crc32(data, crc), left - len(data)
        if left or crc != entry.crc:
            raise damaged(path, f"the checksum of zip entry {name} is wrong")


def damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: damaged: {problem}; {AGAIN}")


def _find_directory(file: BinaryIO, path: Path, size: int) -> tuple[int, int]:
    """Where the directory begins and how many entries it has; it ends where its end record begins.

    Nothing may follow that record: readers that look for it in other ways find the same one.
    """
    file.seek(max(size - _END_SIZE - _LOCATOR_SIZE - _END64_SIZE, 0))
    tail = file.read()
    end = tail[-_END_SIZE:]
    if len(end) < _END_SIZE or not end.startswith(_END):
        raise UserError(f"{path}: cut short: its zip directory is not at its end; {AGAIN}")
    where = size - _END_SIZE
    *disks, here, count, length, begin, comment = struct.unpack("<4x4H2IH", end)
    locator = tail[-_END_SIZE - _LOCATOR_SIZE : -_END_SIZE]
    if locator.startswith(_LOCATOR):
        where -= _LOCATOR_SIZE + _END64_SIZE
        end64 = tail[: -_END_SIZE - _LOCATOR_SIZE]
        if len(end64) < _END64_SIZE or not end64.startswith(_END64):
            raise damaged(path, "the zip directory cannot be read")
        disk, found, files = struct.unpack("<4xIQI", locator)
        if disk or found != where or files > 1:
            raise damaged(path, "the zip directory cannot be read")
        *disks, here, count, length, begin = struct.unpack("<16x2I4Q", end64)
    if any(disks) or comment or here != count or begin + length != where:
        raise damaged(path, "the zip directory is not where it should be")
    if count > MOST_ENTRIES or length > _LARGEST_DIRECTORY:
        raise UserError(
            f"{path}: {count} zip entries with a directory of {length} bytes, more than weights "
            f"need; check where the file comes from"
        )
    return begin, count


def _check_names(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    """All in one folder, unlike each other in any case, and no way out of it."""
    names = [info.orig_filename for info in infos]
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(
            f"{path}: a TorchScript program, not weights; where it was made, save "
            f"model.state_dict() instead"
        )
    folder = names[0].partition("/")[0] if names else ""
    if f"{folder}/{PICKLE}" not in names:
        raise UserError(
            f"{path}: a zip archive that is no torch file (it has no {PICKLE}); unpack it, or name "
            f"the file with the weights"
        )
    for name, info in zip(names, infos, strict=True):
        parts = name.split("/")
        odd = "\\" in name or not {"", ".", ".."}.isdisjoint(parts)
        if odd or name != info.filename or parts[0] != folder or not _NAME.fullmatch(name):
            raise UserError(
                f"{path}: zip entry {name[:80]!a} has a name that torch does not write; check "
                f"where the file comes from"
            )
    if len({name.casefold() for name in names}) != len(names):
        raise UserError(
            f"{path}: two zip entries have the same name; check where the file comes from"
        )


def _check_info(path: Path, info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise UserError(
            f"{path}: zip entry {info.filename} is compressed, which torch never writes; it may be "
            f"a zip bomb: check where the file comes from"
        )
    # torch's reader leaves the memory for an entry marked as a folder as it is, and says nothing
    if info.external_attr & _FOLDER or info.internal_attr or info.volume or info.comment:
        raise damaged(path, f"zip entry {info.filename} is marked as a folder or other oddity")
    if info.flag_bits & ~_FLAGS:
        raise UserError(
            f"{path}: zip entry {info.filename} is encrypted or patched, which torch never writes; "
            f"check where the file comes from"
        )


def _locate(file: BinaryIO, path: Path, info: zipfile.ZipInfo) -> Entry:
    """Its data begins after a header of its own, which must name it too."""
    file.seek(info.header_offset)
    head = file.read(_LOCAL_SIZE)
    name = info.filename.encode("ascii")
    if len(head) == _LOCAL_SIZE and head.startswith(_LOCAL):
        flags, method, named, extra = struct.unpack("<6x2H16x2H", head)
        if method == zipfile.ZIP_STORED and not flags & ~_FLAGS and file.read(named) == name:
            start = info.header_offset + _LOCAL_SIZE + named + extra
            return Entry(start, info.file_size, info.CRC)
    raise damaged(path, f"zip entry {info.filename} does not begin where it should")
