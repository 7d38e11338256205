"""Stopping when a scheduler asks: SIGTERM and SIGUSR1 set a flag, the work ends at a good place."""

import contextlib
import signal
from collections.abc import Callable, Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 85  # exit code: stopped as asked, the same command goes on


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within it, stop signals only make the function it gives return True. Main thread only."""
    received = []
    before = {name: signal.signal(name, lambda *event: received.append(1)) for name in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
