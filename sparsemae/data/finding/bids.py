"""BIDS: `sub-X/[ses-Y/]anat/sub-X_..._T1w.nii.gz` and other contrasts, below a data set or many.

Only anatomical images are taken. Left out are derivatives, sourcedata and code, unless one of them
is the source itself; masks and other endings; and the phase, real and imaginary parts of a scan.
"""

import os
import re
from collections.abc import Iterator

from sparsemae.data.finding.entry import Entry
from sparsemae.data.finding.folder import found_at, unreadable
from sparsemae.data.finding.place import (
    CONTRASTS,
    Parts,
    Root,
    is_session,
    is_subject,
    leads_to_anat,
    subject_folders,
)
from sparsemae.data.finding.scan import split_suffix, volumes, walk

_PART = re.compile(r"_part-(phase|real|imag)_")
_NOT_RAW = {"derivatives", "sourcedata", "code"}
_LOOKED_AT = 100  # subjects, or sessions of one, before a folder is held to be no BIDS


def bids(root: str) -> Iterator[Entry]:
    """The anatomical images below `root`: data sets, one of them, or a subject or session of it."""
    top = Root.of(root)

    def enter(parts: Parts) -> bool:
        inside = subject_folders((*top.inside, *parts))
        return leads_to_anat(inside) if inside else parts[-1] not in _NOT_RAW

    for folder in walk(root, enter):
        if folder.error is not None:
            yield unreadable(top, folder)
        if subject_folders((*top.inside, *folder.parts))[-1:] == ("anat",):
            for name in filter(_is_image, volumes(folder.files)):
                yield found_at(top, folder.parts, name)


def is_bids(root: str) -> bool:
    """Whether `root` is in a subject's folder, or has some, with anatomical images or sessions."""
    inside = Root.of(root).inside
    if inside:
        return inside[-1] == "anat" or _has_anat(root)
    with os.scandir(root) as listing:
        subjects = sorted(item.path for item in listing if is_subject(item.name))
    return any(_has_anat(path) for path in subjects[:_LOOKED_AT] if os.path.isdir(path))


def _has_anat(folder: str) -> bool:
    names = os.listdir(folder)
    sessions = sorted(filter(is_session, names))[:_LOOKED_AT]
    return "anat" in names or any(os.path.isdir(os.path.join(folder, s, "anat")) for s in sessions)


def _is_image(name: str) -> bool:
    stem = split_suffix(name)[0]
    ending = stem.rpartition("_")[2]
    return stem.startswith("sub-") and ending in CONTRASTS and not _PART.search(stem)
