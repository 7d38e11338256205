"""Opening what claims to be a volume: a regular file, told apart by its first bytes.

A pipe or device is refused without waiting for it; neither name nor extension is trusted.
"""

import contextlib
import errno
import io
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sparsemae.data.codes import Findings, VolumeError
from sparsemae.data.reading.stream import GZIP, Stream, unreadable
from sparsemae.files import open_checked

Format = Literal["nifti1", "nifti2", "pair1", "pair2", "nrrd", "meta"]
HEAD = 1024  # bytes that tell a format
_LFS = b"version https://git-lfs.github.com/spec/"
_META_KEYS = (b"ObjectType", b"NDims", b"Comment", b"TransformType")
_OTHERS = (  # where, what the file begins with, what it is and what to do
    (0, b"PK\x03\x04", "a zip archive; unpack it"),
    (0, b"BZh", "a bzip2 file; unpack it, or compress with gzip"),
    (0, b"\xfd7zXZ", "an xz file; unpack it, or compress with gzip"),
    (0, b"(\xb5/\xfd", "a zstd file; unpack it, or compress with gzip"),
    (0, b"7z\xbc\xaf", "a 7z archive; unpack it"),
    (0, GZIP, "compressed twice; unpack it once"),
    (257, b"ustar", "a tar archive; unpack it"),
    (128, b"DICM", "a DICOM file; convert the series, for example with dcm2niix"),
    (0, b"\x89HDF", "an HDF5 or MINC file; convert it to .nii.gz"),
    (0, b"\x93NUMPY", "a NumPy array without spacing; save it as .nii.gz"),
    (0, b"\x00\x00\x00\x01", "perhaps a FreeSurfer volume; convert it with mri_convert"),
    (0, b"<", "a web page or XML; download the file itself"),
)


@contextlib.contextmanager
def open_regular(findings: Findings) -> Iterator[tuple[io.FileIO, os.stat_result]]:
    """The file at `findings.path`, open for reading; `VolumeError` unless regular and not empty."""
    path = findings.path
    try:
        descriptor = open_checked(path, lambda status: _check_kind(findings, status))
    except VolumeError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise findings.refuse("container.missing", "no such file; check the path") from None
    except PermissionError:
        raise findings.refuse(
            "container.permission", "permission denied; change the file's permissions"
        ) from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise findings.refuse(
                "container.link", "symbolic links lead in a circle; repair the link"
            ) from None
        raise unreadable(findings, error) from None
    except ValueError:  # a null byte, or characters the file system cannot spell
        raise findings.refuse(
            "container.missing", "no file can have this name; check the path"
        ) from None
    with io.FileIO(descriptor, "rb") as file:
        yield file, os.fstat(descriptor)


def _check_kind(findings: Findings, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise findings.refuse("container.not_file", "not a regular file; name a volume's file")
    if status.st_size == 0:
        raise findings.refuse("container.empty", "the file is empty; copy it again")


def stored_bytes(status: os.stat_result) -> int:
    """Bytes on disk: fewer than the size for a file with holes."""
    return min(status.st_size, status.st_blocks * 512) or status.st_size


def identify(head: bytes) -> Format | None:
    """The format a file with these first bytes, inflated, is in; None if it is none of ours."""
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 4 else set()
    match head[344:348], head[4:8]:
        case (b"n+1\0", _) if 348 in sizes:
            return "nifti1"
        case (b"ni1\0", _) if 348 in sizes:
            return "pair1"
        case (_, b"n+2\0") if 540 in sizes:
            return "nifti2"
        case (_, b"ni2\0") if 540 in sizes:
            return "pair2"
    if head.startswith(b"NRRD000"):
        return "nrrd"
    if any(head.startswith(key) for key in _META_KEYS) and b"=" in head:
        return "meta"
    return None


def format_of(stream: Stream) -> Format:
    """The format of the stream, which is left where it is; `VolumeError` if it is none of ours."""
    head = stream.peek(HEAD)
    if (found := identify(head)) is not None:
        return found
    findings = stream.findings
    if head.startswith(_LFS):
        raise findings.refuse(
            "container.lfs", "a git-LFS pointer, not the volume; run `git lfs pull`"
        )
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] in (b"n+2\0", b"ni2\0"):
        raise findings.refuse(
            "header.sizeof", "NIfTI's magic with another header size; export it again"
        )
    if len(head) >= 348 and head[:4] in (b"\x5c\x01\0\0", b"\0\0\x01\x5c"):
        raise findings.refuse(
            "header.magic", "an Analyze header, or a damaged NIfTI one; convert it to .nii.gz"
        )
    for where, begin, what in _OTHERS:
        if head[where:].startswith(begin):
            raise findings.refuse("container.not_nifti", f"not a volume but {what}")
    raise findings.refuse("container.not_nifti", "not a NIfTI file; convert it to .nii.gz")


def other_half(findings: Findings, wanted: Literal[".hdr", ".img"]) -> Path:
    """The file beside `findings.path` that makes it a pair, compressed alike if both are there."""
    path = findings.path
    name = path.name
    packed = name.lower().endswith(".gz")
    stem = name[: -len(".gz")] if packed else name
    stem, extension = os.path.splitext(stem)
    if extension.lower() in (".hdr", ".img"):
        wanted = wanted.upper() if extension.isupper() else wanted  # type: ignore[assignment]
        zipped = wanted + (".GZ" if wanted.isupper() else ".gz")
        for ending in (zipped, wanted) if packed else (wanted, zipped):
            if os.path.lexists(path.with_name(stem + ending)):
                return path.with_name(stem + ending)
    raise findings.refuse(
        "container.pair", f"half of a pair, and {stem}{wanted} is missing; put it beside this file"
    )
