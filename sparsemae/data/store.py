"""The store: preprocessed volumes on disk, one compressed file per case and one index.

`STORE/cases/<id>.b2nd` is a blosc2 array [1, D, H, W], channel first as nnU-Net keeps it;
`STORE/excluded/<id>.b2nd` a mask of the same shape, where a case has one. `STORE/index.json` is
written last. Every chunk read is checked against its CRC-32 in the index.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Shaped

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.storing.blocks import decode_blocks, encode_blocks
from sparsemae.data.storing.frame import check_array, read_array, write_array
from sparsemae.data.storing.index import INDEX, read_index, write_index
from sparsemae.data.storing.stored import Case, Cases, StoredFile, case_from
from sparsemae.errors import UserError

__all__ = [
    "CASES", "EXCLUDED", "INDEX", "Case", "Cases", "Store", "StoredFile", "case_from",
    "decode_blocks", "encode_blocks", "verify", "write_image", "write_index", "write_mask",
]  # fmt: skip

CASES, EXCLUDED = "cases", "excluded"


@dataclass(frozen=True, eq=False)
class Store:
    """An opened store. It holds no file open, so it goes to loader workers as it is."""

    path: Path
    config: PreprocessConfig  # how the volumes were made
    cases: Cases
    fingerprint: str  # of all cases, without their places: equal data, equal fingerprint

    @classmethod
    def open(cls, path: Path | str, *, complete: bool = True) -> "Store":
        """Read the index and look that every file is there; `UserError` otherwise.

        `complete` False leaves out the look for the files, to mend a store.
        """
        path = Path(path)
        index = read_index(path)
        if complete:
            _require_files(path, index.cases)
        return cls(path, index.config, index.cases, index.fingerprint)

    def __len__(self) -> int:
        return len(self.cases)

    def split(self, name: Literal["train", "val"]) -> "Store":
        """The store with the cases of one side only; it may have none."""
        return replace(self, cases=self.cases.where("split", name))

    def read(self, case: Case) -> Float[np.ndarray, "1 D H W"]:
        """The whole volume in the store's dtype; `UserError` if its file is damaged."""
        return read_array(self.path, case.image, (0, 0, 0), case.shape)

    def read_box(
        self,
        case: Case,
        start: Sequence[int],
        stop: Sequence[int],
        kind: Literal["image", "excluded"] = "image",
    ) -> Shaped[np.ndarray, "1 d h w"]:
        """Voxels start <= i < stop of each axis: float16 or float32, bool if `kind` is "excluded".

        Only the chunks that hold them are read and checked. A case without a mask excludes nothing.

        Raises:
            ValueError: The box is empty or leaves the volume.
            UserError: The file is missing or damaged.
        """
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, case.shape, strict=True)):
            raise ValueError(f"case {case.id}: box {start}-{stop} is not inside {case.shape}")
        if kind == "image":
            return read_array(self.path, case.image, start, stop)
        if case.excluded is None:
            return np.zeros((1, *np.subtract(stop, start)), bool)
        return read_array(self.path, case.excluded, start, stop).view(bool)

    def verify(self, case: Case) -> None:
        """Read the case's files whole and compare all CRCs; `UserError` names what is damaged."""
        for stored in case.files:
            check_array(self.path, stored)


def verify(path: Path | str, case: Case) -> bool:
    """Whether all files of the case are in the store at `path`, exactly as they were written."""
    try:
        for stored in case.files:
            check_array(Path(path), stored)
    except UserError:
        return False
    return True


def write_image(
    path: Path | str,
    case_id: str,
    array: Float[np.ndarray, "1 D H W"],
    dtype: Literal["float16", "float32"] = "float16",
) -> StoredFile:
    """Compress a volume into the store at `path`; safe from several processes at once.

    Raises:
        ValueError: A value is not finite, or too large for `dtype`.
        OSError: It cannot be written; nothing is left behind.
    """
    with np.errstate(over="ignore"):
        voxels = np.asarray(array, dtype=dtype)
    if not np.isfinite(voxels).all():
        largest = np.abs(array).max()
        raise ValueError(f"case {case_id}: the value {largest:g} cannot be stored as {dtype}")
    return write_array(Path(path), f"{CASES}/{case_id}.b2nd", voxels)


def write_mask(path: Path | str, case_id: str, mask: Bool[np.ndarray, "1 D H W"]) -> StoredFile:
    """Compress the mask of excluded voxels of a case; as `write_image`."""
    return write_array(Path(path), f"{EXCLUDED}/{case_id}.b2nd", mask.astype(np.uint8))


def _require_files(path: Path, cases: Cases) -> None:
    """Compare the names in the index with one listing per folder: a look at each file would take
    minutes on a network file system. Sizes and contents are checked when a file is read."""
    there = {f"{folder}/{name}" for folder in (CASES, EXCLUDED) for name in _listing(path / folder)}
    if missing := [name for name in cases.file_names() if name not in there]:
        others = f" and {len(missing) - 1} other files" if len(missing) > 1 else ""
        raise UserError(
            f"{path / missing[0]}{others}: missing; "
            f"`sparsemae preprocess SRC -o {path}` makes the missing cases again"
        )


def _listing(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; check the disk and its permissions") from None
