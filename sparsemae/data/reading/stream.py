"""The bytes of a volume file, read once from front to back and verified to the end.

Compressed streams (gzip, also of several members, and zlib) are inflated piece by piece into memory
the caller has budgeted; checksums and lengths are verified, and nothing that a file can hold makes
reading it cost more than the voxels its header promises.
"""

import io
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from sparsemae.data.codes import Findings, VolumeError

CHUNK = 1 << 20  # bytes inflated at a time
EXCESS = 1 << 20  # bytes tolerated after the voxels inside a compressed stream
GZIP = b"\x1f\x8b"
RATIO = 1032  # deflate expands by at most this
_INPUT = 1 << 16
T = TypeVar("T")


class Stream:
    """What an open file holds from here on, inflated if `compressed`.

    By default the first bytes tell whether it is, as gzip.
    """

    def __init__(
        self, file: io.FileIO, findings: Findings, size: int, compressed: bool | None = None
    ):
        self.file, self.findings = file, findings
        self.size = size  # of the whole file, bytes
        self.begin = guarded(findings, file.tell)
        if compressed is None:
            compressed = guarded(findings, file.read, 2) == GZIP
            guarded(findings, file.seek, self.begin)
        self.compressed = compressed
        self.position = 0  # bytes handed out
        self._inflate = _Inflate(file, findings) if compressed else None
        self._ahead = b""

    def peek(self, count: int) -> bytes:
        """The next bytes, fewer at the end; they are still to be read."""
        while len(self._ahead) < count and (more := self._some(count - len(self._ahead))):
            self._ahead += more
        return self._ahead[:count]

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes, few enough to hold; `VolumeError` if there are fewer."""
        data = bytearray(count)
        self.fill(memoryview(data))
        return bytes(data)

    def fill(self, view: memoryview) -> None:
        """Fill `view`, a memory of bytes; `VolumeError` if the file holds fewer."""
        done = min(len(self._ahead), len(view))
        view[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        while done < len(view):
            got = self._into(view[done:])
            if not got:
                raise self.findings.refuse(
                    "container.short",
                    f"it ends after {self.position + done} bytes, the header needs more; "
                    "copy it again",
                )
            done += got
        self.position += done

    def skip(self, count: int) -> None:
        """Pass over `count` bytes."""
        if self._inflate is None:
            jump = max(0, count - len(self._ahead))
            self._ahead = self._ahead[count:]
            guarded(self.findings, self.file.seek, jump, io.SEEK_CUR)
            self.position += count
            return
        scratch = memoryview(bytearray(min(count, CHUNK)))
        while count:
            part = min(count, CHUNK)
            self.fill(scratch[:part])
            count -= part

    def finish(self) -> None:
        """Verify what follows to the end of the stream; warn if that is more than its checksum."""
        if self._inflate is None:
            rest = self.size - self.begin - self.position
        else:
            rest = len(self._ahead)
            while more := self._inflate.some(CHUNK):
                rest += len(more)
                if rest > EXCESS:
                    raise self.findings.refuse(
                        "container.excess",
                        "the stream goes on for over 1 MiB after the voxels; export it again",
                    )
            rest += self._inflate.outside(self.size)
        if rest > 0:
            self.findings.warn("container.trailing", f"{rest} bytes after the voxels are ignored")

    def _some(self, count: int) -> bytes:
        if self._inflate is not None:
            return self._inflate.some(count)
        return guarded(self.findings, self.file.read, count)

    def _into(self, view: memoryview) -> int:
        if self._inflate is None:
            return guarded(self.findings, self.file.readinto, view)
        data = self._inflate.some(min(len(view), CHUNK))
        view[: len(data)] = data
        return len(data)


class _Inflate:
    """Inflates members one after another until the file, or what is compressed of it, ends."""

    def __init__(self, file: io.FileIO, findings: Findings):
        self.file, self.findings = file, findings
        self.member = zlib.decompressobj(47)  # gzip or zlib, both verified by their checksum
        self.members, self.consumed, self.produced = 1, 0, 0
        self.input = b""
        self.done = False

    def some(self, count: int) -> bytes:
        """Up to `count` bytes; none only at the verified end."""
        while not self.done:
            if self.member.eof and not self._next_member():
                break
            if not self.input:
                self._feed()
            ended = not self.input
            try:
                data = self.member.decompress(self.input, count)
            except zlib.error as error:
                raise self.findings.refuse(
                    "container.damaged", f"damaged compressed stream ({error}); copy it again"
                ) from None
            self.input = self.member.unused_data if self.member.eof else self.member.unconsumed_tail
            self.produced += len(data)
            if data:
                return data
            if ended and not self.member.eof:
                raise self.findings.refuse(
                    "container.truncated", "the compressed stream ends too early; copy it again"
                )
            self._refuse_hollow()
        return b""

    def outside(self, size: int) -> int:
        """Bytes of the file after the last member, of which none was looked at but the first."""
        return size - guarded(self.findings, self.file.tell) + len(self.input)

    def _next_member(self) -> bool:
        if len(self.input) < 2:
            self._feed()
        self.done = self.input[:2] != GZIP
        if not self.done:
            self.member = zlib.decompressobj(31)
            self.members += 1
            self._refuse_hollow()
        return not self.done

    def _feed(self) -> None:
        more = guarded(self.findings, self.file.read, _INPUT)
        self.input += more
        self.consumed += len(more)

    def _refuse_hollow(self) -> None:
        """Parts that hold nothing cost time without end: real files have next to none."""
        hollow = self.consumed > 2 * self.produced + EXCESS
        if hollow or self.members > 64 + self.produced // 1024:
            raise self.findings.refuse(
                "container.excess", "the compressed stream is made of empty parts; export it again"
            )


def guarded(findings: Findings, call: Callable[..., T], *arguments: Any) -> T:
    """`call(*arguments)`, with what the system refuses raised as `VolumeError`."""
    try:
        return call(*arguments)
    except OSError as error:
        raise unreadable(findings, error) from None


def unreadable(findings: Findings, error: OSError) -> VolumeError:
    """What the system says about a file that is there."""
    reason = error.strerror or str(error)
    return findings.refuse("container.unreadable", f"{reason}; check the disk or the network")
