"""From files of volumes to a store: find, process in parallel, and commit an index at the end.

A run may end at any moment, by a kill, a full disk or a power cut: the same command goes on where
it stopped, and ends with the same store. Shards are runs that process a part and commit nothing.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsemae.data.codes import Notice, one_line
from sparsemae.data.making.case import Job, Outcome, Record, failed, process, stamp_of
from sparsemae.data.making.commit import Rules, commit
from sparsemae.data.making.ledger import (
    JOURNALS,
    LOCK,
    Ledger,
    begin,
    is_whole,
    make_folder,
    stored_files,
)
from sparsemae.data.making.workers import Lost, run_jobs
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.sources import Source, find_sources
from sparsemae.data.store import Store
from sparsemae.errors import UserError
from sparsemae.files import locked

TIMEOUT = 1800.0  # seconds for one volume, of which the largest take minutes
Engine = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome | Lost]]]


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int


@dataclass
class Progress:
    """How far a run is; counts include what earlier runs did."""

    total: int
    done: int = 0
    ok: int = 0  # stored, with or without a warning
    warned: int = 0
    rejected: int = 0
    filtered: int = 0  # left out by the quality filter
    kept: int = 0  # of done: by earlier runs

    def reject(self, unusable: int) -> None:
        """Count entries of a list that name no file that could be read."""
        self.total += unusable
        self.done += unusable
        self.kept += unusable
        self.rejected += unusable

    def count(self, outcome: Outcome, kept: bool = False) -> None:
        self.done += 1
        self.kept += kept
        self.ok += outcome.case is not None
        self.warned += outcome.case is not None and bool(outcome.warnings)
        if outcome.failure is not None and outcome.failure.stage == "filter":
            self.filtered += 1
        elif outcome.failure is not None:
            self.rejected += 1


@dataclass(frozen=True)
class Summary:
    """What `preprocess` did; `store` is None for a shard, and for a run that was stopped."""

    store: Store | None
    failures: tuple[Record, ...]  # all of the store's; () without one
    warnings: Counter[str]  # how often each code
    progress: Progress
    stopped: bool = False


def preprocess(
    sources: Sequence[Path | str],
    store: Path | str,
    config: PreprocessConfig | None = None,
    *,
    layout: str = "auto",
    workers: int = 0,
    timeout: float = TIMEOUT,
    shard: Shard | None = None,
    merge: bool = False,
    dask: str | None = None,
    verify: bool = False,
    overwrite: bool = False,
    max_failures: float | None = None,
    validation: float = 0.05,
    seed: int = 0,
    on_outcome: Callable[[Progress, Outcome | None], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Summary:
    """Turn every volume that `sources` name into a case of a store; go on with an unfinished one.

    Args:
        layout: How sources are read, see `find_sources`.
        workers: Processes; 0 works in this one, which a volume that kills it ends.
        timeout: Seconds after which a worker counts as hung; its volume is tried once more.
        shard: Process this part only, and leave the index to a run with `merge`.
        merge: Process nothing; commit what the shards did.
        dask: Address of a Dask scheduler to work on instead of processes of this machine.
        verify: Read every stored case too, and make damaged ones again.
        overwrite: Empty the store first.
        max_failures: Share of rejected volumes, the filter's apart, above which there is no store;
            5 % if None, and never for fewer than 20 volumes.
        validation: Share of the subjects held out, at least one of two; 0 for none.
        seed: Of the split.
        on_outcome: Called at the start, with None, and after each volume.
        stopped: Asked between volumes; once True the volumes begun are finished, and that is all.

    Raises:
        UserError: Sources, options or folder cannot be used, or too many volumes were rejected.
    """
    config, path = config or PreprocessConfig(), Path(store)
    rules = Rules(max_failures, validation, seed)
    _check_options(workers, shard, merge, overwrite, dask)
    found = find_sources(sources, layout=layout)
    _refuse_overlap(sources, path)
    with (
        _engine(path, dask, workers, timeout, stopped) as engine,
        _workspace(path, config, shard, overwrite) as ledger,
    ):
        stamps = {source.id: stamp_of(source) for source in found.sources}
        ledger.load(stamps)
        part = found.sources if shard is None else found.sources[shard.index :: shard.count]
        jobs, progress = _plan(part, stamps, ledger, verify=verify, again=not merge)
        if shard is None:
            progress.reject(len(found.problems))
        on_outcome = on_outcome or (lambda progress, outcome: None)
        on_outcome(progress, None)
        if merge and jobs:
            raise UserError(
                f"{path}: {len(jobs)} of {len(part)} volumes are not done, the first is "
                f"{jobs[0].source.path}: run their shards again, or go on without --merge"
            )
        for job, result in engine(jobs):
            outcome = _given_up(job, result) if isinstance(result, Lost) else result
            ledger.append(outcome)
            progress.count(outcome)
            on_outcome(progress, outcome)
            if shard is None and rules.broken_by(progress.rejected, progress.total):
                break  # no later volume can mend that: `commit` refuses
        if shard is not None or (progress.done < progress.total and stopped()):
            return Summary(None, (), Counter(), progress, stopped=progress.done < progress.total)
        return Summary(*commit(ledger, found, rules), progress)


def _plan(
    part: Sequence[Source], stamps: dict[str, str], ledger: Ledger, *, verify: bool, again: bool
) -> tuple[list[Job], Progress]:
    """What is left to do, `again` what may pass now too, and the count of what is done."""
    files, jobs, progress = stored_files(ledger.path), [], Progress(len(part))
    for source in part:
        entry = ledger.entries.get(source.id)
        job = Job(_absolute(source), stamps[source.id], ledger.path.resolve(), ledger.config)
        if entry is None or (entry.retried and again):
            jobs.append(job)
        elif (outcome := entry.outcome).case is None:
            progress.count(outcome, kept=True)
        elif not is_whole(outcome.case, files):
            jobs.append(job)
        elif verify:
            jobs.append(replace(job, known=outcome.case))
        else:
            progress.count(outcome, kept=True)
    return jobs, progress


@contextlib.contextmanager
def _engine(
    store: Path, dask: str | None, workers: int, timeout: float, stopped: Callable[[], bool]
) -> Iterator[Engine]:
    """What runs the jobs."""
    if dask is None:
        yield lambda jobs: run_jobs(process, jobs, workers, timeout=timeout, stopped=stopped)
        return
    from sparsemae.data.making.cluster import connected, run_on_dask

    with connected(dask) as client:
        yield lambda jobs: run_on_dask(process, jobs, client, store.resolve(), stopped=stopped)


def _absolute(source: Source) -> Source:
    """Workers elsewhere have another working folder, and records are read later."""
    files = {name: getattr(source, name) for name in ("path", "excluded", "anatomy")}
    return replace(source, **{n: Path(os.path.abspath(f)) for n, f in files.items() if f})


def _given_up(job: Job, lost: Lost) -> Outcome:
    text = (
        f"{job.source.path}: processing it twice failed, {lost.reason}; remove or shrink the file"
    )
    return failed(job, "worker", Notice(lost.code, one_line(text)), lost.seconds)


@contextlib.contextmanager
def _workspace(
    path: Path, config: PreprocessConfig, shard: Shard | None, overwrite: bool
) -> Iterator[Ledger]:
    """The folder, made and locked: shards may share it, other runs have it to themselves."""
    busy = f"{path}: another run is at work in this store; wait for it, or choose another -o"
    make_folder(path)
    with contextlib.ExitStack() as held:
        held.enter_context(locked(path / LOCK, shared=shard is not None, busy=busy))
        begin(path, config, alone=shard is None, overwrite=overwrite)
        name = "whole" if shard is None else f"shard-{shard.index}-of-{shard.count}"
        if shard is not None:
            held.enter_context(locked(path / JOURNALS / f"{name}.lock", busy=f"{busy} ({name})"))
        ledger = Ledger(path, config, name)
        held.callback(ledger.close)
        yield ledger


def _check_options(
    workers: int, shard: Shard | None, merge: bool, overwrite: bool, dask: str | None
) -> None:
    if workers < 0:
        raise UserError(f"workers {workers}: give at least 1")
    if shard is not None and not 0 <= shard.index < shard.count:
        raise UserError(
            f"--shard {shard.index}/{shard.count}: shards of {shard.count} are counted from 0 to "
            f"{shard.count - 1}"
        )
    if shard is not None and merge:
        raise UserError("--shard and --merge: shards first, then one run with --merge alone")
    if shard is not None and overwrite:
        raise UserError(
            "--shard and --overwrite: a shard would remove what others did; remove the "
            "store yourself before the first shard"
        )
    if merge and (overwrite or dask):
        raise UserError("--merge only commits what is there: drop --overwrite and --dask")


def _refuse_overlap(sources: Sequence[Path | str], store: Path) -> None:
    inner = store.resolve()
    for source in map(Path, sources):
        folder = source.resolve()
        if folder == inner or folder in inner.parents or inner in folder.parents:
            raise UserError(f"store {store} and source {source} overlap; choose another -o")
