"""A live line in a terminal, and a plain one now and then elsewhere."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn

PLAIN_SECONDS = 10.0  # between lines where there is no terminal
REFRESHES = 4  # of what is below the bar, per second


class LiveLine(AbstractContextManager):
    """A bar with numbers beside it, for a count of `what`; `columns` follow the numbers.

    The bar goes at the end if `transient`. The first plain line comes `at_once`, or after a while.
    What `below` returns is shown under the bar.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        *columns: ProgressColumn,
        total: int | None = None,
        done: int = 0,
        transient: bool = False,
        at_once: bool = True,
        below: Callable[[], RenderableType] | None = None,
    ):
        self.console, self.bar = console, None
        self.shown: Progress | Live | None = None
        self.last = time.monotonic() - PLAIN_SECONDS * at_once  # when a plain line was printed
        if console.is_terminal:
            self.bar = Progress(
                TextColumn(what),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[numbers]}"),
                *columns,
                console=console,
                transient=transient,
            )
            self.task = self.bar.add_task("", total=total, completed=done, numbers="")
            self.shown = self.bar
            if below is not None:
                self.shown = Live(
                    console=console,
                    refresh_per_second=REFRESHES,
                    transient=transient,
                    get_renderable=lambda: Group(self.bar, below()),
                )

    def __enter__(self):
        if self.shown:
            self.shown.start()
        return self

    def __exit__(self, *exception):
        if self.shown:
            self.shown.stop()

    def update(
        self, done: int, total: int, numbers: str, plain: str, *, last: bool = False
    ) -> None:
        """Show `numbers` in the bar; without a terminal print `plain` if it is time, or `last`."""
        if self.bar:
            self.bar.update(self.task, completed=done, total=total, numbers=numbers)
        elif last or time.monotonic() - self.last >= PLAIN_SECONDS:
            self.last = time.monotonic()
            self.say(plain)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        say(self.console, text)


def say(console: Console, text: str) -> None:
    """Print a line as it is, however long."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)
