"""Plain folders of volumes, flat or nested, and single files named one by one."""

import os
from collections.abc import Iterator, Sequence
from itertools import takewhile

from sparsemae.data.finding.entry import Entry, mistake, problem
from sparsemae.data.finding.place import Parts, Root, common_folder, folders_below
from sparsemae.data.finding.scan import Folder, split_suffix, volumes, walk


def plain(root: str, *, guard: bool = False) -> Iterator[Entry]:
    """All volumes in a folder and below. With `guard`, nnU-Net's labels are refused as images."""
    top, found = Root.of(root), []
    for folder in walk(root):
        if guard and folder.parts[-1:] == ("labelsTr",) and _is_beside(folder, "imagesTr"):
            raise mistake(
                os.path.dirname(folder.path),
                "labelsTr would be taken for images; name this nnU-Net data set itself, or its "
                "imagesTr, or say --layout folder",
            )
        if folder.error is not None:
            yield unreadable(top, folder)
        found += [(folder.parts, name) for name in volumes(folder.files)]
    shared = _shared([parts for parts, _ in found])
    for parts, name in found:
        yield found_at(top, parts, name, shared)


def given(paths: Sequence[str]) -> Iterator[Entry]:
    """Files that were named themselves: subjects as if all lay below the folder they share."""
    if not paths:
        return
    shared = Root.of(common_folder(paths))
    for path in paths:
        above, name = os.path.split(os.path.abspath(path))
        stem = split_suffix(name)[0]
        origin = os.path.join(os.path.basename(above), name)
        facts = shared.facts(folders_below(shared.path, path), stem)
        yield Entry(path=path, parts=(stem,), origin=origin, **facts)


def found_at(root: Root, folders: Parts, name: str, shared: int = 0) -> Entry:
    """The file `name` in `folders` below `root`, with what its place says; see `Root.facts`."""
    stem = split_suffix(name)[0]
    return Entry(
        path=os.path.join(root.path, *folders, name),
        parts=root.id_parts(folders, stem),
        origin=os.path.join(root.name, *folders, name),
        **root.facts(folders, stem, shared),
    )


def unreadable(root: Root, folder: Folder) -> Entry:
    """A folder whose volumes are unknown; of the root itself, the end of it all."""
    text = f"cannot read this folder ({folder.error.strerror}); change its permissions"
    if not folder.parts:
        raise mistake(folder.path, text)
    entry = found_at(root, folder.parts[:-1], folder.parts[-1])
    entry.problem = problem("source.unreadable", folder.path, text)
    return entry


def _shared(places: Sequence[Parts]) -> int:
    """How many outer folders all places have in common: a lone `images` is no subject's name."""
    if len(places) < 2:
        return 0
    pairs = zip(min(places), max(places), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _is_beside(folder: Folder, name: str) -> bool:
    return os.path.isdir(os.path.join(os.path.dirname(folder.path), name))
