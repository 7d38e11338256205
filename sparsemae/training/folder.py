"""The run folder: one process at a time, and what a person or a script finds in it.

`config.toml` (resolved), `status.json`, the logs, `checkpoints/`, `preview.*`, `report.html`.
"""

import contextlib
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import sparsemae
from sparsemae import checkpoint
from sparsemae.errors import UserError
from sparsemae.files import TEMPORARY, locked, write_atomically
from sparsemae.reporting.readback import status_of
from sparsemae.runfiles import CHECKPOINTS, CONFIG, LOCK, PLAN, STATUS, STORE, TASK
from sparsemae.status import require_run
from sparsemae.training import logs


@contextlib.contextmanager
def claimed(run: Path, *, resume: bool) -> Iterator[None]:
    """Hold the folder for this process, clean of what a killed one left half-written.

    Raises:
        UserError: It holds something else, a run that is not to be resumed, or is in use.
        OSError: It cannot be made or written.
    """
    check_free(run, resume=resume)
    run.mkdir(parents=True, exist_ok=True)
    with locked(run / LOCK, busy=f"{run}: another process is training in it; wait, or stop it"):
        check_free(run, resume=resume)
        checkpoint.clean(run / CHECKPOINTS)
        for path in run.glob(f"*{TEMPORARY}"):
            path.unlink(missing_ok=True)
        yield


def check_free(run: Path, *, resume: bool) -> None:
    """Refuse a folder that holds anything but a run to be resumed."""
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file: choose another -o")
    names = {path.name for path in run.iterdir()} if run.exists() else set()
    if not names - {LOCK} or (resume and CONFIG in names):
        return
    if CONFIG in names:
        raise UserError(
            f"{run} holds a run already: choose another -o, or --resume to continue that run"
        )
    # what a process leaves that was killed before it wrote the configuration
    early = {LOCK, PLAN, STORE, TASK}
    if any(not name.endswith(TEMPORARY) for name in names - early):
        raise UserError(f"{run} exists already and holds no run: choose another -o")


def config_file(run: Path) -> Path:
    """The configuration of a run; UserError where there is none."""
    require_run(run)
    return run / CONFIG


def starts_anew(run: Path) -> bool:
    """Whether a run has no checkpoint because it never came to its first.

    Raises:
        UserError: It did: what it had done is lost, and nobody but a person decides to redo it.
    """
    if checkpoint.has_checkpoints(run / CHECKPOINTS):
        return False
    if logs.has_steps(run):
        raise UserError(
            f"{run / CHECKPOINTS}: its checkpoints are gone, but metrics.jsonl has steps: put back "
            f"a copy, or start a new run in another folder"
        )
    return True


class Status:
    """`status.json`, written whole at every change."""

    def __init__(self, run: Path, facts: dict[str, Any]):
        self._file = run / STATUS
        self._values = {
            "state": "running",
            "step": 0,
            "checkpoint": None,
            "best": None,
            "message": "",
            "exit_code": None,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": status_of(run).get("started", time.time()),  # of a process before this one
            "versions": versions(),
            **facts,
        }

    def update(self, **changes: Any) -> None:
        self._values |= changes | {"updated": time.time()}
        write_atomically(self._file, json.dumps(self._values, indent=1).encode())


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    return {
        "sparsemae": sparsemae.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
