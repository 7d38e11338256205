"""What a store in the making already holds, so that a run that ended at any moment can go on.

Every outcome is appended to a journal in STORE/.journal, one file per run or shard, after the
case's own files are in place. The index is written from the journals at the end, and they go. A
later run starts from the index and the records. An entry counts only while its source is unchanged.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemae.data.making.case import Outcome, Record
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import CASES, EXCLUDED, INDEX, Case, Store, case_from
from sparsemae.errors import UserError
from sparsemae.files import TEMPORARY, named, sync_folder, write_atomically, write_once

JOURNALS = ".journal"
CONFIG = "config.json"
LOCK = ".lock"
FAILURES, WARNINGS = "failures.jsonl", "warnings.jsonl"
PAGES = ("dataset.html", "contact.png")
OURS = {INDEX, CASES, EXCLUDED, FAILURES, WARNINGS, *PAGES, JOURNALS, LOCK}
COMMIT = "commit"  # stage of what is found in all cases together
# failures of the machine or its set-up, which a later run may not repeat with the same file
RETRIED = (
    *("worker.", "unexpected.", "container.permission", "container.unreadable"),
    *("container.memory", "container.itk"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One outcome as its line; parsed when needed, for there may be many."""

    stamp: str
    line: bytes
    retried: bool  # a failure that is tried again by a later run

    @property
    def outcome(self) -> Outcome:
        return _outcome(json.loads(self.line))


class Ledger:
    """The outcomes of a store, by case id; appends new ones to the journal called `name`."""

    def __init__(self, path: Path, config: PreprocessConfig, name: str):
        self.path, self.config = path, config
        self.entries: dict[str, Entry] = {}
        self.unnamed: set[str] = set()  # ids of stored cases that no source has any more
        self.changed: set[str] = set()  # ids of cases of the index whose source has changed
        self.journal = path / JOURNALS / f"{name}.jsonl"
        self.file = None

    def load(self, stamps: dict[str, str]) -> None:
        """Take what the index and all journals say of sources that have the stamp given here."""
        if (self.path / INDEX).is_file():
            for outcome in _committed(self.path):
                self._keep(outcome, _line(outcome), stamps)
                if outcome.case is not None and outcome.stamp != stamps.get(outcome.id):
                    self.changed.add(outcome.id)
        for journal in sorted((self.path / JOURNALS).glob("*.jsonl")):
            with journal.open("rb") as file:
                for line in file:
                    if (outcome := _parsed(line)) is not None:
                        self._keep(outcome, line, stamps)

    def append(self, outcome: Outcome) -> None:
        """Add an outcome; it survives this process once this returns."""
        line = _line(outcome)
        self._write(line)
        self.entries[outcome.id] = _entry(outcome, line)

    def outcomes(self, ids: Iterable[str]) -> Iterator[Outcome]:
        """Those of `ids`, one after the other."""
        return (self.entries[i].outcome for i in ids)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def remove_journals(self) -> None:
        """When the index has taken their place."""
        self.close()
        shutil.rmtree(self.path / JOURNALS)

    def retire_index(self) -> None:
        """Before files of its cases are replaced: nobody may read a store that is half new."""
        for entry in list(self.entries.values()):
            self._write(entry.line)
        if self.file is not None:
            os.fsync(self.file.fileno())
        (self.path / INDEX).unlink(missing_ok=True)  # another shard may have been first
        sync_folder(self.path)
        self.changed.clear()

    def _write(self, line: bytes) -> None:
        try:
            if self.file is None:
                self.file = self.journal.open("ab")
                if self.file.tell() and not _ends_whole(self.journal):
                    self.file.write(b"\n")  # the line that a crash cut short
            self.file.write(line)
            self.file.flush()
        except OSError as error:
            raise named(error, self.journal) from None

    def _keep(self, outcome: Outcome, line: bytes, stamps: dict[str, str]) -> None:
        if outcome.id not in stamps:
            if outcome.case is not None:
                self.unnamed.add(outcome.id)
            return
        entry, before = _entry(outcome, line), self.entries.get(outcome.id)
        # journals have no order among them: a result stands against a failure of the machine
        beaten = entry.retried and before is not None and not before.retried
        if stamps[outcome.id] == outcome.stamp and not beaten:
            self.entries[outcome.id] = entry


