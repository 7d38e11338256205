"""What a person sees of preprocessing."""

import time
from contextlib import AbstractContextManager
from datetime import timedelta

from rich.console import Console

from sparsemae.data.making.case import Outcome
from sparsemae.data.preprocess import Progress
from sparsemae.live import LiveLine

SHOWN = 20  # messages of rejected volumes; the records have all


class PreprocessProgress(AbstractContextManager):
    """Shows counts, volumes per minute and the time left; `update` is `preprocess`'s on_outcome."""

    def __init__(self, console: Console):
        self.line = LiveLine(console, "volumes", transient=True, at_once=False)
        self.shown, self.started = 0, time.monotonic()

    def __enter__(self):
        self.line.__enter__()
        return self

    def __exit__(self, *exception):
        self.line.__exit__(*exception)

    def update(self, counts: Progress, outcome: Outcome | None) -> None:
        if outcome is None:
            self.started = time.monotonic()
            if counts.kept:
                self.line.say(f"{counts.kept} of {counts.total} volumes are done already")
        elif outcome.failure is not None:
            self._reject(outcome.failure.stage, outcome.failure.message)
        numbers = describe(counts, time.monotonic() - self.started)
        plain = f"volumes {counts.done}/{counts.total}  {numbers}"
        self.line.update(counts.done, counts.total, numbers, plain)

    def _reject(self, stage: str, message: str) -> None:
        self.shown += 1
        if self.shown <= SHOWN:
            self.line.say(f"{'filtered' if stage == 'filter' else 'rejected'}: {message}")
        elif self.shown == SHOWN + 1:
            self.line.say("rejected: more, see the record at the end")


def describe(counts: Progress, seconds: float) -> str:
    """Counts, speed and remaining time, from what this run did in `seconds`."""
    parts = [f"{counts.ok} ok", f"{counts.warned} of them warned", f"{counts.rejected} rejected"]
    if counts.filtered:
        parts.append(f"{counts.filtered} filtered")
    if (done := counts.made) and seconds > 0:
        left = timedelta(seconds=round((counts.total - counts.done) * seconds / done))
        parts += [f"{60 * done / seconds:.1f}/min", f"left {left}"]
    return "  ".join(parts)
