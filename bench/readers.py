"""The same volumes in the forms that are compared, and how a loader's worker reads a box of each.

`Nifti` is the file users have, read through nibabel. `NnUNet` is what nnU-Net 2.8.1 preprocesses
to: float32 in blosc2, chunks for the patch size it trains with. Where nnunetv2 is installed its own
class writes and reads; elsewhere the same calls do.
"""

import math
import os
import pickle
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import blosc2
import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32

from sparsemae.data.store import Store
from sparsemae.files import sync_folder

Box = tuple[slice, slice, slice]


class Reader(Protocol):
    """One form of some volumes."""

    name: str

    def files(self, case: int) -> list[Path]:
        """What is read of a case."""

    def read(self, case: int, box: Box) -> Float[np.ndarray, "d h w"]:
        """Voxels of a box; opens the file, as a worker that goes through a large data set does."""

    def allowed(self, case: int) -> float:
        """How far voxels may be from those written: what the form rounds."""


class Stored:
    """A store of ours."""

    def __init__(self, store: Store):
        self.store, self.name = store, f"store {store.config.dtype}"

    def files(self, case: int) -> list[Path]:
        return [self.store.path / stored.file for stored in self.store.cases[case].files]

    def read(self, case: int, box: Box) -> Float[np.ndarray, "d h w"]:
        start, stop = zip(*((s.start, s.stop) for s in box), strict=True)
        return self.store.read_box(self.store.cases[case], start, stop)[0]

    def allowed(self, case: int) -> float:
        if self.store.config.dtype == "float32":
            return 0.0
        return np.abs(self.store.read(self.store.cases[case])).max() * 2.0**-11


class Nifti:
    """`.nii.gz` of int16 with a slope, as scanners give it; less to inflate than float32."""

    name = "nibabel .nii.gz"

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()

    def write(self, case: int, array: Float32[np.ndarray, "D H W"], affine) -> None:
        image = nib.Nifti1Image(array, affine)
        image.set_data_dtype(np.int16)
        image.to_filename(self._path(case))

    def files(self, case: int) -> list[Path]:
        return [self._path(case)]

    def read(self, case: int, box: Box) -> Float[np.ndarray, "d h w"]:
        return np.asarray(nib.load(self._path(case)).dataobj[box], np.float32)

    def allowed(self, case: int) -> float:
        return 0.51 * nib.load(self._path(case)).dataobj.slope

    def _path(self, case: int) -> Path:
        return self.folder / f"{case}.nii.gz"


