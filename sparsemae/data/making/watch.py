"""What a person sees of preprocessing: a live line in a terminal, plain lines elsewhere."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from sparsemae.data.making.case import Outcome
from sparsemae.data.preprocess import Progress as Counts

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
SHOWN = 20  # messages of rejected volumes; the records have all


class PreprocessProgress(AbstractContextManager):
    """Shows counts, volumes per minute and the time left; `update` is `preprocess`'s on_outcome."""

    def __init__(self, console: Console):
        self.console, self.shown = console, 0
        self.started = self.last_line = time.monotonic()
        self.live = None
        if console.is_terminal:
            self.live = Progress(
                TextColumn("volumes"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                console=console,
                transient=True,
            )
            self.task = self.live.add_task("", total=None, numbers="")

    def __enter__(self):
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception):
        if self.live:
            self.live.stop()

    def update(self, counts: Counts, outcome: Outcome | None) -> None:
        if outcome is None:
            self.started = time.monotonic()
            if counts.kept:
                self._say(f"{counts.kept} of {counts.total} volumes are done already")
        elif outcome.failure is not None:
            self._reject(outcome.failure.stage, outcome.failure.message)
        numbers = describe(counts, time.monotonic() - self.started)
        if self.live:
            self.live.update(self.task, completed=counts.done, total=counts.total, numbers=numbers)
        elif time.monotonic() - self.last_line >= PLAIN_SECONDS:
            self.last_line = time.monotonic()
            self._say(f"volumes {counts.done}/{counts.total}  {numbers}")

    def _reject(self, stage: str, message: str) -> None:
        self.shown += 1
        if self.shown <= SHOWN:
            self._say(f"{'filtered' if stage == 'filter' else 'rejected'}: {message}")
        elif self.shown == SHOWN + 1:
            self._say("rejected: more, see the record at the end")

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def describe(counts: Counts, seconds: float) -> str:
    """Counts, speed and remaining time, from what this run did in `seconds`."""
    parts = [f"{counts.ok} ok", f"{counts.warned} of them warned", f"{counts.rejected} rejected"]
    if counts.filtered:
        parts.append(f"{counts.filtered} filtered")
    if (done := counts.made) and seconds > 0:
        left = timedelta(seconds=round((counts.total - counts.done) * seconds / done))
        parts += [f"{60 * done / seconds:.1f}/min", f"left {left}"]
    return "  ".join(parts)
