"""Finding files: a walk through folders that ends whatever links lead where, and glob patterns.

Symbolic links are followed, but a folder that is reached without one is reached so: links come
last, and those into what was seen are left out. Hidden files and folders are skipped.
"""

import errno
import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from sparsemae.data.finding.place import Parts
from sparsemae.data.read import SUFFIXES

_MAGIC = frozenset("*?[")
_HEADERS, _IMAGES = (".hdr", ".hdr.gz"), (".img", ".img.gz")


@dataclass(slots=True)
class Folder:
    """A folder below the root of a walk, with the files in it; or why it cannot be read."""

    path: str
    parts: Parts  # names of the folders that lead to it from the root
    files: list[str] = field(default_factory=list)  # names
    error: OSError | None = None


def walk(root: str, enter: Callable[[Parts], bool] = lambda parts: True) -> Iterator[Folder]:
    """`root` and all folders below it for whose parts `enter` holds, each once."""
    seen: set[tuple[int, int]] = set()
    links: list[Folder] = []
    stack, linked = [Folder(root, ())], False
    while stack or links:
        if not stack:
            links.sort(key=lambda link: link.parts, reverse=True)
            stack, linked = [links.pop()], True
        folder = stack.pop()
        try:
            status = os.stat(folder.path)
            key = status.st_dev, status.st_ino
            if linked and key in seen:  # never asked of a tree without links, nor needed
                continue
            seen.add(key)
            below = _list(folder, enter, links)
        except OSError as error:
            folder.error = error
            below = []
        stack += below
        yield folder


def _list(folder: Folder, enter: Callable[[Parts], bool], links: list[Folder]) -> list[Folder]:
    """Fill in the files; the folders to enter, with those behind links set aside."""
    below = []
    with os.scandir(folder.path) as listing:
        for item in listing:
            if item.name.startswith("."):
                continue
            if not _leads_on(item):  # a pipe or broken link too: the reader says what is wrong
                folder.files.append(item.name)
            elif enter(parts := (*folder.parts, item.name)):
                (links if item.is_symlink() else below).append(Folder(item.path, parts))
    return below


def _leads_on(item: os.DirEntry[str]) -> bool:
    """Whether it is a folder, or a link of which that cannot be told: entering it will fail."""
    try:
        return item.is_dir()
    except OSError as error:
        return error.errno != errno.ELOOP


def expand(pattern: str) -> tuple[str, list[Parts], list[Folder]]:
    """What a glob pattern matches: its folder without wildcards, the parts of the paths below it,
    sorted, and the folders that cannot be read.

    `*`, `?` and `[...]` match within a name, but no leading dot; `**` is any number of folders.
    """
    wanted = pattern.split(os.sep)
    fixed = next(i for i, part in enumerate(wanted) if is_pattern(part))
    if wanted[-1] == "**":
        wanted.append("*")
    root = os.sep.join(wanted[:fixed]) or (os.sep if fixed else os.curdir)
    found: set[Parts] = {()}
    failed: list[Folder] = []
    for part in filter(None, wanted[fixed:]):
        folders = [parts for parts in found if os.path.isdir(os.path.join(root, *parts))]
        found = {more for parts in folders for more in _step(root, parts, part, failed)}
    return root, sorted(found - {()}), failed


def _step(root: str, parts: Parts, part: str, failed: list[Folder]) -> Iterator[Parts]:
    """The parts of a folder followed by what matches the next part of the pattern."""
    path = os.path.join(root, *parts)
    if part == "**":
        for folder in walk(path):
            if folder.error is None:
                yield (*parts, *folder.parts)
            else:
                failed.append(Folder(folder.path, (*parts, *folder.parts), error=folder.error))
    elif is_pattern(part):
        try:
            names = fnmatch.filter(os.listdir(path), part)
        except OSError as error:
            failed.append(Folder(path, parts, error=error))
            return
        yield from ((*parts, name) for name in names if part[0] == "." or name[0] != ".")
    elif os.path.lexists(os.path.join(path, part)):
        yield (*parts, part)


def volumes(names: Iterable[str]) -> list[str]:
    """Those names of one folder that are volumes: of a pair .hdr/.img the header."""
    found = [n for n in names if n.lower().endswith(SUFFIXES) and not n.startswith(".")]
    headers = {split_suffix(n)[0] for n in found if n.lower().endswith(_HEADERS)}
    return [n for n in found if not (n.lower().endswith(_IMAGES) and split_suffix(n)[0] in headers)]


def split_suffix(name: str) -> tuple[str, str]:
    """The name of a file without the suffix of a volume, and the suffix in lower case, or ""."""
    lower = name.lower()
    suffix = next((s for s in SUFFIXES if lower.endswith(s)), "")
    return name[: len(name) - len(suffix)], suffix


def preference(name: str) -> tuple[int, str]:
    """Sorts names of files so that of equal ones the suffix that comes first in SUFFIXES leads."""
    suffix = split_suffix(name)[1]
    return (SUFFIXES.index(suffix) if suffix else len(SUFFIXES)), name


def is_pattern(path: str) -> bool:
    """Whether `path` has one of the characters * ? [ of a glob pattern."""
    return not _MAGIC.isdisjoint(path)