def make_folder(path: Path) -> None:
    """The folder of a store, new or to go on with; `UserError` if it holds other files."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        other = sorted(file.name for file in path.iterdir() if not _is_ours(file.name))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot write there ({reason}); choose another -o") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"{path}: this folder may not be written to; choose another -o")
    if other:
        raise UserError(
            f"{path}: the folder holds other files ({other[0]}); choose a new folder with -o"
        )


def begin(path: Path, config: PreprocessConfig, *, alone: bool, overwrite: bool) -> None:
    """Ready the folder for a run that holds its lock, `alone` or beside other shards.

    `UserError` if the store was begun with another configuration.
    """
    if overwrite:
        _clear(path)
    else:
        _refuse_other_config(path, config)
    for folder in (CASES, JOURNALS):
        (path / folder).mkdir(exist_ok=True)
    if alone:
        _remove_temporaries(path)
    # of shards that begin together one is first, and the others look at what it wrote
    write_once(path / JOURNALS / CONFIG, (config.model_dump_json() + "\n").encode())
    _refuse_other_config(path, config)


def sweep(path: Path, cases: Iterable[Case]) -> None:
    """Remove files that no case of the store owns: of lost sources, of writes cut short."""
    owned = {file.file for case in cases for file in case.files}
    for name in stored_files(path).keys() - owned:
        (path / name).unlink()


def stored_files(path: Path) -> dict[str, int]:
    """The files of cases in the store at `path`, relative to it, and their bytes."""
    sizes = {}
    for folder in (CASES, EXCLUDED):
        if not (path / folder).is_dir():
            continue
        with os.scandir(path / folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # a temporary that another run renamed
                    sizes[f"{folder}/{entry.name}"] = entry.stat().st_size
    return sizes


def is_whole(case: Case, files: dict[str, int]) -> bool:
    """Whether the case's files are there, as long as they should be."""
    return all(files.get(file.file) == file.bytes for file in case.files)


def write_records(path: Path, name: str, records: Iterable[Record]) -> None:
    """Replace STORE/`name` by one line per record; no records, no file."""
    lines = [json.dumps(vars(record)) + "\n" for record in records]
    if lines:
        write_atomically(path / name, "".join(lines).encode())
    else:
        (path / name).unlink(missing_ok=True)


def read_records(path: Path, name: str) -> Iterator[Record]:
    """The records of STORE/`name`; none if there is no such file."""
    if (path / name).is_file():
        with (path / name).open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield Record(**json.loads(line))
                except (ValueError, TypeError):
                    raise UserError(
                        f"{path / name}: line {number} is damaged; remove the file to go on "
                        f"without its records, or make the store again with --overwrite"
                    ) from None


def _committed(path: Path) -> Iterator[Outcome]:
    """What a finished store holds."""
    warnings: dict[str, list[Record]] = {}
    for record in read_records(path, WARNINGS):
        if record.stage != COMMIT:  # found again when all cases are looked at together
            warnings.setdefault(record.id, []).append(record)
    for case in Store.open(path, complete=False).cases:
        yield Outcome(case.id, case.stamp, case, warnings=tuple(warnings.get(case.id, ())))
    for record in read_records(path, FAILURES):
        yield Outcome(record.id, record.stamp, failure=record)


def _refuse_other_config(path: Path, config: PreprocessConfig) -> None:
    unfinished = path / JOURNALS / CONFIG
    if unfinished.is_file():
        before = _config_of(unfinished)
    elif (path / INDEX).is_file():
        before = Store.open(path, complete=False).config
    else:
        return
    old, new = before.model_dump(mode="json"), config.model_dump(mode="json")
    if changed := [f"{k} {old[k]} there, {new[k]} now" for k in old if old[k] != new[k]]:
        raise UserError(
            f"{path}: made with other options ({'; '.join(changed)}): "
            f"give the same, choose another -o, or --overwrite"
        )


def _config_of(file: Path) -> PreprocessConfig:
    try:
        return PreprocessConfig.model_validate_json(file.read_text())
    except ValueError:  # pydantic's, and of text that is no UTF-8
        raise UserError(
            f"{file}: damaged; remove {file.parent}, and the volumes that only it knows of are "
            f"made again"
        ) from None


def _is_ours(name: str) -> bool:
    whole = name.removesuffix(TEMPORARY).rpartition(".")[0] if name.endswith(TEMPORARY) else name
    return whole in OURS


def _remove_temporaries(path: Path) -> None:
    """What killed runs were writing."""
    names = [file.name for file in path.iterdir()] + list(stored_files(path))
    for name in names:
        if name.endswith(TEMPORARY):
            (path / name).unlink()


def _clear(path: Path) -> None:
    """Empty a store; the lock stays, it is held."""
    (path / INDEX).unlink(missing_ok=True)  # first: without it the rest is no store
    for name in OURS - {INDEX, LOCK}:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)


def _ends_whole(journal: Path) -> bool:
    with journal.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"


def _line(outcome: Outcome) -> bytes:
    # not dataclasses.asdict: copying every tuple is most of a rerun's time
    return (json.dumps(vars(outcome), separators=(",", ":"), default=vars) + "\n").encode()


def _parsed(line: bytes) -> Outcome | None:
    """None for a line that a crash cut short: the case is made again."""
    try:
        return _outcome(json.loads(line))
    except (ValueError, TypeError, KeyError):
        return None


def _outcome(raw: dict[str, Any]) -> Outcome:
    case, failure = raw["case"], raw["failure"]
    return Outcome(
        raw["id"],
        raw["stamp"],
        None if case is None else case_from(case),
        None if failure is None else Record(**failure),
        tuple(Record(**w) for w in raw["warnings"]),
    )


def _entry(outcome: Outcome, line: bytes) -> Entry:
    code = "" if outcome.failure is None else outcome.failure.code
    return Entry(outcome.stamp, line, code.startswith(RETRIED))
