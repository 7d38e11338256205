"""Training and validation apart: by subject, and no copy of a volume on the other side.

Subjects are ordered by a hash of seed and name, so that the split does not depend on the order of
the files, and a subject that comes or goes moves few others.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence

from sparsemae.data.codes import Notice
from sparsemae.errors import UserError, listed


def split_subjects(groups: Sequence[str], fraction: float, seed: int) -> tuple[str, ...]:
    """ "train" or "val" for each entry, equal for entries of one group.

    Of n >= 2 groups round(`fraction` * n) are for validation, at least 1 and at most n - 1; none
    if `fraction` is 0, or there is only one.
    """
    if not 0 <= fraction < 1:
        raise UserError(f"validation fraction {fraction}: give a share from 0 to below 1")
    names = set(groups)
    count = 0
    if fraction > 0 and len(names) > 1:
        count = min(max(1, math.floor(fraction * len(names) + 0.5)), len(names) - 1)
    held_out = set(sorted(names, key=lambda name: _order(name, seed))[:count])
    return tuple("val" if group in held_out else "train" for group in groups)


def merge_groups(groups: Sequence[str], contents: Sequence[str]) -> tuple[str, ...]:
    """`groups` with those that share a content made one, named by the least of their names.

    `contents` has the hash of each entry's voxels. Sharing is transitive.
    """
    parents: dict[str, str] = {group: group for group in groups}

    def root(group: str) -> str:
        while parents[group] != group:
            parents[group] = group = parents[parents[group]]  # halves the way for the next
        return group

    first: dict[str, str] = {}
    for group, content in zip(groups, contents, strict=True):
        one, two = sorted((root(group), root(first.setdefault(content, group))))
        parents[two] = one
    return tuple(root(group) for group in groups)


def duplicate_notices(ids: Sequence[str], contents: Sequence[str]) -> dict[str, Notice]:
    """For each id whose voxels another has too, the warning `duplicate.content`."""
    copies: defaultdict[str, list[str]] = defaultdict(list)
    for name, content in zip(ids, contents, strict=True):
        copies[content].append(name)
    return {
        name: Notice("duplicate.content", f"{name}: {_others(name, alike)}")
        for alike in copies.values()
        if len(alike) > 1
        for name in alike
    }


def _others(name: str, alike: Sequence[str]) -> str:
    others = [other for other in sorted(alike) if other != name]
    return f"the same voxels as {listed(others)}; keep one of them"


def _order(name: str, seed: int) -> bytes:
    data = f"{seed}\0{name}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).digest()
