"""What a person sees of a training run."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from sparsemae.live import LiveLine
from sparsemae.training import StepRecord

SMOOTHING = 0.9  # of the shown loss and speed


class TrainingProgress(AbstractContextManager):
    """Shows loss, samples per second, remaining time and the share of time waiting for data."""

    def __init__(self, steps: int, done: int, console: Console):
        self.steps, self.first, self.started = steps, done, time.monotonic()
        self.loss = self.speed = self.wait = None
        left = (TextColumn("left"), TimeRemainingColumn(compact=True))
        self.line = LiveLine(console, "step", *left, total=steps, done=done)

    def __enter__(self):
        self.line.__enter__()
        return self

    def __exit__(self, *exception):
        self.line.__exit__(*exception)

    def update(self, record: StepRecord) -> None:
        self.loss = _smooth(self.loss, record.loss)
        self.speed = _smooth(self.speed, record.samples / record.seconds)
        self.wait = _smooth(self.wait, record.wait_seconds / record.seconds)
        numbers = f"loss {self.loss:.4f}  {self.speed:.2f} samples/s  data wait {self.wait:3.0%}"
        rate = (time.monotonic() - self.started) / (record.step - self.first)
        left = timedelta(seconds=round(rate * (self.steps - record.step)))
        plain = f"step {record.step}/{self.steps}  {numbers}  left {left}"
        done = record.step == self.steps
        self.line.update(record.step, self.steps, numbers, plain, last=done)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else SMOOTHING * old + (1 - SMOOTHING) * new
