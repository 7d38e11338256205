"""What a person sees of a training run: a live line in a terminal, plain lines elsewhere."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsemae.training import StepRecord

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
SMOOTHING = 0.9  # of the shown loss and speed


class TrainingProgress(AbstractContextManager):
    """Shows loss, samples per second, remaining time and the share of time waiting for data."""

    def __init__(self, steps: int, done: int, console: Console):
        self.steps, self.console = steps, console
        self.first, self.started, self.last_line = done, time.monotonic(), 0.0
        self.loss = self.speed = self.wait = None
        self.live = None
        if console.is_terminal:
            self.live = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("left"),
                TimeRemainingColumn(compact=True),
                console=console,
            )
            self.task = self.live.add_task("", total=steps, completed=done, numbers="")

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def update(self, record: StepRecord) -> None:
        self.loss = _smooth(self.loss, record.loss)
        self.speed = _smooth(self.speed, record.samples / record.seconds)
        self.wait = _smooth(self.wait, record.wait_seconds / record.seconds)
        numbers = f"loss {self.loss:.4f}  {self.speed:.2f} samples/s  data wait {self.wait:3.0%}"
        if self.live:
            self.live.update(self.task, completed=record.step, numbers=numbers)
            return
        now = time.monotonic()
        if record.step < self.steps and now - self.last_line < PLAIN_SECONDS:
            return
        self.last_line = now
        rate = (now - self.started) / (record.step - self.first)
        left = timedelta(seconds=round(rate * (self.steps - record.step)))
        line = f"step {record.step}/{self.steps}  {numbers}  left {left}"
        self.console.print(line, highlight=False, soft_wrap=True)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
