"""From what a user names to a list of volumes: folders, files, patterns and lists, in any mixture.

A layout says how a source is read: folder, bids and nnunet of `finding` for folders, lists and
nnssl for files that list volumes. Each yields entries, of which every file is kept once.
"""

import difflib
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsemae.data.finding.bids import bids, is_bids
from sparsemae.data.finding.entry import Entry, mistake, problem
from sparsemae.data.finding.folder import found_at, given, plain, unreadable
from sparsemae.data.finding.ids import assign_ids
from sparsemae.data.finding.lists import read_list
from sparsemae.data.finding.nnssl import NAME as PRETRAIN_DATA
from sparsemae.data.finding.nnssl import nnssl
from sparsemae.data.finding.nnunet import is_nnunet, nnunet
from sparsemae.data.finding.place import Parts, Root
from sparsemae.data.finding.scan import expand, is_pattern, preference, volumes
from sparsemae.data.read import SUFFIXES, sniff
from sparsemae.errors import UserError

LAYOUTS = ("auto", "folder", "bids", "nnunet", "nnssl", "list")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that is to become a case, and what is known of it before it is read."""

    id: str  # unique, [A-Za-z0-9._-], at most 150 bytes; see finding/ids.py
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
    entries = _once(_read([os.fspath(source) for source in sources], layout))
    _refuse_equal_ids(entries)
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


def _read(texts: Sequence[str], layout: str) -> list[Entry]:
    """The entries of all sources, source by source, in an order that is the same everywhere."""
    groups = [_source_entries(text, layout) for text in texts]
    files = [text for text, group in zip(texts, groups, strict=True) if group is None]
    single = iter(list(given(files)))  # those that were named themselves are seen together
    groups = [[next(single)] if group is None else group for group in groups]
    return [e for group in groups for e in sorted(group, key=lambda e: preference(e.path))]


def _source_entries(text: str, layout: str) -> list[Entry] | None:
    """The entries of one source; None if it is a volume itself."""
    if os.path.isdir(text):
        entries = _folder(text, layout)
        if not entries:
            raise mistake(text, f"no volume in this folder; {_hint(text, layout)}")
        return entries
    if not os.path.exists(text):
        if is_pattern(text):
            return _matches(text, layout)
        raise mistake(text, "no such file or folder; check the path")
    match _kind(text, layout):
        case "list":
            return list(read_list(text))
        case "nnssl":
            return list(nnssl(text))
    return None


def _folder(path: str, layout: str) -> list[Entry]:
    match _detected(path) if layout == "auto" else layout:
        case "bids":
            return list(bids(path))
        case "nnunet":
            return list(nnunet(path))
        case "nnssl":
            return list(nnssl(os.path.join(path, PRETRAIN_DATA)))
        case "list":
            raise mistake(path, "--layout list needs a .csv or .jsonl file, and this is a folder")
    return list(plain(path, guard=layout == "auto"))


def _detected(path: str) -> str:
    """The layout of a folder by the files and folders that make one."""
    try:
        if is_nnunet(path):
            return "nnunet"
        if os.path.isfile(os.path.join(path, PRETRAIN_DATA)):
            return "nnssl"
        return "bids" if is_bids(path) else "folder"
    except OSError:
        return "folder"  # the walk says what cannot be read


def _hint(path: str, layout: str) -> str:
    """What a folder without volumes was searched for."""
    if layout == "bids" or (layout == "auto" and _detected(path) == "bids"):
        return "as BIDS it needs sub-*/[ses-*/]anat/sub-*_T1w.nii.gz; or say --layout folder"
    return f"it needs files with {', '.join(SUFFIXES)}"


def _kind(path: str, layout: str) -> str:
    """Whether a file is a volume or names volumes: by its suffix, else a volume by its content."""
    lower = path.lower()
    kind = {".csv": "list", ".jsonl": "list", ".json": "nnssl"}.get(os.path.splitext(lower)[1], "")
    if lower.endswith(SUFFIXES):
        kind = "volume"
    if layout == "auto":
        layout = kind or "folder"
    if layout in ("bids", "nnunet") or (layout == "folder" and kind in ("list", "nnssl")):
        raise mistake(path, f"--layout {layout} needs a folder, and this is a file")
    if layout in ("list", "nnssl") and kind not in (layout, ""):
        raise mistake(path, f"--layout {layout}: this is no such file; see --layout auto")
    if layout == "folder" and not kind:
        sniff(path)
    return layout


def _matches(pattern: str, layout: str) -> list[Entry]:
    """The volumes that a pattern matches, and what is in the folders it matches."""
    root, found, failed = expand(pattern)
    top = Root.of(root)
    entries = [unreadable(top, folder) for folder in failed]
    folders: list[str] = []
    files: defaultdict[Parts, list[str]] = defaultdict(list)
    for parts in found:
        path = os.path.join(root, *parts)
        if os.path.isdir(path):
            folders.append(path)
        else:
            files[parts[:-1]].append(parts[-1])
    if files and layout not in ("auto", "folder"):
        raise mistake(pattern, f"--layout {layout} needs folders, and this matches files")
    entries += [found_at(top, parts, n) for parts in files for n in volumes(files[parts])]
    entries += [entry for path in folders for entry in _folder(path, layout)]
    if not entries:
        raise mistake(pattern, "matches no volume and no folder with any; check the pattern")
    return entries


def _once(entries: Sequence[Entry]) -> list[Entry]:
    """Each file once: as a list says rather than as its place does, else as it came first."""
    kept: dict[str, Entry] = {}
    conflicts = []
    for entry in sorted(entries, key=lambda e: not e.listed):  # so what is first is listed too
        first = kept.setdefault(os.path.abspath(entry.path), entry)
        if entry.listed and entry.facts() != first.facts():
            text = "listed twice and not alike; remove one line"
            entry.problem = problem("source.conflict", entry.path, text)
            conflicts.append(entry)
    whole = {id(entry) for entry in (*kept.values(), *conflicts)}
    return [entry for entry in entries if id(entry) in whole]


def _refuse_equal_ids(entries: Sequence[Entry]) -> None:
    """Of two entries to which lists give one id, the later becomes a problem."""
    first: dict[str, str] = {}
    for entry in entries:
        if entry.id is None or entry.problem is not None:
            continue
        if (other := first.setdefault(entry.id.lower(), entry.path)) != entry.path:
            text = f"its id {entry.id} is that of {other} too; give it another"
            entry.problem, entry.id = problem("source.duplicate_id", entry.path, text), None


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
