"""The same jobs on an existing Dask cluster: its workers read the sources and write the store.

Both folders must be visible to them under the same paths. Dask runs a task again when its worker
dies, and blames it after several deaths (its setting `allowed-failures`), also those that ran
beside it: a blamed job is tried once more, alone.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from sparsemae.data.workers import Lost
from sparsemae.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")

CONNECT_SECONDS = 20
AHEAD = 8  # jobs handed over per thread of the cluster: it never waits, and its memory stays flat


def run_on_dask(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    address: str,
    folder: Path,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Job, Result | Lost]]:
    """Each job with `function(job)`, as they finish; see `run_jobs`.

    `UserError` if there is no scheduler at `address`, no worker, one without this package, or one
    that does not see `folder`.
    """
    try:
        from distributed import Client, KilledWorker, as_completed
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
        _check_workers(client, address, folder)
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
                answer = future.exception() or future.result()
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


def _check_workers(client, address: str, folder: Path) -> None:
    """Every worker has this package in this version and sees the store."""
    client.wait_for_workers(1, timeout=CONNECT_SECONDS)
    for worker, answer in client.run(_look, folder, on_error="return").items():
        remedy = "start it in the same environment, with the same folders mounted"
        if isinstance(answer, Exception):
            raise UserError(f"--dask {address}: worker {worker} cannot work ({answer}); {remedy}")
        version, sees = answer
        if version != _look(folder)[0]:
            raise UserError(
                f"--dask {address}: worker {worker} has sparsemae {version}, here is "
                f"{_look(folder)[0]}; {remedy}"
            )
        if not sees:
            raise UserError(f"--dask {address}: worker {worker} does not see {folder}; {remedy}")


def _look(folder: Path) -> tuple[str, bool]:
    import sparsemae

    return sparsemae.__version__, folder.is_dir()
