"""From files of volumes to a store: find, process in parallel, and commit an index at the end.

A run may end at any moment, by a kill, a full disk or a power cut: the same command goes on where
it stopped, and ends with the same store. Shards are runs that process a part and commit nothing.
"""

import contextlib
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsemae.data.codes import Notice, one_line
from sparsemae.data.making.case import Job, Outcome, Record, failed, process, stamp_of
from sparsemae.data.making.commit import Rules, commit, unusable
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
from sparsemae.data.store import INDEX, Store
from sparsemae.errors import UserError
from sparsemae.files import locked

TIMEOUT = 1800.0  # seconds for one volume, of which the largest take minutes
Engine = Callable[[Sequence[Job]], Iterator[tuple[Job, Outcome | Lost]]]


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count`, counted from 0."""

    index: int
    count: int

    def __contains__(self, case_id: str) -> bool:
        """Whether the case is in this part, whichever others there are."""
        return zlib.crc32(case_id.encode()) % self.count == self.index


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
    made: int = 0  # of done: by this one; the rest are entries of a list that name no file

    def count(self, outcome: Outcome, *, kept: bool = False, made: bool = False) -> None:
        self.done += 1
        self.kept += kept
        self.made += made
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
    timeout: float | None = None,
    shard: Shard | None = None,
    merge: bool = False,
    dask: str | None = None,
    verify: bool = False,
    prune: bool = False,
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
        timeout: Seconds after which a worker counts as hung; its volume is tried once more. 1800 if
            None; Dask has none.
        shard: Process this part only, and leave the index to a run with `merge`.
        merge: Process nothing; commit what the shards did.
        dask: Address of a Dask scheduler to work on instead of processes of this machine.
        verify: Read every stored case too, and make damaged ones again.
        prune: Drop stored cases that `sources` do not name; they are refused otherwise.
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
    _check_options(workers, timeout, shard)
    _check_together(shard, merge, dask, timeout, verify=verify, overwrite=overwrite)
    found = find_sources(sources, layout=layout)
    _refuse_overlap(sources, path)
    with (
        _engine(path, dask, workers, timeout or TIMEOUT, stopped) as engine,
        _workspace(path, config, shard, merge=merge, overwrite=overwrite) as ledger,
    ):
        stamps = {source.id: stamp_of(source) for source in found.sources}
        ledger.load(stamps)
        if not prune:
            _refuse_unnamed(ledger)
        part = [source for source in found.sources if shard is None or source.id in shard]
        jobs, progress = _plan(part, stamps, ledger, verify=verify, again=not merge)
        problems = found.problems if shard is None else ()
        progress.total += len(problems)
        on_outcome = on_outcome or (lambda progress, outcome: None)
        on_outcome(progress, None)
        for problem in problems:
            outcome = Outcome(problem.id, "", failure=unusable(problem))
            progress.count(outcome)
            on_outcome(progress, outcome)
        if merge and jobs:
            raise UserError(
                f"{path}: {len(jobs)} of {len(part)} volumes are not done, the first is "
                f"{jobs[0].source.path}: run their shards again, or go on without --merge"
            )
        if any(job.source.id in ledger.changed for job in jobs):
            ledger.retire_index()
        for job, result in engine(jobs):
            outcome = _given_up(job, result) if isinstance(result, Lost) else result
            ledger.append(outcome)
            progress.count(outcome, made=outcome.made)
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
    store = ledger.path.resolve()
    for source in part:
        entry, known = ledger.entries.get(source.id), None
        if entry is not None and not (entry.retried and again):
            known = entry.outcome
            if known.case is not None and not is_whole(known.case, files):
                known = None
        if known is not None and not (verify and known.case is not None):
            progress.count(known, kept=True)
        else:
            stamp = stamps[source.id]
            jobs.append(Job(_absolute(source), stamp, store, ledger.config, known))
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
    path: Path, config: PreprocessConfig, shard: Shard | None, *, merge: bool, overwrite: bool
) -> Iterator[Ledger]:
    """The folder, made and locked: shards may share it, other runs have it to themselves."""
    busy = f"{path}: another run is at work in this store; wait for it, or choose another -o"
    if merge and not any((path / name).exists() for name in (INDEX, JOURNALS)):
        raise UserError(f"{path}: no shard has begun a store there; check -o")
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


def _refuse_unnamed(ledger: Ledger) -> None:
    if ledger.unnamed:
        raise UserError(
            f"{ledger.path}: {len(ledger.unnamed)} volumes in it, as {min(ledger.unnamed)}, are "
            f"not among those that SRC names now: name all sources together, choose another -o, or "
            f"drop them with --prune"
        )


def _check_options(workers: int, timeout: float | None, shard: Shard | None) -> None:
    if workers < 0:
        raise UserError(f"workers {workers}: give at least 1")
    if timeout is not None and not 0 < timeout < math.inf:
        raise UserError(f"--timeout {timeout:g}: give a positive number of seconds")
    if shard is not None and not 0 <= shard.index < shard.count:
        raise UserError(
            f"--shard {shard.index}/{shard.count}: shards of {shard.count} are counted from 0 to "
            f"{shard.count - 1}"
        )


def _check_together(
    shard: Shard | None,
    merge: bool,
    dask: str | None,
    timeout: float | None,
    *,
    verify: bool,
    overwrite: bool,
) -> None:
    """Refuse options of which one would be ignored."""
    if shard is not None and merge:
        raise UserError("--shard and --merge: shards first, then one run with --merge alone")
    if shard is not None and overwrite:
        raise UserError(
            "--shard and --overwrite: a shard would remove what others did; remove the "
            "store yourself before the first shard"
        )
    if merge and (overwrite or verify or dask):
        raise UserError("--merge only commits what is there: drop --overwrite, --verify and --dask")
    if dask and timeout is not None:
        raise UserError("--timeout is for processes of this machine: drop it, or --dask")


def _refuse_overlap(sources: Sequence[Path | str], store: Path) -> None:
    inner = store.resolve()
    for source in map(Path, sources):
        folder = source.resolve()
        if folder == inner or folder in inner.parents or inner in folder.parents:
            raise UserError(f"store {store} and source {source} overlap; choose another -o")
