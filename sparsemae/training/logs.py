"""What a run writes line by line.

`metrics.jsonl` is what the steps computed: of a run that was interrupted and resumed it holds the
same bytes as of one that was not. `timing.jsonl` is how long they took. Both are cut back to the
checkpoint that a run is resumed from. `history.jsonl` is what happened to the run: never cut.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sparsemae.errors import UserError
from sparsemae.files import named, write_atomically
from sparsemae.reporting.readback import parsed
from sparsemae.runfiles import HISTORY, METRICS, TENSORBOARD, TIMING
from sparsemae.training.loop import StepRecord


class RunLog(AbstractContextManager):
    """The logs of a run that is at `step`, cut back to it.

    Args:
        cases_of: Names the samples of a step, counted from 0; written beside what went wrong.
        tensorboard: Also write there.
    """

    def __init__(
        self, run: Path, step: int, cases_of: Callable[[int], Sequence[str]], *, tensorboard: bool
    ):
        self._cases_of = cases_of
        self._files = [_opened_at(run / name, step) for name in (METRICS, TIMING)]
        self._metrics, self._timing = self._files
        self._board = _board(run / TENSORBOARD, step) if tensorboard else None

    def __exit__(self, *exception):
        for file in self._files:
            try:
                file.close()
            except OSError as error:
                if exception[0] is None:  # else it is what a line could not be written for
                    raise named(error, Path(file.name)) from None
        if self._board:
            self._board.close()

    def step(self, record: StepRecord) -> None:
        """A line of each kind."""
        numbers = {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm}
        line = {k: v if math.isfinite(v) else None for k, v in numbers.items()}
        odd = {k: True for k in ("skipped", "spike") if getattr(record, k)}
        if odd:
            odd["cases"] = list(self._cases_of(record.step - 1))
        _write(self._metrics, {"step": record.step, **line, **odd})
        times = {"seconds": record.seconds, "wait_seconds": record.wait_seconds}
        times |= {"samples": record.samples, "memory_bytes": record.memory}
        self.took(record.step, times)
        self._show(record.step, line | {"samples_per_second": record.samples / record.seconds})

    def validation(self, step: int, loss: float) -> None:
        _write(self._metrics, {"step": step, "val_loss": loss if math.isfinite(loss) else None})
        self._show(step, {"val_loss": loss})

    def took(self, step: int, times: dict[str, Any]) -> None:
        """How long something took at a step; seconds in keys that say so."""
        _write(self._timing, {"step": step, **times, "time": round(time.time(), 3)})

    def sync(self) -> None:
        """Force the lines to disk: a checkpoint must not know of steps that the log has lost."""
        for file in self._files:
            os.fsync(file.fileno())

    def _show(self, step: int, values: dict[str, float | None]) -> None:
        if self._board:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)


def note(run: Path, step: int, event: str, message: str = "") -> None:
    """Append to the run's history."""
    line = {"time": round(time.time(), 3), "step": step, "event": event, "message": message}
    with (run / HISTORY).open("a") as file:
        _write(file, line)


def require_tensorboard() -> None:
    """Raise a UserError unless TensorBoard's writer is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UserError(
            "train.tensorboard: it is not installed; pip install 'sparsemae[tensorboard]'"
        ) from None


def has_steps(run: Path) -> bool:
    """Whether the run's log has a step in it."""
    return any(True for _ in _lines(run / METRICS))


def _board(folder: Path, step: int):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _opened_at(path: Path, step: int):
    """The log, without the lines of later steps and without one that is cut off."""
    kept = b"".join(line for line, values in _lines(path) if values["step"] <= step)
    write_atomically(path, kept)
    return path.open("a", buffering=1)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The lines that are whole, as they are and as values."""
    if path.exists():
        for line in path.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n") and (values := parsed(line)) is not None:
                yield line, values


def _write(file, line: dict[str, Any]) -> None:
    try:
        file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise named(error, Path(file.name)) from None
