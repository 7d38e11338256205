"""From a path to one frame of voxels: every check that can be made before memory is taken, first.

The order is fixed: the file, its format, its header, the size, the voxels, the checksum to the end.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from sparsemae.data.codes import Findings
from sparsemae.data.reading.container import (
    HEAD,
    Format,
    format_of,
    identify,
    open_regular,
    other_half,
    stored_bytes,
)
from sparsemae.data.reading.header import Header
from sparsemae.data.reading.itk import read_meta, read_nrrd
from sparsemae.data.reading.nifti import read_nifti
from sparsemae.data.reading.stream import CHUNK, RATIO, Stream

SUSPICIOUS = 100  # bytes of voxels per byte on disk; of images it is at most 20
HARMLESS = 1 << 24  # voxels that may be read whatever the ratio: 64 MiB of float32
BOMB = 1 << 28  # bytes of one value from the start; empty ends of real label maps are shorter

T = TypeVar("T")


def sniff(path: Path | str) -> Format:
    """The format of the file, by its first bytes; `VolumeError` if it is no volume."""
    findings = Findings(Path(path))
    with open_regular(findings) as (file, status):
        stream = Stream(file, findings, status.st_size)
        if not _is_image_half(stream):
            return format_of(stream)
    return sniff(other_half(findings, ".hdr"))


def decode(
    findings: Findings,
    frame: int | None,
    max_voxels: int,
    read: Callable[[Stream, Header], T],
    *,
    constant: bool,
) -> tuple[T, Header]:
    """What `read` makes of the voxels of the frame, once the whole file is known to be sound.

    `read` must read exactly one frame off the stream. Unless `constant`, a volume of one value is
    refused, if need be before memory is taken for it.
    """
    header = read_header(findings)
    index = _check_size(header, frame, max_voxels, findings)
    data = findings.half(header.file)
    with open_regular(data) as (file, status):
        _check_capacity(header, file, status, data, constant)
        stream = _voxel_stream(header, file, status, data)
        stream.skip(header.offset + index * header.frame_bytes)
        try:
            values = read(stream, header)
        except MemoryError:
            raise findings.refuse(
                "container.memory",
                f"no memory for {header.voxels} voxels; use fewer workers, or lower the limit",
            ) from None
        stream.skip((header.frames - index - 1) * header.frame_bytes)
        stream.finish()
    return values, header


def read_header(findings: Findings) -> Header:
    """The header of the volume at `findings.path`, which may be either half of a pair."""
    with open_regular(findings) as (file, status):
        stream = Stream(file, findings, status.st_size)
        if not _is_image_half(stream):
            match format_of(stream):
                case "nrrd":
                    return read_nrrd(stream)
                case "meta":
                    return read_meta(stream)
                case found:
                    header = read_nifti(stream, found)
            if header.file != findings.path:
                stream.findings = Findings(findings.path)  # extensions after it are no news
                stream.finish()
            return header
    return read_header(findings.half(other_half(findings, ".hdr")))


def _is_image_half(stream: Stream) -> bool:
    """Named .img, and without the magic of a volume of its own."""
    name = stream.findings.path.name.lower()
    return name.endswith((".img", ".img.gz")) and identify(stream.peek(HEAD)) is None


def _check_size(header: Header, frame: int | None, max_voxels: int, findings: Findings) -> int:
    """The index of the frame to read."""
    if header.frames > 1 and frame is None:
        raise findings.refuse(
            "header.frames",
            f"{header.shape} holds several frames; name one, or split it into 3D volumes",
        )
    index = frame or 0
    if not 0 <= index < header.frames:
        raise findings.refuse(
            "header.frames", f"frame {index} of {header.frames}, counted from 0; name another"
        )
    if header.voxels > max_voxels:
        raise findings.refuse(
            "header.budget",
            f"{header.shape} has over {max_voxels} voxels; crop it, or raise the limit",
        )
    return index


def _voxel_stream(
    header: Header, file: io.FileIO, status: os.stat_result, data: Findings
) -> Stream:
    file.seek(header.begin)
    return Stream(file, data, status.st_size, header.compressed)


def _check_capacity(
    header: Header, file: io.FileIO, status: os.stat_result, data: Findings, constant: bool
) -> None:
    """Refuse what cannot hold its voxels, and what holds one value many times over."""
    stream = _voxel_stream(header, file, status, data)
    size = status.st_size - header.begin
    most = size * RATIO if stream.compressed else size
    if header.end > most:
        raise data.refuse(
            "container.short",
            f"{size} bytes cannot hold the {header.end} that the header needs; copy it again",
        )
    if header.voxels <= HARMLESS or header.end <= SUSPICIOUS * stored_bytes(status):
        return
    if not _varies(stream, header) and not constant:
        raise data.refuse("intensity.constant", "every voxel has one value; remove the file")


def _varies(stream: Stream, header: Header) -> bool:
    """Read ahead, keeping nothing, until the voxels vary; `VolumeError` if that takes too long."""
    stream.skip(header.offset)
    step = CHUNK // header.dtype.itemsize * header.dtype.itemsize
    left = header.frames * header.frame_bytes
    first = stream.read(min(step, left))
    values = np.frombuffer(first, f"V{header.dtype.itemsize}")
    if (values != values[0]).any():
        return True
    left -= len(first)
    while left:
        part = stream.read(min(step, left))
        if part != first[: len(part)]:
            return True
        left -= len(part)
        if left and stream.position - header.offset >= BOMB:
            raise stream.findings.refuse(
                "container.bomb",
                f"a single value fills the first {BOMB >> 20} MiB; crop it, or store integers",
            )
    return False
