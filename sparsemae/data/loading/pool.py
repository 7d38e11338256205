"""Processes that make the batches of a run ahead of time, and whose end or silence is an error.

Each has a pipe of its own, so one that is killed holds no lock that the others need. torch's
DataLoader is not used: it raises from a signal handler in whatever the main process is doing, be it
saving, and cannot tell what the worker was doing.
"""

import atexit
import multiprocessing
import os
import signal
import sys
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from sparsemae.data.loading import wire
from sparsemae.errors import LoaderError, UserError
from sparsemae.signals import be_deaf, start_deaf

Report = Callable[[int], None]
Work = Callable[[int, Report], Any]

AHEAD = 2  # batches each worker makes before they are asked for
PATIENCE = 5.0  # seconds for a killed process to be gone
_IDLE = -1
_HINTS = {signal.SIGKILL: "; if memory ran out, use fewer data.workers"}


class Pool:
    """Iterates over `work(item, report)` for the items of a range, in order.

    Iterating raises a UserError from `work` as it is, and a LoaderError if a worker died or hung,
    or `work` raised anything else. All workers have ended then, and so they have when the iterator
    is dropped or the main process ends, however it ends.

    Args:
        work: Runs in the workers; calls `report` with the number of the sample it turns to.
        name_of: What to call that sample in an error: "case 12".
        timeout: Seconds after which a sample that is still not done is given up.
    """

    def __init__(
        self,
        work: Work,
        items: range,
        workers: int,
        *,
        name_of: Callable[[int], str],
        timeout: float,
    ):
        # Forked, so the index of a large store is shared; other systems cannot fork safely.
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        self._items, self._position = items, 0
        self._name_of, self._timeout = name_of, timeout
        self._current = context.RawArray("q", [_IDLE] * workers)  # the sample each is at
        self._pipes: list[Connection] = []
        self._processes: list[multiprocessing.process.BaseProcess] = []
        _OPEN.add(self)
        for worker in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(work, theirs, self._current, worker, os.getpid()), daemon=True
            )
            start_deaf(process)
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for position in range(min(AHEAD * workers, len(items))):
            self._ask(position)

    def __iter__(self) -> "Pool":
        return self

    def __next__(self) -> Any:
        if self._position == len(self._items):
            self.close()
            raise StopIteration
        try:
            result = self._receive(self._position % len(self._pipes))
            following = self._position + AHEAD * len(self._pipes)
            if following < len(self._items) and not isinstance(result, Exception):
                self._ask(following)
        except BaseException:
            self.close()
            raise
        self._position += 1
        if isinstance(result, Exception):
            self.close()
            raise result
        return result

    def cancel(self) -> None:
        """Kill the workers, from any thread; one that waits in `next` gets a LoaderError."""
        for process in list(self._processes):
            process.kill()

    def close(self) -> None:
        """End all workers. They hold nothing that needs saving."""
        _OPEN.discard(self)
        self.cancel()
        for process in self._processes:
            process.join(PATIENCE)
            if process.exitcode is None:
                # Stuck in the kernel, as by a file server that is gone; there is no public way to
                # keep Python from waiting for it when it exits.
                multiprocessing.process._children.discard(process)
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._processes, self._position = [], [], len(self._items)

    def __del__(self) -> None:
        self.close()

    def _ask(self, position: int) -> None:
        try:
            self._pipes[position % len(self._pipes)].send(self._items[position])
        except OSError:  # the worker has just died
            self._raise_dead()
            raise

    def _receive(self, worker: int) -> Any:
        """The next answer of a worker, unless any of them has died."""
        pipe, ends = self._pipes[worker], [process.sentinel for process in self._processes]
        before = self._current[worker]
        while not (ready := wait([pipe, *ends], self._timeout)):
            now = self._current[worker]
            if now == before:
                raise LoaderError(
                    f"{self._at(worker)}: loader worker {worker} gave no answer for "
                    f"{self._timeout:g} s; check the disk or raise data.timeout"
                )
            before = now
        if any(end in ready for end in ends):
            self._raise_dead()
        try:
            return wire.receive(pipe)
        except (EOFError, OSError):  # the worker has just died
            self._raise_dead()
            raise

    def _raise_dead(self) -> None:
        """Raise for a worker that has ended, or is about to; return if there is none."""
        ended = wait([process.sentinel for process in self._processes], PATIENCE)
        for worker, process in enumerate(self._processes):
            if process.sentinel in ended:
                process.join()
                code, how = process.exitcode, f"ended with exit code {process.exitcode}"
                if code < 0:
                    how = f"was killed by {signal.Signals(-code).name}{_HINTS.get(-code, '')}"
                raise LoaderError(f"{self._at(worker)}: loader worker {worker} {how}")

    def _at(self, worker: int) -> str:
        sample = self._current[worker]
        return "between two cases" if sample == _IDLE else self._name_of(sample)


_OPEN: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register  # after multiprocessing's, so before it: that waits for workers for ever, which
def _close_all() -> None:  # ignore the SIGTERM it sends them
    for pool in list(_OPEN):
        pool.close()


def _serve(work: Work, pipe: Connection, current: Any, worker: int, parent: int) -> None:
    """Answer items until the main process has gone."""
    be_deaf()

    def report(sample: int) -> None:
        current[worker] = sample

    while True:
        # Its pipe does not close with the main process: workers forked later hold the end too.
        while not pipe.poll(1.0):
            if os.getppid() != parent:
                return
        item = pipe.recv()
        try:
            result = work(item, report)
        except Exception as error:
            result = _portable(error)
        wire.send(pipe, result, parent)
        report(_IDLE)


def _portable(error: Exception) -> Exception:
    """What went wrong, as something every process can unpickle."""
    if isinstance(error, UserError):
        return error
    told = LoaderError(str(error) if isinstance(error, LoaderError) else repr(error))
    told.add_note(traceback.format_exc())
    return told
