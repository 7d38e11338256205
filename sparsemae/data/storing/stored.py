"""What a store's index says of a case: one line of JSON each, parsed when it is asked for."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from jaxtyping import Int64

from sparsemae.errors import UserError


@dataclass(frozen=True)
class StoredFile:
    """One array of a store: where it lies and how to know that it is whole."""

    file: str  # relative to the store
    bytes: int
    crcs: str  # 8 hex digits of a CRC-32 each: what holds the chunks together, chunk 0, chunk 1 ...


@dataclass(frozen=True, kw_only=True)
class Case:
    """One volume of a store and where it came from. Lengths in voxels, spacing in mm."""

    id: str
    file: str  # relative to the store
    shape: tuple[int, int, int]  # D, H, W
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]  # [4, 4], voxel to world mm, RAS
    background: float  # the stored value that stands for air
    mean: float  # raw intensity = stored value * std + mean
    std: float
    crop_start: tuple[int, int, int]  # box in the source's grid after reorientation to RAS
    crop_stop: tuple[int, int, int]
    source: str  # absolute path
    stamp: str  # of the source's files, to notice that they changed
    source_shape: tuple[int, int, int]  # after reorientation to RAS
    source_affine: tuple[tuple[float, ...], ...]
    bytes: int
    crcs: str  # as `StoredFile.crcs`
    excluded: StoredFile | None = None  # mask of voxels that no loss may count, such as defacing
    foreground: str = ""  # as `encode_blocks` makes it
    subject: str = ""
    session: str = ""
    modality: str = ""
    dataset: str = ""
    split: str = "train"  # or "val"
    content: str = ""  # hash of the raw voxels: equal for copies
    warnings: tuple[str, ...] = ()  # codes

    @property
    def image(self) -> StoredFile:
        """Where the voxels lie."""
        return StoredFile(self.file, self.bytes, self.crcs)

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All files of the case."""
        return (self.image,) if self.excluded is None else (self.image, self.excluded)


def case_from(raw: dict[str, Any]) -> Case:
    """A case from `dataclasses.asdict` of it, also by way of JSON; TypeError if it is none."""
    fields = {name: tuples(value) for name, value in raw.items()}
    if fields.get("excluded") is not None:
        fields["excluded"] = StoredFile(**fields["excluded"])
    return Case(**fields)


def case_line(case: Case, *, without: Sequence[str] = ()) -> bytes:
    """The case as one line of JSON, without its end."""
    raw = {name: value for name, value in vars(case).items() if name not in without}
    return json.dumps(raw, allow_nan=False, default=_plain).encode()


_FILE = re.compile(rb'"file": ("(?:[^"\\]|\\.)*")')


class Cases(Sequence[Case]):
    """The cases of an index. They are kept as the index's bytes, 1 KB each, shared by all views and
    by forked workers, and cheap to send to spawned ones; a `Case` is built when it is asked for.
    """

    def __init__(
        self, index: bytes, starts: Int64[np.ndarray, "n"], stops: Int64[np.ndarray, "n"], name: str
    ):
        self._index, self._starts, self._stops = index, starts, stops
        self._name = name  # of the index, for messages

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, item: int) -> Case: ...
    @overload
    def __getitem__(self, item: slice) -> "Cases": ...
    def __getitem__(self, item):
        if isinstance(item, slice):
            return self.take(np.arange(len(self))[item])
        try:
            return case_from(json.loads(self._index[self._starts[item] : self._stops[item]]))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._name}: entry {item} is no case ({error}); make the store again with "
                f"`sparsemae preprocess SRC -o STORE --overwrite`"
            ) from None

    def take(self, items: Int64[np.ndarray, "m"]) -> "Cases":
        """A view of some, in the order given."""
        return Cases(self._index, self._starts[items], self._stops[items], self._name)

    def where(self, key: str, value: str) -> "Cases":
        """A view of those whose `key` is this text, found without parsing the others."""
        # quotes inside a JSON string are escaped, so this text is nowhere but at the key
        text = f"{json.dumps(key)}: {json.dumps(value)}".encode()
        found = [self._index.find(text, start, stop) >= 0 for start, stop in self._lines()]
        return self.take(np.flatnonzero(found))

    def file_names(self) -> list[str]:
        """All files of the cases, relative to the store, found without parsing the rest."""
        found = (_FILE.findall(self._index, start, stop) for start, stop in self._lines())
        return [json.loads(name) for names in found for name in names]

    def _lines(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts.tolist(), self._stops.tolist(), strict=True)


def tuples(value: Any) -> Any:
    """JSON's lists as tuples, so that a case read back equals the case written."""
    return tuple(tuples(v) for v in value) if isinstance(value, list) else value


def _plain(value: Any) -> Any:
    """A file's record as an object, numpy's numbers as Python's."""
    return vars(value) if isinstance(value, StoredFile) else value.item()
