"""Files: opened without surprises, written to survive a crash, locked."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from sparsemae.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
TEMPORARY = ".tmp"  # ending of files that a killed process may leave behind


def open_checked(path: Path, check: Callable[[os.stat_result], None]) -> int:
    """A descriptor to read from, without waiting for a pipe or stirring a device.

    `check` raises for what is not wanted, of what is there and again of what was opened, whatever
    was there a moment ago.

    Raises:
        OSError, ValueError: As of `os.open`: no such file, no rights, a name that none can have.
    """
    check(os.stat(path))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        check(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_synced(path: Path, data: bytes) -> None:
    """Write and force to disk; the name itself lasts once its folder is synced."""
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise named(error, path) from None


def named(error: OSError, path: Path) -> OSError:
    """The error with the file it happened to: that of a failed write has none."""
    return error if error.filename else OSError(error.errno, error.strerror, str(path))


def sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """The meta with the SHA-256 of all that it says, itself not counted."""
    body = {key: value for key, value in meta.items() if key != "sha256"}
    return body | {"sha256": hashlib.sha256(json.dumps(body).encode()).hexdigest()}


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk: what was created, renamed, removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, *, sync_name: bool = True) -> None:
    """Write under a temporary name, force to disk, rename: `path` is old or new, never half.

    Safe from several processes at once. The name lasts once its folder is synced, which may be left
    to the caller. OSError if it cannot be written; what was written until then is removed.
    """
    with _temporary(path, data) as temporary:
        os.replace(temporary, path)
    if sync_name:
        sync_folder(path.parent)


@contextlib.contextmanager
def opened_atomically(path: Path) -> Iterator[BinaryIO]:
    """As `write_atomically`, for what is too large to be held: a file to write to, renamed at the
    end if nothing was raised."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise named(error, path) from None
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_once(path: Path, data: bytes) -> None:
    """As `write_atomically`, but a file that is there already stays: of several the first wins."""
    with _temporary(path, data) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
    sync_folder(path.parent)


@contextlib.contextmanager
def _temporary(path: Path, data: bytes) -> Iterator[Path]:
    """`data` on disk under a name beside `path` that no other process uses; gone at the end."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        write_synced(temporary, data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, busy: str) -> Iterator[None]:
    """Hold a lock on `path`, created if missing; it dies with the process, whatever ends that.

    `UserError(busy)` if another process holds it. A file system without locks (some network ones)
    grants it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    _HELD.add(descriptor)
    try:
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except BlockingIOError:  # perhaps only a look by `is_locked`
                time.sleep(0.1)
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        yield
    finally:
        _HELD.discard(descriptor)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock; no file is created, and nobody is kept from taking it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in NO_LOCKS
    finally:
        os.close(descriptor)
    return False


_HELD: set[int] = set()


def _let_go() -> None:
    """A forked worker would keep a lock of its parent's alive beyond the parent's end."""
    for descriptor in _HELD:
        os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go)
