"""One array in one blosc2 file, read so that no damage passes: every byte used was checked before.

blosc2 has no checksums: a flipped bit gives other voxels, or a crash in its decoder. So a CRC-32
is kept of every compressed chunk, and one of what holds the chunks together. A box is read chunk
by chunk into a frame in memory, checked there, and only then decoded; blocks outside the box are
not decoded. The file is not mapped: a failing disk or a file cut short under the reader is an error
with a name and no SIGBUS, and a reader has no open handle to share or to bring through a fork.

Measured on the ICBM152 T1, resampled from 0.93 to 1 mm (212 x 251 x 203 voxels, float16), warm: MB
on disk, and CPU milliseconds of random crops of 96^3 and 160^3 with all checks.

    LZ4HC level 5, chunks of 64^3, blocks of 32^3   4.1   1.5   5.4
    the same, blocks of 16^3                        4.4   1.6   6.2
    the same, chunks of 32^3                        4.2   1.6   5.7
    LZ4HC level 9                                   4.1   1.6   5.2   written in twice the time
    LZ4 level 5                                     4.7   2.0   5.9
    Zstandard level 5                               3.7   3.1   9.9
    bits shuffled, not bytes                        4.8   3.9   9.7
    nothing shuffled                                5.0   1.6   4.9

Not resampled, with the few values a scanner gives, it takes 3.3 MB with bytes shuffled and 2.6
without. How a volume was made does not tell which is better, so its middle is tried with both.
"""

import contextlib
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import blosc2
import numpy as np
from jaxtyping import Int64, Shaped

from sparsemae.data.storing.stored import StoredFile
from sparsemae.errors import UserError
from sparsemae.files import write_atomically

CHUNK, BLOCK = 64, 32
CPARAMS = {
    "codec": blosc2.Codec.LZ4HC,
    "clevel": 5,
    "nthreads": 1,  # parallelism is by processes, and equal input shall give equal bytes
}
# A frame is header, chunks, compressed table of their offsets, trailer. Big-endian numbers at fixed
# places of the header: its length, and the bytes of all chunks.
_HEADER_LENGTH, _CHUNK_BYTES, _FIXED = slice(11, 15), slice(39, 47), 87
_CHUNK_HEADER = 32  # blosc2 looks at the first chunk's when it opens a frame
_DIGITS = 8


class Damaged(Exception):
    """The file is not what was written; the message says where."""


@dataclass(frozen=True)
class _Layout:
    """Where the parts of a frame lie in the file, once the parts around the chunks were checked."""

    head: bytes  # header of the frame and of its first chunk
    tail: bytes  # table of offsets and trailer
    size: int  # of the file
    starts: Int64[np.ndarray, "chunks"]
    stops: Int64[np.ndarray, "chunks"]  # equal to the start for a chunk of zeros: nothing is stored


def encode(array: Shaped[np.ndarray, "1 D H W"]) -> bytes:
    """The array as a blosc2 frame. Equal arrays give equal bytes."""
    middle = tuple(slice(max(0, n - CHUNK) // 2, (n + CHUNK) // 2) for n in array.shape[1:])
    filters = (blosc2.Filter.SHUFFLE, blosc2.Filter.NOFILTER)  # the first where they are equal
    sizes = {f: _compressed(array[(slice(None), *middle)], f).schunk.cbytes for f in filters}
    return _compressed(array, min(filters, key=sizes.get)).to_cframe()


def _compressed(array: Shaped[np.ndarray, "1 D H W"], name: blosc2.Filter) -> blosc2.NDArray:
    size = array.shape[1:]
    return blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=(1, *(min(CHUNK, n) for n in size)),
        blocks=(1, *(min(BLOCK, n) for n in size)),
        cparams=CPARAMS | {"filters": [name]},
        dparams={"nthreads": 1},  # a frame records it, and the default depends on the machine
    )


def checksums(frame: bytes) -> str:
    """`StoredFile.crcs` of a frame."""
    layout = _layout(lambda start, stop: frame[start:stop], len(frame))
    crcs = [_frame_crc(layout)]
    crcs += [zlib.crc32(frame[a:b]) for a, b in zip(layout.starts, layout.stops, strict=True)]
    return "".join(f"{crc:0{_DIGITS}x}" for crc in crcs)


def write_array(store: Path, file: str, array: Shaped[np.ndarray, "1 D H W"]) -> StoredFile:
    """Compress into STORE/`file`, which appears whole or not at all.

    The name lasts through a power failure once its folder is synced, as `write_index` does. OSError
    if it cannot be written, and then nothing is left behind.
    """
    frame = encode(array)
    path = store / file
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, frame, sync_name=False)
    return StoredFile(file, len(frame), checksums(frame))


def read_array(
    store: Path,
    stored: StoredFile,
    start: Sequence[int],
    stop: Sequence[int],
    *,
    remedy: str | None = None,
) -> Shaped[np.ndarray, "1 d h w"]:
    """Voxels start <= i < stop, from checked chunks; `UserError` if one is damaged.

    `remedy` is what its message says instead of what mends a store of `sparsemae preprocess`.
    """
    with _named(store, stored, remedy), (store / stored.file).open("rb", buffering=0) as file:
        layout = _checked_layout(file.fileno(), stored)
        buffer = np.empty(layout.size, np.uint8)  # pages of chunks not asked for are never touched
        buffer[: len(layout.head)] = np.frombuffer(layout.head, np.uint8)
        buffer[layout.size - len(layout.tail) :] = np.frombuffer(layout.tail, np.uint8)
        array = blosc2.ndarray_from_cframe(buffer, copy=False)
        chunks = _touched(array.shape[1:], array.chunks[1:], start, stop)
        _read_chunks(file.fileno(), layout, stored, chunks, memoryview(buffer))
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return array[(slice(0, 1), *box)]


