"""Stopping when a scheduler asks: SIGTERM and SIGUSR1 set a flag, the work ends at a good place.

A scheduler, or Ctrl-C, signals the whole group. What to do about it is for the main process, so its
workers are deaf to that, from their start on.
"""

import contextlib
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
GROUP_SIGNALS = (signal.SIGINT, *STOP_SIGNALS)
PREEMPTED = 85  # exit code: stopped as asked, the same command goes on
INTERRUPTED = 130  # exit code: by Ctrl-C


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within it, stop signals only make the function it gives return True. Main thread only."""
    received = []
    with _handled(STOP_SIGNALS, lambda *event: received.append(1)):
        yield lambda: bool(received)


@contextlib.contextmanager
def stop_code() -> Iterator[Callable[[], int]]:
    """As `stop_requested`, for Ctrl-C too: the function gives the exit code to stop with, else 0.

    A second Ctrl-C interrupts at once. Main thread only.
    """
    received: list[int] = []

    def handle(name: int, frame) -> None:
        if name == signal.SIGINT and INTERRUPTED in received:
            raise KeyboardInterrupt
        received.append(INTERRUPTED if name == signal.SIGINT else PREEMPTED)

    with _handled(GROUP_SIGNALS, handle):
        yield lambda: received[0] if received else 0


@contextlib.contextmanager
def _handled(names: tuple[signal.Signals, ...], handler) -> Iterator[None]:
    before = {name: signal.signal(name, handler) for name in names}
    try:
        yield
    finally:
        for name, old in before.items():
            signal.signal(name, old)


def start_deaf(process: BaseProcess) -> None:
    """Start a worker that holds back what is sent to the group until it calls `be_deaf`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def be_deaf() -> None:
    """Ignore what is sent to the group: the first call of a worker."""
    for name in GROUP_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)
