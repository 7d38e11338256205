"""The end of preprocessing: split, records and index, from the outcomes of all sources.

The index is written last of what training or a person reads; a crash before it leaves the journals.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsemae.data.finding.split import duplicate_notices, merge_groups, split_subjects
from sparsemae.data.making.case import Outcome, Record, metadata, record_of
from sparsemae.data.making.ledger import COMMIT, FAILURES, WARNINGS, Ledger, sweep, write_records
from sparsemae.data.sources import Found, Problem, Source
from sparsemae.data.store import Case, Store, write_index
from sparsemae.errors import UserError

SHARE = 0.05  # of the volumes may be rejected where no share is given ...
FEW = 20  # ... but fewer than so many never stop a run: in a small folder they are looked at


@dataclass(frozen=True)
class Rules:
    """How a store is judged and split."""

    max_failures: float | None = None
    validation: float = 0.05
    seed: int = 0

    def __post_init__(self):
        if self.max_failures is not None and not 0 <= self.max_failures <= 1:
            raise UserError(f"--max-failures {self.max_failures}: give a share from 0 to 1")
        if not 0 <= self.validation < 1:
            raise UserError(f"--validation {self.validation}: give a share from 0 to below 1")

    def broken_by(self, rejected: int, total: int) -> bool:
        if self.max_failures is None:
            return rejected >= FEW and rejected > SHARE * total
        return rejected > self.max_failures * total


def commit(
    ledger: Ledger, found: Found, rules: Rules
) -> tuple[Store, tuple[Record, ...], Counter[str]]:
    """Write records and index; the store, its failures, and how often it has each warning.

    `UserError` if too many volumes were rejected, or all: the records are written, no index is.
    """
    known = [source for source in found.sources if source.id in ledger.entries]
    outcomes = list(ledger.outcomes(source.id for source in known))
    failures = [o.failure for o in outcomes if o.failure is not None]
    failures = sorted([*failures, *map(unusable, found.problems)], key=lambda record: record.id)
    write_records(ledger.path, FAILURES, failures)
    total = len(found.sources) + len(found.problems)
    _judge(failures, total, ledger.path, rules)
    cases, duplicates = _split(known, outcomes, rules)
    warnings = [record for o in outcomes for record in o.warnings] + duplicates
    write_records(ledger.path, WARNINGS, sorted(warnings, key=lambda record: record.id))
    write_index(ledger.path, cases, ledger.config)
    sweep(ledger.path, cases)
    ledger.remove_journals()
    codes = Counter(record.code for record in warnings)
    return Store.open(ledger.path), tuple(failures), codes


def unusable(problem: Problem) -> Record:
    """An entry of a source that names no readable file."""
    return Record(
        **{"id": problem.id, "path": str(problem.path), "size": None, "mtime": None, "stamp": ""},
        **{"stage": "find", "code": problem.code, "message": problem.message, "seconds": 0.0},
    )


def _judge(failures: Sequence[Record], total: int, path: Path, rules: Rules) -> None:
    """Refuse a store of too few: what is done is kept, so the same command goes on."""
    rejected = sum(record.stage != "filter" for record in failures)
    see = f"see {path / FAILURES}; the first: {failures[0].message}" if failures else ""
    if rules.broken_by(rejected, total):
        raise UserError(
            f"{rejected} of {total} volumes rejected, more than --max-failures allows: mend them "
            f"and run this again, what is done is kept, or allow more; {see}"
        )
    if len(failures) == total:
        raise UserError(f"none of the {total} volumes can be used, {see}")


def _split(
    sources: Sequence[Source], outcomes: Sequence[Outcome], rules: Rules
) -> tuple[list[Case], list[Record]]:
    """The cases, each in training or validation, and the copies among them as warnings.

    Subjects that share a volume stay together, so that no copy of it is on the other side.
    """
    stored = [(s, o.case) for s, o in zip(sources, outcomes, strict=True) if o.case is not None]
    contents = [case.content for _, case in stored]
    groups = merge_groups([source.group for source, _ in stored], contents)
    sides = split_subjects(groups, rules.validation, rules.seed)
    cases = [
        replace(case, **metadata(source), split=side)
        for (source, case), side in zip(stored, sides, strict=True)
    ]
    return cases, _duplicates(cases, contents)


def _duplicates(cases: Sequence[Case], contents: Sequence[str]) -> list[Record]:
    notices = duplicate_notices([case.id for case in cases], contents)
    return [
        record_of(case.id, Path(case.source), case.stamp, COMMIT, notices[case.id], 0.0)
        for case in cases
        if case.id in notices
    ]