def check_array(store: Path, stored: StoredFile) -> None:
    """Compare all CRCs of the file, decoding nothing; `UserError` if it is damaged."""
    with _named(store, stored), (store / stored.file).open("rb", buffering=0) as file:
        layout = _checked_layout(file.fileno(), stored)
        longest = int((layout.stops - layout.starts).max(initial=0))
        buffer = memoryview(bytearray(longest))
        for chunk, (a, b) in enumerate(zip(layout.starts, layout.stops, strict=True)):
            part = buffer[: b - a]
            _fill(file.fileno(), part, int(a))
            _compare(part, stored, chunk)


@contextlib.contextmanager
def _named(store: Path, stored: StoredFile, remedy: str | None = None) -> Iterator[None]:
    """Say which file is bad, and what mends it."""
    path, command = store / stored.file, f"`sparsemae preprocess SRC -o {store}"
    missing, damaged = (f"{command}{flag}` makes the case again" for flag in ("", " --verify"))
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {remedy or missing}") from None
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); check the disk and permissions; "
            f"{remedy or damaged}"
        ) from None
    except Damaged as error:
        raise UserError(f"{path}: {error}; {remedy or damaged}") from None


def _checked_layout(descriptor: int, stored: StoredFile) -> _Layout:
    size = os.fstat(descriptor).st_size
    if size != stored.bytes:
        raise Damaged(f"damaged: {size} bytes, {stored.bytes} were written")

    def read(start: int, stop: int) -> bytes:
        part = bytearray(stop - start)
        _fill(descriptor, memoryview(part), start)
        return bytes(part)

    return _layout(read, size, stored)


def _layout(read, size: int, stored: StoredFile | None = None) -> _Layout:
    """The parts of a frame; compared with the CRC of `stored` before anything is made of them.

    Where a damaged number leads to other bytes than those written, their CRC differs too.
    """
    if size < _FIXED:
        raise Damaged(f"damaged: only {size} bytes")
    fixed = read(0, _FIXED)
    header = int.from_bytes(fixed[_HEADER_LENGTH], "big")
    chunks = int.from_bytes(fixed[_CHUNK_BYTES], "big")
    if not _FIXED <= header <= header + chunks < size:
        raise Damaged("damaged header")
    head = read(0, header + min(_CHUNK_HEADER, chunks))
    tail = read(header + chunks, size)
    empty = np.empty(0, np.int64)
    layout = _Layout(head, tail, size, empty, empty)
    if stored is not None and _frame_crc(layout) != _crc(stored, 0):
        raise Damaged("damaged: header or trailer differs from what was written")
    return _Layout(head, tail, size, *_extents(tail, header, chunks))


def _extents(tail: bytes, header: int, chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """Start and stop in the file of every chunk: they lie one after the other without gaps."""
    table = int.from_bytes(tail[12:16], "little")  # compressed bytes, in a chunk's own header
    # one thread: starting more took longer than reading a patch
    offsets = np.frombuffer(blosc2.decompress2(tail[:table], nthreads=1), np.int64)
    starts = np.where(offsets < 0, 0, offsets)  # negative: a special value, nothing is stored
    bounds = np.append(np.sort(offsets[offsets >= 0]), chunks)
    stops = bounds[np.searchsorted(bounds, starts, side="right").clip(max=len(bounds) - 1)]
    return starts + header, np.where(offsets < 0, 0, stops) + header


def _touched(shape, chunks, start, stop) -> list[int]:
    """Numbers of the chunks that hold voxels of the box."""
    grid = [-(-n // c) for n, c in zip(shape, chunks, strict=True)]
    ranges = [range(a // c, (b - 1) // c + 1) for a, b, c in zip(start, stop, chunks, strict=True)]
    return [(i * grid[1] + j) * grid[2] + k for i, j, k in product(*ranges)]


def _read_chunks(
    descriptor: int, layout: _Layout, stored: StoredFile, chunks: list[int], buffer: memoryview
) -> None:
    """Bring chunks to their places in the frame, neighbours in the file at once, and check them."""
    extents = [(int(layout.starts[chunk]), int(layout.stops[chunk])) for chunk in chunks]
    runs: list[tuple[int, int]] = []
    for a, b in extents:
        if runs and runs[-1][1] == a:
            a = runs.pop()[0]
        runs.append((a, b))
    for a, b in runs:
        _fill(descriptor, buffer[a:b], a)
    for chunk, (a, b) in zip(chunks, extents, strict=True):
        _compare(buffer[a:b], stored, chunk)


def _fill(descriptor: int, part: memoryview, start: int) -> None:
    """Read exactly the bytes of `part` from `start` on."""
    while part:
        count = os.preadv(descriptor, [part], start)
        if count == 0:
            raise Damaged("damaged: cut short while it was read")
        part, start = part[count:], start + count


def _compare(part: memoryview, stored: StoredFile, chunk: int) -> None:
    if zlib.crc32(part) != _crc(stored, chunk + 1):
        raise Damaged(f"damaged: chunk {chunk} differs from what was written")


def _frame_crc(layout: _Layout) -> int:
    return zlib.crc32(layout.tail, zlib.crc32(layout.head))


def _crc(stored: StoredFile, number: int) -> int:
    digits = stored.crcs[number * _DIGITS : (number + 1) * _DIGITS]
    return int(digits, 16) if len(digits) == _DIGITS else -1
