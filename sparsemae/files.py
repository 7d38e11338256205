"""Writing files that survive a crash: forced to disk, and renamed only when whole."""

import os
from pathlib import Path


def write_synced(path: Path, data: bytes) -> None:
    """Write and force to disk; the name itself lasts once its folder is synced."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk: what was created, renamed, removed."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write under a temporary name, force to disk, rename: `path` is old or new, never half."""
    temporary = path.with_name(f"{path.name}.tmp")
    write_synced(temporary, data)
    os.replace(temporary, path)
    sync_folder(path.parent)
