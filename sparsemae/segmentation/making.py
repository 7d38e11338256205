"""Preparing all cases of a data set for a plan, once, in several processes.

Run again it makes only what is missing, or was made of files that have changed since.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from sparsemae.data.codes import VolumeError, one_line
from sparsemae.data.making.case import stamp_of_files
from sparsemae.data.making.workers import Lost, processes, run_jobs
from sparsemae.errors import UserError
from sparsemae.files import TEMPORARY, locked
from sparsemae.live import LiveLine, say
from sparsemae.planning.plan import ChannelPlan, Plan
from sparsemae.segmentation.dataset import Classes, Dataset, SegCase
from sparsemae.segmentation.locations import find_locations
from sparsemae.segmentation.prepare import prepare_case
from sparsemae.segmentation.reading import read_case
from sparsemae.segmentation.store import (
    INDEX,
    LabelledStore,
    StoredCase,
    is_there,
    write_case,
    write_index,
)

LOCK = ".lock"
RULES = 1  # of preparing; raised when they change, so that no store of old ones is taken
_WAIT = 2.0  # seconds between looks at whether another process is done
_KEEP = 30.0  # seconds of work that a kill may cost
_NAMED = 5  # bad cases in a message


@dataclass(frozen=True)
class Job:
    """A case to prepare."""

    store: Path
    case: SegCase
    classes: Classes
    plan: Plan
    stamp: str


def prepare_store(
    dataset: Dataset,
    plan: Plan,
    folder: Path,
    *,
    workers: int = 1,
    console: Console | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> LabelledStore | None:
    """The data set's training cases on the plan's grid, in a folder of their own below `folder`.

    Plans that give equal voxels share it, whatever their networks. A second process waits for the
    first.

    Args:
        workers: Processes; 1 works in this one.
        stopped: Asked between cases and while waiting; None is returned once it is True.

    Raises:
        UserError: Cases cannot be used; names them. What is whole is kept.
        OSError: The folder cannot be written.
    """
    made = _made(plan, dataset.classes)
    # two data sets of one name do not share it
    key = hashlib.sha256(json.dumps([made, str(dataset.path.resolve())], sort_keys=True).encode())
    store = folder / f"{dataset.name}-{key.hexdigest()[:8]}"
    try:
        store.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: a file, or below one; choose another --store") from None
    console = console or Console(quiet=True)
    with _alone(store, console, stopped) as alone:
        if not alone:
            return None
        for leftover in store.rglob(f"*{TEMPORARY}"):
            leftover.unlink(missing_ok=True)
        known = _known(store, made)
        stamps = {case.id: stamp_of_case(case) for case in dataset.training}
        kept = {
            case.id: case
            for case in known
            if stamps.get(case.id) == case.stamp and is_there(store, case)
        }
        jobs = [
            Job(store, case, dataset.classes, plan, stamps[case.id])
            for case in dataset.training
            if case.id not in kept
        ]
        if not jobs and len(known) == len(kept):
            return LabelledStore.open(store)
        failures = []
        with (
            LiveLine(console, "preparing", total=len(jobs)) as line,
            _kept(store, kept, made) as keep,
        ):
            outcomes = run_jobs(_prepare, jobs, processes(workers, len(jobs)), stopped=stopped)
            for done, (job, outcome) in enumerate(outcomes, start=1):
                if isinstance(outcome, StoredCase):
                    kept[job.case.id] = outcome
                else:
                    reason = outcome.reason if isinstance(outcome, Lost) else outcome
                    failures.append(f"{job.case.id}: {reason}")
                text = f"prepared {done} of {len(jobs)} cases"
                line.update(done, len(jobs), job.case.id, text, last=done == len(jobs))
                keep()
        if failures:
            raise UserError(_told(failures))
        return None if stopped() and len(kept) < len(stamps) else LabelledStore.open(store)


def _made(plan: Plan, classes: Classes) -> dict[str, Any]:
    """What decides the voxels of a prepared case."""
    return {
        "rules": RULES,
        "spacing": list(plan.spacing),
        "channels": [_deciding(channel) for channel in plan.channels],
        "classes": list(classes.names),
        "ignore": classes.ignore,
    }


def _deciding(channel: ChannelPlan) -> dict[str, Any]:
    raw = channel.model_dump(mode="json")
    return raw if channel.normalization == "ct" else raw | {"intensities": None}


def _prepare(job: Job) -> StoredCase | str:
    """The stored case, or why there is none."""
    try:
        volumes, labels = read_case(job.case, job.classes)
        ready = prepare_case(volumes, labels, job.plan)
    except VolumeError as error:
        return str(error)
    seed = int.from_bytes(hashlib.sha256(os.fsencode(job.case.id)).digest()[:8], "big")
    locations = find_locations(ready.labels, len(job.classes), seed, ignore=job.classes.ignore)
    return write_case(
        *(job.store, job.case.id, ready, locations), spacing=job.plan.spacing, stamp=job.stamp
    )


@contextlib.contextmanager
def _kept(
    store: Path, cases: dict[str, StoredCase], made: dict[str, Any]
) -> Iterator[Callable[[], None]]:
    """Write the index now and then, when the function is called, and at the end whatever comes."""
    last = time.monotonic()

    def keep() -> None:
        nonlocal last
        if time.monotonic() - last > _KEEP:
            write_index(store, list(cases.values()), made)
            last = time.monotonic()

    try:
        yield keep
    finally:
        if cases:
            write_index(store, list(cases.values()), made)


@contextlib.contextmanager
def _alone(store: Path, console: Console, stopped: Callable[[], bool]) -> Iterator[bool]:
    """Hold the store, after whoever is preparing in it; False if it was stopped before."""
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            try:
                stack.enter_context(locked(store / LOCK, busy=f"{store}: in use"))
                break
            except UserError:
                if stopped():
                    yield False
                    return
                if not told:
                    say(console, f"{store}: another process prepares it; waiting")
                    told = True
                time.sleep(_WAIT)
        yield True


def _known(store: Path, made: dict[str, Any]) -> tuple[StoredCase, ...]:
    """What is there already; a damaged index is made anew, with all it named."""
    if not (store / INDEX).exists():
        return ()
    try:
        opened = LabelledStore.open(store)
    except UserError:
        for path in store.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
        return ()
    return opened.cases if opened.made == made else ()


def stamp_of_case(case: SegCase) -> str:
    """Size and time of the files of a case."""
    return stamp_of_files([*case.images, *(() if case.label is None else (case.label,))])


def _told(failures: list[str]) -> str:
    more = f"; and {len(failures) - _NAMED} more" if len(failures) > _NAMED else ""
    what = "1 case" if len(failures) == 1 else f"{len(failures)} cases"
    return one_line(f"{what} cannot be used: {'; '.join(failures[:_NAMED])}{more}")
