"""From what a user names to a list of volumes: folders, files, patterns and lists, in any mixture.

A layout says how a source is read; each yields entries, of which every file is kept once. See
layouts.py for folders, lists.py and nnssl.py for written lists, ids.py for ids.
"""

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsemae.data.entry import Entry, mistake
from sparsemae.data.ids import assign_ids
from sparsemae.data.layouts import found_at, plain
from sparsemae.data.read import SUFFIXES, sniff
from sparsemae.data.scan import preference
from sparsemae.errors import UserError

LAYOUTS = ("auto", "folder", "bids", "nnunet", "nnssl", "list")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that is to become a case, and what is known of it before it is read."""

    id: str  # unique, [A-Za-z0-9._-], at most 150 bytes; see ids.py
    path: Path
    subject: str  # images of one never part: all are for training, or all for validation
    session: str | None = None
    modality: str | None = None
    dataset: str | None = None
    excluded: Path | None = None  # mask of what was made unreadable, such as a defaced face
    anatomy: Path | None = None  # mask of what is anatomy

    @property
    def group(self) -> str:
        """Names the subject among all data sets: subjects of two are two, whatever their names."""
        return f"{self.dataset or ''}/{self.subject}"


@dataclass(frozen=True)
class Problem:
    """An entry of a source that cannot be used; its id is unique among sources and problems."""

    id: str
    path: Path
    code: str
    message: str  # one line with the file and the remedy


@dataclass(frozen=True)
class Found:
    """All that the named sources hold, sorted by id."""

    sources: tuple[Source, ...]
    problems: tuple[Problem, ...]


def find_sources(sources: Sequence[Path | str], *, layout: str = "auto") -> Found:
    """The volumes that `sources` name, each file once.

    Entries that cannot be used, such as a missing file of a list, are problems. A source that
    cannot be used as a whole raises `UserError`: it is missing, holds no volume, is no valid list.
    """
    _check_layout(layout)
    if not sources:
        raise UserError("no source given; name a folder, a volume or a list")
    texts = [os.fspath(source) for source in sources]
    entries = [entry for text in texts for entry in _read(text, layout)]
    entries = _once(entries)
    ids = assign_ids(entries)
    named = sorted(zip(ids, entries, strict=True), key=lambda pair: pair[0])
    return Found(
        tuple(_source(i, entry) for i, entry in named if entry.problem is None),
        tuple(_problem(i, entry) for i, entry in named if entry.problem is not None),
    )


def _check_layout(layout: str) -> None:
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(LAYOUTS)}"
        raise UserError(f"--layout {layout}: there is none of that name; {hint}")


def _read(source: str, layout: str) -> list[Entry]:
    """The entries of one source, in an order that is the same on every system."""
    if os.path.isdir(source):
        entries = list(plain(source, guard=layout == "auto"))
        if not entries:
            raise mistake(source, f"no volume in this folder ({', '.join(SUFFIXES)})")
    elif os.path.exists(source):
        if not source.lower().endswith(SUFFIXES):
            sniff(source)
        entries = [found_at(*os.path.split(source)[:1], (), os.path.basename(source))]
    else:
        raise mistake(source, "no such file or folder; check the path")
    return sorted(entries, key=lambda entry: preference(entry.path))


def _once(entries: Sequence[Entry]) -> list[Entry]:
    seen: dict[str, Entry] = {}
    for entry in entries:
        seen.setdefault(os.path.abspath(entry.path), entry)
    return list(seen.values())


def _source(name: str, entry: Entry) -> Source:
    return Source(
        id=name,
        path=Path(entry.path),
        subject=entry.subject,
        session=entry.session,
        modality=entry.modality,
        dataset=entry.dataset,
        excluded=None if entry.excluded is None else Path(entry.excluded),
        anatomy=None if entry.anatomy is None else Path(entry.anatomy),
    )


def _problem(name: str, entry: Entry) -> Problem:
    assert entry.problem is not None
    return Problem(name, Path(entry.path), entry.problem.code, entry.problem.message)