class NnUNet:
    """A folder as nnU-Net preprocesses to; images and empty segmentations."""

    def __init__(self, folder: Path, patch: int):
        self.folder, self.patch = folder, patch
        folder.mkdir()
        self._theirs = _their_class()
        self._dataset = None
        self.name = "nnU-Net b2nd" if self._theirs else "nnU-Net b2nd (its calls)"

    def write(self, case: int, array: Float32[np.ndarray, "D H W"]) -> None:
        image, labels = array[None], np.zeros((1, *array.shape), np.int16)
        blocks, chunks = nnunet_layout(array.shape, (self.patch,) * 3, 4)
        label_blocks, label_chunks = nnunet_layout(array.shape, (self.patch,) * 3, 2)
        layout = (chunks, blocks, label_chunks, label_blocks)
        path = str(self.folder / str(case))
        if self._theirs:
            self._theirs.save_case(image, labels, {}, path, *layout)
            return
        for suffix, voxels, chunk, block in (
            (".b2nd", image, chunks, blocks),
            ("_seg.b2nd", labels, label_chunks, label_blocks),
        ):
            cparams = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 4}
            cparams["filters"] = [_smaller_filter(voxels, chunk, block, cparams)]
            blosc2.asarray(
                voxels, urlpath=path + suffix, chunks=chunk, blocks=block, cparams=cparams
            )
        Path(path + ".pkl").write_bytes(pickle.dumps({}))

    def files(self, case: int) -> list[Path]:
        return [self.folder / f"{case}{suffix}" for suffix in (".b2nd", "_seg.b2nd", ".pkl")]

    def read(self, case: int, box: Box) -> Float[np.ndarray, "d h w"]:
        return np.asarray(self._load_case(case)[(0, *box)])

    def allowed(self, case: int) -> float:
        return 0.0

    def _load_case(self, case: int) -> blosc2.NDArray:
        """What `nnUNetDatasetBlosc2.load_case` does for every sample."""
        if self._theirs:
            self._dataset = self._dataset or self._theirs(str(self.folder))
            return self._dataset.load_case(str(case))[0]
        image, _labels = (
            blosc2.open(str(path), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
            for path in self.files(case)[:2]
        )
        pickle.loads(self.files(case)[2].read_bytes())
        return image


def nnunet_layout(
    image: Sequence[int], patch: Sequence[int], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Blocks and chunks [1, D, H, W] that nnU-Net 2.8.1 chooses.

    Blocks are powers of two of at most 128 KiB, from the patch by halving what is largest beside
    the aim: 1.5 times the patch, within the image. Chunks grow by blocks where they are furthest
    from the aim, to at most 6 MiB.
    """
    aim = [min(n, p * 3 // 2) for n, p in zip(image, patch, strict=True)]
    block = [min(1 << (p - 1).bit_length(), n) for n, p in zip(image, patch, strict=True)]
    while math.prod(block) * itemsize > 2**17:
        axis = max((a for a in range(3) if block[a] > 1), key=lambda a: (block[a] / aim[a], a))
        block[axis] = 1 << ((block[axis] - 1).bit_length() - 1)
    chunk = list(block)
    while True:
        grown = [min(c + b, a) for c, b, a in zip(chunk, block, aim, strict=True)]
        rest = math.prod(chunk) * itemsize
        able = [
            a for a in range(3) if chunk[a] < aim[a] and rest // chunk[a] * grown[a] <= 6 * 2**20
        ]
        if not able:
            return (1, *block), (1, *chunk)
        axis = min(able, key=lambda a: (chunk[a] / aim[a], -image[a], a))
        chunk[axis] = grown[axis]


def write_all(
    store: Store, folder: Path, patches: Sequence[int]
) -> tuple[Nifti, dict[int, NnUNet]]:
    """The volumes of a float32 store in the other forms; nnU-Net's once per patch size."""
    nifti = Nifti(folder / "nifti")
    nnunet = {patch: NnUNet(folder / f"nnunet-{patch}", patch) for patch in patches}
    for i, case in enumerate(store.cases):
        array = store.read(case)[0]
        nifti.write(i, array, np.array(case.affine))
        for form in nnunet.values():
            form.write(i, array)
    for form in (nifti, *nnunet.values()):
        sync_files(path for i in range(len(store)) for path in form.files(i))
        sync_folder(form.folder)
    return nifti, nnunet


def sync_files(paths) -> None:
    """Force to disk: pages not written yet cannot be dropped from the cache."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _their_class():
    """nnU-Net's own class, or None without it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
        except ImportError:
            return None
    return nnUNetDatasetBlosc2


def _smaller_filter(voxels, chunk, block, cparams) -> blosc2.Filter:
    """None or byte shuffle, whichever makes a chunk in the middle smaller: nnU-Net's choice."""
    size = [min(c, n) for c, n in zip(chunk, voxels.shape, strict=True)]
    middle = tuple(
        slice((n - s) // 2, (n - s) // 2 + s) for n, s in zip(voxels.shape, size, strict=True)
    )
    blocks = [min(b, s) for b, s in zip(block, size, strict=True)]
    bytes_with = {}
    for name in (blosc2.Filter.NOFILTER, blosc2.Filter.SHUFFLE):
        trial = blosc2.asarray(
            np.ascontiguousarray(voxels[middle]),
            chunks=size,
            blocks=blocks,
            cparams=cparams | {"filters": [name]},
        )
        bytes_with[name] = trial.schunk.cbytes
    return min(bytes_with, key=bytes_with.get)
