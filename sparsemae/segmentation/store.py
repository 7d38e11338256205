"""Prepared cases of a labelled data set on disk, made once for a plan and shared by its runs.

`STORE/images/<id>-<stamp>_0000.b2nd` is a channel, `labels/<id>-<stamp>.b2nd` the classes, and
`locations/<id>-<stamp>.b2nd` some voxels of each class. The stamp is of the files it was made of: a
case that has changed gets new names, so a run that reads the old ones goes on. `STORE/index.json`
says which count, and every chunk read is checked against its CRC-32 in it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32, Shaped

from sparsemae.data.storing.frame import read_array, write_array
from sparsemae.data.storing.stored import StoredFile, tuples
from sparsemae.errors import UserError
from sparsemae.files import sealed, sync_folder, write_atomically
from sparsemae.segmentation.prepare import PreparedCase
from sparsemae.triples import Triple

FORMAT, VERSION, INDEX = "sparsemae-labelled-store", 1, "index.json"
_LARGEST_HALF = 60000.0  # above it voxels are stored as float32
IMAGES, LABELS, LOCATIONS = "images", "labels", "locations"


@dataclass(frozen=True)
class StoredCase:
    """One prepared case."""

    id: str
    shape: Triple  # voxels of the prepared case
    spacing: tuple[float, float, float]  # mm
    affine: tuple[tuple[float, ...], ...]  # [4, 4], voxel to world mm, RAS
    images: tuple[StoredFile, ...]  # of each channel
    labels: StoredFile
    locations: StoredFile | None  # None: background alone
    counts: tuple[int, ...]  # locations of class 1, 2, ..., and with an ignored label of any
    stamp: str  # of the files it was made of

    @property
    def files(self) -> tuple[StoredFile, ...]:
        """All of it on disk."""
        some = () if self.locations is None else (self.locations,)
        return (*self.images, self.labels, *some)


@dataclass(frozen=True, eq=False)
class LabelledStore:
    """An opened store; it holds no file open, so it goes to loader workers as it is."""

    path: Path
    cases: tuple[StoredCase, ...]  # in the order of their ids
    made: dict[str, Any]  # by what: the plan's part that decides the voxels, and the classes
    fingerprint: str  # equal for equal data

    @classmethod
    def open(cls, path: Path) -> "LabelledStore":
        """Read the index; `UserError` if it is missing or damaged."""
        try:
            raw = json.loads((path / INDEX).read_text())
            if raw["format"] != FORMAT or raw["version"] != VERSION or sealed(raw) != raw:
                raise ValueError
            cases = tuple(_case(entry) for entry in raw["cases"])
            return cls(path, cases, raw["made"], _fingerprint(cases, raw["made"]))
        except OSError as error:
            raise UserError(f"{path / INDEX}: {error.strerror}; {_remedy(path)}") from None
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path / INDEX}: damaged index; {_remedy(path)}") from None

    def __len__(self) -> int:
        return len(self.cases)

    def only(self, ids: Sequence[str]) -> "LabelledStore":
        """A view of some cases; `UserError` if one is not there."""
        known = {case.id: case for case in self.cases}
        if missing := [name for name in ids if name not in known]:
            raise UserError(f"{self.path}: case {missing[0]} is not in it; {_remedy(self.path)}")
        cases = tuple(known[name] for name in sorted(ids))
        return LabelledStore(self.path, cases, self.made, _fingerprint(cases, self.made))

    def read_image(
        self, case: StoredCase, start: Sequence[int], stop: Sequence[int]
    ) -> Float[np.ndarray, "C d h w"]:
        """Voxels start <= i < stop of all channels."""
        return np.concatenate([self._read(file, start, stop) for file in case.images])

    def read_labels(
        self, case: StoredCase, start: Sequence[int], stop: Sequence[int]
    ) -> Int[np.ndarray, "d h w"]:
        """The classes of the voxels start <= i < stop."""
        return self._read(case.labels, start, stop)[0]

    def location(self, case: StoredCase, number: int, which: int) -> Int32[np.ndarray, "3"]:
        """Voxel `which` of those kept of class `number`, from 1; see `find_locations`."""
        row = sum(case.counts[: number - 1]) + which
        return self._read(case.locations, (row, 0, 0), (row + 1, 3, 1))[0, 0, :, 0]

    def _read(
        self, file: StoredFile, start: Sequence[int], stop: Sequence[int]
    ) -> Shaped[np.ndarray, "1 d h w"]:
        again = "remove it and run `sparsemae finetune` again, which makes it anew"
        return read_array(self.path, file, start, stop, remedy=again)


def write_case(
    store: Path,
    name: str,
    case: PreparedCase,
    locations: tuple[Int32[np.ndarray, "n 3"], tuple[int, ...]],
    *,
    spacing: tuple[float, float, float],
    stamp: str,
) -> StoredCase:
    """Compress a case into the store; it belongs to it once an index names it."""
    voxels, counts = locations
    name_on_disk = f"{name}-{hashlib.sha256(stamp.encode()).hexdigest()[:8]}"
    dtype = np.float16 if np.abs(case.array).max() < _LARGEST_HALF else np.float32
    images = tuple(
        write_array(store, f"{IMAGES}/{name_on_disk}_{i:04}.b2nd", channel[None].astype(dtype))
        for i, channel in enumerate(case.array)
    )
    small = np.uint8 if case.labels.max(initial=0) < 256 else np.uint16
    labels = write_array(store, f"{LABELS}/{name_on_disk}.b2nd", case.labels[None].astype(small))
    where = None
    if len(voxels):
        where = write_array(store, f"{LOCATIONS}/{name_on_disk}.b2nd", voxels[None, ..., None])
    return StoredCase(
        id=name,
        shape=case.labels.shape,
        spacing=spacing,
        affine=tuple(map(tuple, case.affine.tolist())),
        images=images,
        labels=labels,
        locations=where,
        counts=counts,
        stamp=stamp,
    )


def write_index(store: Path, cases: Sequence[StoredCase], made: dict[str, Any]) -> None:
    """Make the folder a store of these cases; once this returns, it survives a power failure."""
    for folder in {(store / file.file).parent for case in cases for file in case.files}:
        sync_folder(folder)
    ordered = sorted(cases, key=lambda case: case.id)
    raw = {
        "format": FORMAT,
        "version": VERSION,
        "made": made,
        "cases": [asdict(case) for case in ordered],
    }
    raw = json.loads(json.dumps(raw))
    text = json.dumps(sealed(raw), indent=1)
    write_atomically(store / INDEX, text.encode())


def is_there(store: Path, case: StoredCase) -> bool:
    """Whether all files of the case have the size they were written with."""
    try:
        return all((store / file.file).stat().st_size == file.bytes for file in case.files)
    except OSError:
        return False


def _case(raw: dict[str, Any]) -> StoredCase:
    def stored(value):
        return None if value is None else StoredFile(**value)

    fields = {key: tuples(value) for key, value in raw.items()}
    fields["images"] = tuple(stored(value) for value in raw["images"])
    fields |= {key: stored(raw[key]) for key in ("labels", "locations")}
    return StoredCase(**fields)


def _fingerprint(cases: Sequence[StoredCase], made: dict[str, Any]) -> str:
    """Of the data: names of files and their times are no part of it."""
    digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode())
    for case in cases:
        facts = [case.id, case.shape, case.spacing, case.affine, case.counts]
        digest.update(json.dumps([*facts, [file.crcs for file in case.files]]).encode())
    return digest.hexdigest()


def _remedy(path: Path) -> str:
    return f"remove {path} and run `sparsemae finetune` again, which makes it anew"
