"""The store: preprocessed volumes on disk, one compressed file per case and one index.

`STORE/cases/<id>.b2nd` is a blosc2 array [1, D, H, W] float32, channel first as nnU-Net keeps it.
`STORE/index.json` is written last and atomically and is the only list of what the store holds.
blosc2 detects no bit rot, so the index keeps a CRC-32 of every file; whole reads check it.
"""

import dataclasses
import hashlib
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from jaxtyping import Float32

from sparsemae.errors import UserError
from sparsemae.files import write_atomically

FORMAT = "sparsemae-store"
VERSION = 1
INDEX = "index.json"
CASES = "cases"
# A random crop decompresses blocks, not chunks: 16^3 read 96^3 in 1.4 ms, 32^3 too, whole rows 2.7.
CHUNK, BLOCK = 64, 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """One volume of a store and where it came from. Lengths in voxels, spacing in mm."""

    id: str
    file: str  # relative to the store
    shape: tuple[int, int, int]  # D, H, W
    spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...]  # [4, 4], voxel to world mm, RAS
    background: float  # the stored value of raw intensity 0
    mean: float  # raw intensity = stored value * std + mean
    std: float
    crop_start: tuple[int, int, int]  # box in the source's grid after reorientation to RAS
    crop_stop: tuple[int, int, int]
    source: str  # absolute path
    source_shape: tuple[int, int, int]  # after reorientation to RAS
    source_affine: tuple[tuple[float, ...], ...]
    bytes: int
    crc32: int


class StoreWriter:
    """Collects the cases of a new store; the store exists once `commit` has returned.

    An existing store is refused unless `overwrite`, which removes its index and cases at once.
    """

    def __init__(
        self, path: Path, *, spacing: tuple[float, float, float] | None, overwrite: bool = False
    ):
        self.path = Path(path)
        self.spacing = spacing  # mm, None: each case keeps its own
        self.cases: list[Case] = []
        index, folder = self.path / INDEX, self.path / CASES
        try:
            if index.exists() and not overwrite:
                raise UserError(
                    f"{self.path}: a store is already there; choose another -o or add --overwrite"
                )
            if self.path.is_dir() and any(self.path.iterdir()) and not folder.is_dir():
                raise UserError(
                    f"{self.path}: the folder holds other files; choose a new folder with -o"
                )
            index.unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            for pattern in ("*.b2nd", "*.tmp"):  # left by an older or interrupted run
                for file in folder.glob(pattern):
                    file.unlink()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write there ({error.strerror}); choose another -o"
            ) from None

    def add(self, case: Case) -> None:
        """Take a case whose file `write_array` has already put in place."""
        self.cases.append(case)

    def commit(self) -> "Store":
        """Write the index and open the store."""
        index = {
            "format": FORMAT,
            "version": VERSION,
            "spacing": self.spacing,
            "cases": [dataclasses.asdict(c) for c in sorted(self.cases, key=lambda c: c.id)],
        }
        write_atomically(self.path / INDEX, (json.dumps(index, indent=1) + "\n").encode())
        return Store.open(self.path)


@dataclass(frozen=True)
class Store:
    """An opened store; holds the index only, so it is cheap to hand to loader workers."""

    path: Path
    spacing: tuple[float, float, float] | None
    cases: tuple[Case, ...]
    fingerprint: str  # sha256 of the index without paths: equal data, equal fingerprint

    @classmethod
    def open(cls, path: Path | str) -> "Store":
        """Read the index and check that every file is there in full; `UserError` otherwise."""
        path = Path(path)
        remedy = f"make it with `sparsemae preprocess SRC -o {path}`"
        try:
            index = json.loads((path / INDEX).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{path}: no store there; {remedy}") from None
        except OSError as error:
            raise UserError(f"{path / INDEX}: {error.strerror}; check permissions") from None
        except ValueError:
            raise UserError(f"{path / INDEX}: damaged index; {remedy} --overwrite") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise UserError(f"{path / INDEX}: not the index of a sparsemae store; {remedy}")
        if index.get("version") != VERSION:
            raise UserError(
                f"{path / INDEX}: store version {index.get('version')}, this program reads "
                f"{VERSION}; {remedy} --overwrite"
            )
        try:
            spacing = _tuples(index["spacing"])
            cases = tuple(Case(**{k: _tuples(v) for k, v in c.items()}) for c in index["cases"])
            sizes = [(case.bytes, path / case.file) for case in cases]
        except (KeyError, TypeError, AttributeError):
            raise UserError(f"{path / INDEX}: damaged index; {remedy} --overwrite") from None
        if not cases:
            raise UserError(f"{path}: the store has no cases; {remedy} --overwrite")
        for size, file in sizes:
            if not file.is_file() or file.stat().st_size != size:
                raise UserError(f"{file}: missing or cut short; {remedy} --overwrite")
        return cls(path, spacing, cases, _fingerprint(index))

    def __len__(self) -> int:
        return len(self.cases)

    def read(self, case: Case) -> Float32[np.ndarray, "1 D H W"]:
        """The whole volume, after checking its CRC; `UserError` if the file changed."""
        data = (self.path / case.file).read_bytes()
        if len(data) != case.bytes or zlib.crc32(data) != case.crc32:
            raise UserError(
                f"{self.path / case.file}: the file is damaged; "
                f"make the store again with `sparsemae preprocess SRC -o {self.path} --overwrite`"
            )
        return blosc2.ndarray_from_cframe(data)[...]

    def read_box(
        self, case: Case, start: tuple[int, int, int], stop: tuple[int, int, int]
    ) -> Float32[np.ndarray, "1 d h w"]:
        """Voxels start <= i < stop of each axis, reading only the blocks that hold them.

        The CRC covers the whole file and is not checked here. ValueError if the box is empty or
        leaves the volume.
        """
        if not all(0 <= a < b <= n for a, b, n in zip(start, stop, case.shape, strict=True)):
            raise ValueError(f"case {case.id}: box {start}-{stop} is not inside {case.shape}")
        # One thread: parallelism comes from the loader's workers, and blosc2's pool dies in a fork.
        array = blosc2.open(
            str(self.path / case.file), mode="r", mmap_mode="r", dparams={"nthreads": 1}
        )
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        return array[(slice(0, 1), *box)]


def write_array(
    path: Path, case_id: str, array: Float32[np.ndarray, "1 D H W"]
) -> tuple[str, int, int]:
    """Compress `array` into the store at `path`; (file relative to the store, bytes, crc32).

    Safe to call from several processes for different cases.
    """
    size = array.shape[1:]
    data = blosc2.asarray(
        np.ascontiguousarray(array, dtype=np.float32),
        chunks=(1, *(min(CHUNK, n) for n in size)),
        blocks=(1, *(min(BLOCK, n) for n in size)),
        cparams={"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1},
    ).to_cframe()
    file = f"{CASES}/{case_id}.b2nd"
    write_atomically(path / file, data)
    return file, len(data), zlib.crc32(data)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, so that a case read back equals the case written."""
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _fingerprint(index: dict) -> str:
    cases = [{k: v for k, v in case.items() if k != "source"} for case in index["cases"]]
    text = json.dumps({**index, "cases": cases}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
