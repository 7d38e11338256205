"""Worker processes of our own, for jobs that may kill them: one file must not end a night's run.

`multiprocessing.Pool` waits for ever for a killed worker and `ProcessPoolExecutor` drops its queue.
Here a job whose worker died or hung is tried once more, alone, and then given up; the rest goes on.
"""

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from sparsemae.signals import be_deaf, start_deaf

Job = TypeVar("Job")
Result = TypeVar("Result")

# Parallelism is by processes: a library's own threads would only compete with them.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
LOOK_SECONDS = 1.0  # between looks at what no worker says
STILLBORN = 3  # workers in a row that end while they start: no job is to blame
_PR_SET_PDEATHSIG = 1  # Linux: a signal to this process when the one that started it ends


@dataclass(frozen=True)
class Lost:
    """A job whose worker died or hung twice."""

    code: str  # "worker.killed" or "worker.timeout"
    reason: str
    seconds: float  # since it was begun, at the last try


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: BaseException | None = None


class _Worker(Generic[Job]):
    """One process, and the job it is at."""

    def __init__(self, function: bytes):
        context = multiprocessing.get_context("spawn")  # no threads or locks of ours are copied
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(theirs, function, os.getpid()), daemon=True
        )
        start_deaf(self.process)
        theirs.close()
        self.ready, self.job, self.alone, self.since = False, None, False, time.monotonic()

    def give(self, job: Job) -> None:
        self.job, self.since = job, time.monotonic()
        self.pipe.send(job)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def processes(workers: int, jobs: int) -> int:
    """How many to give to `run_jobs` where a single worker is this process."""
    return 0 if workers == 1 else min(workers, jobs)


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Iterable[Job],
    workers: int,
    *,
    timeout: float | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with `function(job)`, as they finish; `Lost` where the worker was lost twice.

    Args:
        function: Importable by name. An exception it raises ends everything and is raised here.
        workers: Processes; 0 runs the jobs in this one, in order, without any protection.
        timeout: Seconds a job may take before its worker counts as hung.
        stopped: Asked between jobs; once True no further job is begun, those begun are finished.
    """
    if workers == 0:
        for job in jobs:
            if stopped():
                return
            yield job, function(job)
        return
    pool = _Pool(function, jobs, workers, timeout, stopped)
    try:
        yield from pool.run()
    finally:
        pool.close()


class _Pool(Generic[Job, Result]):
    def __init__(self, function, jobs, workers, timeout, stopped):
        self.function, self.timeout, self.stopped = pickle.dumps(function), timeout, stopped
        self.jobs, self.again = iter(jobs), deque()
        self.limit, self.workers, self.stillborn = workers, [], 0
        self.next = next(self.jobs, None)

    def run(self) -> Iterator[tuple[Job, Result | Lost]]:
        while True:
            self._assign()
            busy = [w for w in self.workers if w.job is not None]
            if not busy:
                return
            for worker in self._events():
                if (outcome := self._attend(worker)) is not None:
                    yield outcome

    def close(self) -> None:
        for worker in self.workers:
            worker.stop()

    def _assign(self) -> None:
        """Give idle workers jobs; a job that lost its worker waits until nothing else runs."""
        if self.stopped():
            return
        while self.next is not None:
            worker = next((w for w in self.workers if w.job is None), None)
            if worker is None:
                if len(self.workers) == self.limit:
                    return
                self.workers.append(worker := _Worker(self.function))
            self._give(worker, self.next, alone=False)
            self.next = next(self.jobs, None)
        if self.again and all(w.job is None for w in self.workers):
            if not self.workers:
                self.workers.append(_Worker(self.function))
            self._give(self.workers[0], self.again.popleft(), alone=True)

    def _give(self, worker: _Worker, job: Job, alone: bool) -> None:
        worker.alone = alone
        with contextlib.suppress(OSError):  # died while idle: the event loop sees it
            worker.give(job)

    def _events(self) -> list[_Worker]:
        """Workers that answered, died or are overdue."""
        handles = {}
        for worker in self.workers:
            handles[worker.pipe] = handles[worker.process.sentinel] = worker
        # not for ever: a signal sets `stopped` without ending the wait, and workers become overdue
        ready = {handles[handle] for handle in wait(list(handles), LOOK_SECONDS)}
        return [w for w in self.workers if w in ready or self._is_overdue(w)]

    def _is_overdue(self, worker: _Worker) -> bool:
        waited = time.monotonic() - worker.since
        return self.timeout is not None and worker.job is not None and waited > self.timeout

    def _attend(self, worker: _Worker) -> tuple[Job, Result | Lost] | None:
        try:
            message = worker.pipe.recv() if worker.pipe.poll() else None
            gone = message is None and not worker.process.is_alive()
        except (EOFError, OSError):
            message, gone = None, True
        if message == "ready":
            worker.ready, worker.since, self.stillborn = True, time.monotonic(), 0
            return None
        if isinstance(message, _Answer):
            job, worker.job = worker.job, None
            if message.error is not None:
                raise message.error
            return job, message.value
        if not gone and not self._is_overdue(worker):
            return None
        return self._lose(worker, gone)

    def _lose(self, worker: _Worker, gone: bool) -> tuple[Job, Lost] | None:
        """Replace a worker; its job is tried again alone, or given up."""
        self.workers.remove(worker)
        worker.process.join(5 if gone else 0)
        code = worker.process.exitcode
        worker.stop()
        if not worker.ready and gone:
            self.stillborn += 1
            if self.stillborn == STILLBORN and not self.stopped():
                raise RuntimeError(
                    f"{STILLBORN} worker processes ended while they started, the last with "
                    f"{_ending(code)}; in a script, call from under `if __name__ == '__main__':`"
                )
        if worker.job is None:
            return None
        if not worker.alone or not worker.ready:
            self.again.append(worker.job)
            return None
        seconds = time.monotonic() - worker.since
        if gone:
            reason = f"its process ended with {_ending(code)}"
            return worker.job, Lost("worker.killed", reason, seconds)
        return worker.job, Lost("worker.timeout", f"no answer within {self.timeout:g} s", seconds)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(pipe: Connection, function: bytes, parent: int) -> None:
    """The life of a worker: answer jobs until the pipe closes."""
    be_deaf()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before that
            return
    for name in ONE_THREAD:  # before numpy is imported, with the function
        os.environ[name] = "1"
    call = pickle.loads(function)
    try:
        pipe.send("ready")
        while True:
            job = pipe.recv()
            try:
                answer = _Answer(call(job))
            except Exception as error:
                answer = _Answer(error=_portable(error))
            pipe.send(answer)
    except (EOFError, OSError):
        return


def _portable(error: Exception) -> Exception:
    """The exception, or its text where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
