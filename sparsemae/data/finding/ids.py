"""Ids of volumes: names of files in a store, and what a rerun recognises a volume by.

An id depends on the volume's own place only, so that adding others does not change it:
`a/b/scan.nii.gz` below a source is `a__b__scan`. Where that would not do as a name, a run of
anything but [A-Za-z0-9._-] becomes one `_`, dots, dashes and `_` at the ends go, and what is over
150 bytes is cut; as names may then be alike, 8 hexadecimal digits of the original follow:
`scan 1.nii` is `scan_1-` and digits. If two ids are equal all the same, be it only on a file system
that ignores case, the first keeps it and the other gets digits of where it lies.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence

from sparsemae.data.finding.entry import Entry

LONGEST = 150  # bytes: leaves room for suffixes within the 255 of a file name
DIGITS = 8
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
_SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def is_safe(name: str) -> bool:
    """Whether `name` can be an id as it is."""
    return len(name) <= LONGEST and _SAFE.fullmatch(name) is not None


def make_id(parts: Sequence[str]) -> str:
    """The id of what `parts` name: folders, outermost first, and the name without its suffix."""
    name = "__".join(parts)
    if is_safe(name):
        return name
    return _marked(_UNSAFE.sub("_", name).strip("._-"), "\0".join(parts))


def assign_ids(entries: Sequence[Entry]) -> list[str]:
    """One id per entry, unique even where case is ignored; of two, the first entry keeps it.

    Ids that the user gave come first, and entries with a problem last. Entries that were given an
    id which is taken get another one: the caller reports that.
    """
    ids: dict[int, str] = {}
    taken: set[str] = set()
    left = sorted(
        range(len(entries)), key=lambda i: (entries[i].problem is not None, entries[i].id is None)
    )
    for candidate in (_given, _by_origin, _by_path):
        missed = []
        for i in left:
            name = candidate(entries[i])
            if name.lower() in taken:
                missed.append(i)
            else:
                ids[i] = name
                taken.add(name.lower())
        left = missed
    for i in left:  # a file named twice by a list
        ids[i] = next(n for n in _numbered(_by_path(entries[i])) if n.lower() not in taken)
        taken.add(ids[i].lower())
    return [ids[i] for i in range(len(entries))]


def _given(entry: Entry) -> str:
    return make_id(entry.parts) if entry.id is None else entry.id


def _by_origin(entry: Entry) -> str:
    return _marked(_given(entry), entry.origin)


def _by_path(entry: Entry) -> str:
    return _marked(_given(entry), entry.path)


def _numbered(name: str) -> Iterable[str]:
    number = 2
    while True:
        yield _marked(name, str(number))
        number += 1


def _marked(name: str, original: str) -> str:
    """`name` with digits of `original`, which tell it from others that look alike."""
    data = original.encode("utf-8", "surrogatepass")
    digits = hashlib.blake2b(data, digest_size=DIGITS // 2).hexdigest()
    return f"{name[: LONGEST - DIGITS - 1] or 'volume'}-{digits}"
