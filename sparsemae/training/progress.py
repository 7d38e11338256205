"""What a person sees of a run: a live table in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console, Group
from rich.progress import TaskProgressColumn
from rich.table import Table
from rich.text import Text

from sparsemae.kinds import VALIDATION_LOSS, Measure
from sparsemae.live import LiveLine
from sparsemae.signals import INTERRUPTED
from sparsemae.training.loop import StepRecord

SMOOTHING = 0.9  # of the shown loss and speed


class TrainingProgress(AbstractContextManager):
    """Shows loss, learning rate, gradient, speed, memory, checkpoint and remaining time.

    Once `stop` gives an exit code, a terminal is told what is waited for.
    """

    def __init__(
        self,
        steps: int,
        done: int,
        console: Console,
        measure: Measure = VALIDATION_LOSS,
        *,
        stop: Callable[[], int] = lambda: 0,
    ):
        self.steps, self.first, self.console, self.measure = steps, done, console, measure
        self.stop = stop
        self.started = time.monotonic()
        self.loss = self.speed = self.wait = self.record = None
        self.checkpoint = self.val_loss = None
        self.skipped = self.spikes = 0
        percent = TaskProgressColumn()
        self.line = LiveLine(console, "step", percent, total=steps, done=done, below=self._below)
        self.live = console.is_terminal

    def __enter__(self):
        self.line.__enter__()
        return self

    def __exit__(self, *exception):
        self.line.__exit__(*exception)

    def update(self, record: StepRecord) -> None:
        """Take in a step; without a terminal print a line if it is time, or it is the last."""
        self.record = record
        if record.skipped:
            self.skipped += 1
        else:
            self.loss = _smooth(self.loss, record.loss)
        self.spikes += record.spike
        self.speed = _smooth(self.speed, record.samples / record.seconds)
        self.wait = _smooth(self.wait, min(1.0, record.wait_seconds / record.seconds))
        words = "" if self.live else "  ".join(f"{k} {v}" for k, v in self._numbers().items())
        plain = f"step {record.step}/{self.steps}  {words}"
        self.line.update(record.step, self.steps, "", plain, last=record.step == self.steps)

    def validated(self, step: int, loss: float) -> None:
        self.val_loss = loss
        if not self.live:
            number = f"{self.measure.name} {self.measure.shown(loss):.4f}"
            self.line.say(f"step {step}/{self.steps}  {number}")

    def saved(self, step: int) -> None:
        self.checkpoint = step

    def _numbers(self) -> dict[str, str]:
        """What there is to see, named; a line leaves out what a table has room for."""
        if self.record is None:
            return {}
        loss = "not finite" if self.loss is None else f"{self.loss:.4f}"
        numbers = {"loss": loss}
        if self.live:
            numbers |= {"last loss": f"{self.record.loss:.4f}"}
            if self.val_loss is not None:
                numbers |= {self.measure.short: f"{self.measure.shown(self.val_loss):.4f}"}
        numbers |= {"lr": f"{self.record.lr:.2e}", "grad": f"{self.record.grad_norm:.3g}"}
        numbers |= {"samples/s": f"{self.speed:.2f}", "data wait": f"{self.wait:.0%}"}
        if self.record.memory is not None:
            numbers |= {"GPU memory": f"{self.record.memory / 2**30:.1f} GiB"}
        if self.skipped:
            numbers |= {"skipped": str(self.skipped)}
        if self.spikes and self.live:
            numbers |= {"spikes": str(self.spikes)}
        if self.live:
            saved = "none yet" if self.checkpoint is None else f"step {self.checkpoint}"
            numbers |= {"checkpoint": saved}
        return numbers | {"left": str(self._left())}

    def _left(self) -> timedelta:
        rate = (time.monotonic() - self.started) / max(1, self.record.step - self.first)
        return timedelta(seconds=round(rate * (self.steps - self.record.step)))

    def _below(self) -> Group:
        lines = []
        if code := self.stop():
            again = "; Ctrl-C again stops at once, without one" if code == INTERRUPTED else ""
            lines.append(Text(f"stopping after this step and a checkpoint{again}", "yellow"))
        return Group(self._table(), *lines)

    def _table(self) -> Table:
        """Names above values, as many side by side as the terminal has room for."""
        numbers = list(self._numbers().items())
        columns = max(1, min(len(numbers), self.console.width // 14))
        table = Table.grid(padding=(0, 3))
        for start in range(0, len(numbers), columns):
            row = numbers[start : start + columns]
            table.add_row(*(f"[dim]{name}[/]" for name, _ in row))
            table.add_row(*(value for _, value in row))
        return table


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
