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
from typing import TYPE_CHECKING, TypeVar

from sparsemae.data.making.workers import Lost
from sparsemae.errors import UserError

if TYPE_CHECKING:
    from distributed import Client

Job = TypeVar("Job")
Result = TypeVar("Result")

CONNECT_SECONDS = 20
AHEAD = 2  # jobs handed over per thread: it never waits, and few are left when we are stopped


@contextlib.contextmanager
def connected(address: str) -> Iterator["Client"]:
    """A client of the scheduler at `address`; `UserError` if none answers, or it has no worker."""
    try:
        from distributed import Client
    except ImportError:
        raise UserError("--dask needs Dask: pip install 'sparsemae[cluster]'") from None
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
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
    from distributed import CancelledError, KilledWorker, as_completed

    _check_workers(client, folder)
    finished = as_completed(loop=client.loop)
    running: dict[str, tuple[Job, float]] = {}
    suspects: list[Job] = []

    def submit(queue: Iterator[Job], count: int) -> None:
        for job in islice(queue, 0 if stopped() else count):
            future = client.submit(function, job, pure=False)
            running[future.key] = job, time.monotonic()
            finished.add(future)

    def answers(queue: Iterator[Job]) -> Iterator[tuple[Job, float, Result | Exception]]:
        for future in finished:
            try:
                answer = future.exception() or future.result()
            except (CancelledError, OSError) as error:  # a job's own is returned, not raised
                answer = error
                lost = True
            else:
                lost = isinstance(answer, CancelledError)
            if lost:
                raise ConnectionError(
                    f"--dask: the scheduler has gone ({type(answer).__name__}); what is done is "
                    f"kept, the same command goes on"
                ) from None
            future.release()
            yield *running.pop(future.key), answer
            submit(queue, 1)

    queue = iter(jobs)
    submit(queue, AHEAD * sum(client.nthreads().values()))
    for job, _, answer in answers(queue):
        if isinstance(answer, KilledWorker):
            suspects.append(job)  # or what ran beside it is to blame
        elif isinstance(answer, Exception):
            raise answer
        else:
            yield job, answer
    queue = iter(suspects)
    submit(queue, 1)
    for job, since, answer in answers(queue):
        if isinstance(answer, KilledWorker):
            reason = f"{answer.allowed_failures + 1} Dask workers died at it alone"
            answer = Lost("worker.killed", reason, time.monotonic() - since)
        elif isinstance(answer, Exception):
            raise answer
        yield job, answer


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
