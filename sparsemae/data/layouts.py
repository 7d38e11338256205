"""Ways in which folders of volumes are laid out: plain, BIDS, nnU-Net raw.

Each function yields an entry for every volume below a folder, and one for what it could not read.
"""

import os
from collections.abc import Iterator

from sparsemae.data.entry import Entry, derive, mistake, problem
from sparsemae.data.scan import Folder, Parts, split_suffix, volumes, walk


def plain(root: str, *, guard: bool = False) -> Iterator[Entry]:
    """All volumes in a folder and below. With `guard`, nnU-Net's labels are refused as images."""
    for folder in walk(root):
        if guard and folder.parts[-1:] == ("labelsTr",) and _is_beside(folder, "imagesTr"):
            raise mistake(
                os.path.dirname(folder.path),
                "labelsTr would be taken for images; name this nnU-Net data set itself, or its "
                "imagesTr, or say --layout folder",
            )
        yield from in_folder(root, folder)


def in_folder(root: str, folder: Folder) -> Iterator[Entry]:
    """The volumes of one folder of a walk from `root`."""
    if folder.error is not None:
        yield unreadable(root, folder)
    for name in volumes(folder.files):
        yield found_at(root, folder.parts, name)


def found_at(root: str, folders: Parts, name: str) -> Entry:
    """The file `name` in `folders` below `root`, with what its place says."""
    stem = split_suffix(name)[0]
    return Entry(
        path=os.path.join(root, *folders, name),
        parts=(*folders, stem),
        origin=os.path.join(base_name(root), *folders, name),
        **derive(root, folders, stem),
    )


def unreadable(root: str, folder: Folder) -> Entry:
    """A folder whose volumes are unknown; of the root itself, the end of it all."""
    text = f"cannot read this folder ({folder.error.strerror}); change its permissions"
    if not folder.parts:
        raise mistake(folder.path, text)
    entry = found_at(root, folder.parts[:-1], folder.parts[-1])
    entry.problem = problem("source.unreadable", folder.path, text)
    return entry


def base_name(root: str) -> str:
    """The name of a folder, however it is written."""
    return os.path.basename(os.path.abspath(root))


def _is_beside(folder: Folder, name: str) -> bool:
    return os.path.isdir(os.path.join(os.path.dirname(folder.path), name))
