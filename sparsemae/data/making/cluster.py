"""The same jobs on an existing Dask cluster: its workers read the sources and write the store.

Both folders must be visible to them under the same paths. Dask runs a task again when its worker
dies, and blames it after several deaths (its setting `allowed-failures`), also those that ran
beside it: a blamed job is tried once more, alone.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparsemae.data.making.workers import Lost
from sparsemae.errors import UserError

if TYPE_CHECKING:
    from distributed import Client, Future

Job = TypeVar("Job")
Result = TypeVar("Result")

CONNECT_SECONDS = 20
POLL_SECONDS = 5  # between looks whether there still is a worker
DESERTED_SECONDS = 300  # without one: a cluster may replace its workers in that time
AHEAD = 2  # jobs handed over per thread: it never waits, and few are left when we are stopped


@contextlib.contextmanager
def connected(address: str) -> Iterator["Client"]:
    """A client of the scheduler at `address`; `UserError` if none answers, or it has no worker."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--dask needs Dask: pip install 'sparsemae[cluster]'") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--dask {address}: no scheduler answers there ({error}); give the address that "
            f"`dask scheduler` prints, such as tcp://HOST:8786"
        ) from None
    with client:
        try:
            client.wait_for_workers(1, timeout=CONNECT_SECONDS)
        except TimeoutError:
            raise UserError(f"--dask {address}: no worker there; start `dask worker`") from None
        yield client


def run_on_dask(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    client: "Client",
    folder: Path,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with `function(job)`, as they finish; see `run_jobs`.

    `UserError` if a worker is without this package, or does not see `folder`.
    """
    from distributed import KilledWorker

    _check_workers(client, folder)
    tasks, suspects = _Tasks(client, function, stopped), []
    for job, _, answer in tasks.answers(iter(jobs), AHEAD * sum(client.nthreads().values())):
        if isinstance(answer, KilledWorker):
            suspects.append(job)  # or what ran beside it is to blame
        elif isinstance(answer, Exception):
            raise answer
        else:
            yield job, answer
    for job, seconds, answer in tasks.answers(iter(suspects), 1):
        if isinstance(answer, KilledWorker):
            reason = f"{answer.allowed_failures + 1} Dask workers died at it alone"
            answer = Lost("worker.killed", reason, seconds)
        elif isinstance(answer, Exception):
            raise answer
        yield job, answer


class _Tasks:
    """Jobs under way on the cluster. ConnectionError when that is gone, or has had no worker for
    long: a task would wait for one for ever."""

    def __init__(self, client: "Client", function: Callable, stopped: Callable[[], bool]):
        self.client, self.function, self.stopped = client, function, stopped
        self.running: dict[Future, tuple[Any, float]] = {}
        self.deserted = None  # since when there has been no worker

    def answers(self, queue: Iterator[Job], ahead: int) -> Iterator[tuple[Job, float, Any]]:
        """Each job, its seconds, and its result or exception; `ahead` of them at a time."""
        self._submit(queue, ahead)
        while self.running:
            for future in self._finished():
                with _reachable():
                    try:
                        answer = future.exception(POLL_SECONDS) or future.result(POLL_SECONDS)
                    except TimeoutError:
                        continue  # lost with its worker just now, and done again
                job, since = self.running.pop(future)
                future.release()
                yield job, time.monotonic() - since, answer
                self._submit(queue, 1)

    def _submit(self, queue: Iterator[Job], count: int) -> None:
        for job in islice(queue, 0 if self.stopped() else count):
            future = self.client.submit(self.function, job, pure=False)
            self.running[future] = job, time.monotonic()

    def _finished(self) -> list["Future"]:
        """Some; none when it is time to look again."""
        from distributed import wait

        with _reachable():
            try:
                return list(wait(list(self.running), POLL_SECONDS, "FIRST_COMPLETED").done)
            except TimeoutError:
                workers = self.client.nthreads()
        now = time.monotonic()
        self.deserted = None if workers else self.deserted or now
        if self.deserted and now - self.deserted > DESERTED_SECONDS:
            raise _gone("no worker is left")
        return []


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Around calls of the scheduler. What a job raised is returned by them, not raised."""
    from distributed import CancelledError

    try:
        yield
    except (CancelledError, OSError):
        raise _gone("the scheduler has gone") from None


def _gone(what: str) -> ConnectionError:
    return ConnectionError(f"--dask: {what}; what is done is kept, the same command goes on")


def _check_workers(client: "Client", folder: Path) -> None:
    """Every worker has this package in this version and sees the store."""
    here, _ = _look(folder)
    for worker, answer in client.run(_look, folder, on_error="return").items():
        if isinstance(answer, Exception):
            trouble = f"cannot work ({answer})"
        elif answer[0] != here:
            trouble = f"has sparsemae {answer[0]}, here is {here}"
        elif not answer[1]:
            trouble = f"does not see {folder}"
        else:
            continue
        raise UserError(
            f"--dask: worker {worker} {trouble}; "
            f"start it in the same environment, with the same folders mounted"
        )


def _look(folder: Path) -> tuple[str, bool]:
    import sparsemae

    return sparsemae.__version__, folder.is_dir()
