"""Samples as the loader's workers read them: the voxels a patch needs, and what to do with them.

A patch that is not resampled is read voxel by voxel, nothing beside it; one that is rotated or
scaled as the least box its interpolation touches. `augment.assemble` makes patches of both.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from sparsemae.data.loading.affine import AugmentConfig, Draw, draw, needed_box
from sparsemae.data.loading.order import case_of, generator_of
from sparsemae.data.store import Case, Store, decode_blocks
from sparsemae.data.storing.blocks import BLOCK
from sparsemae.errors import LoaderError, UserError
from sparsemae.triples import Triple


@dataclass(frozen=True)
class Sample:
    """A box of a volume that becomes a patch. Its arrays may also be tensors, on any device."""

    case: str
    background: float  # where the patch reaches beyond the volume
    voxels: Float[np.ndarray, "d h w"]  # as stored: float16 or float32
    excluded: Bool[np.ndarray, "d h w"] | None  # None: no voxel of the box is
    corner: Triple  # where the box lies in a patch that is not resampled, before it is mirrored
    flips: tuple[bool, bool, bool]
    grid: Float32[np.ndarray, "3 D+H+W"] | None  # None: not resampled; else see `grid_tables`
    beyond: bool  # whether the patch reaches beyond the volume

    def map(self, move: Callable[[Any], Any]) -> "Sample":
        """The sample with `move` applied to each of its arrays."""
        arrays = {name: getattr(self, name) for name in ("voxels", "excluded", "grid")}
        return replace(self, **{k: move(v) for k, v in arrays.items() if v is not None})


@dataclass(frozen=True)
class RawBatch:
    """The samples of a step on one rank, not yet patches."""

    patch_size: Triple
    samples: tuple[Sample, ...]

    def map(self, move: Callable[[Any], Any]) -> "RawBatch":
        """The batch with `move` applied to each array of its samples."""
        return RawBatch(self.patch_size, tuple(sample.map(move) for sample in self.samples))


class SampleReader:
    """`reader(i)` is sample i of a run on `store`, the same in whatever process and order.

    Args:
        patch_size: Voxels of a patch. A volume smaller than that lies in the middle.
        augment: What is varied at random; None for nothing.
        foreground: Fraction of the samples whose patch has its centre in a block of foreground,
            where the case has one that is far enough from the edge; the others lie anywhere.
    """

    def __init__(
        self,
        store: Store,
        patch_size: Triple,
        *,
        seed: int,
        augment: AugmentConfig | None = None,
        foreground: float = 0.0,
    ):
        if len(patch_size) != 3 or min(patch_size) < 1:
            raise ValueError(f"patch_size {patch_size}: give three positive numbers of voxels")
        if seed < 0:
            raise ValueError(f"seed {seed}: give a number that is not negative")
        if not 0 <= foreground <= 1:
            raise ValueError(f"foreground {foreground}: give a fraction from 0 to 1")
        self.store, self.patch_size, self.seed = store, patch_size, seed
        self.augment, self.foreground = augment, foreground

    def case_of(self, sample: int) -> Case:
        """The case that a sample shows; every case once per epoch of `len(store.cases)` samples."""
        return self.store.cases[case_of(sample, len(self.store.cases), self.seed)]

    def __call__(self, sample: int) -> Sample:
        """Read sample `sample` >= 0.

        Raises:
            UserError: The case's file is damaged or gone.
            LoaderError: Anything else, with the name of the case.
        """
        case = self.case_of(sample)
        with case_named(case.id):
            return self._read(case, generator_of(sample, len(self.store.cases), self.seed))

    def _read(self, case: Case, rng: np.random.Generator) -> Sample:
        # where, then how: always the same numbers, so that no option changes the others' outcome
        begin = self._begin(case, rng.random(5))
        transform = Draw((False,) * 3, None)
        if self.augment is not None:
            transform = draw(rng, self.augment, case.spacing)
        cut = cut_out(begin, self.patch_size, transform, case.shape)
        return Sample(
            case=case.id,
            background=case.background,
            voxels=self.store.read_box(case, cut.start, cut.stop)[0],
            excluded=self._excluded(case, cut.start, cut.stop),
            corner=cut.corner,
            flips=transform.flips,
            grid=cut.grid,
            beyond=cut.beyond,
        )

    def _excluded(
        self, case: Case, start: Triple, stop: Triple
    ) -> Bool[np.ndarray, "d h w"] | None:
        if case.excluded is None:
            return None
        mask = self.store.read_box(case, start, stop, kind="excluded")[0]
        return mask if mask.any() else None

    def _begin(self, case: Case, random: Float[np.ndarray, "5"]) -> Int[np.ndarray, "3"]:
        """The volume's voxel that is the patch's first; negative where the volume is smaller."""
        least, most = begin_range(case.shape, self.patch_size)
        if random[3] < self.foreground and case.foreground:
            blocks = BLOCK * np.argwhere(decode_blocks(case.foreground, case.shape))
            half = np.floor_divide(self.patch_size, 2)
            low = np.maximum(blocks, least + half)  # [blocks, 3], where the centre may lie
            high = np.minimum(np.minimum(blocks + BLOCK, case.shape) - 1, most + half)
            able = np.flatnonzero((low <= high).all(1))
            if len(able):
                chosen = able[int(random[4] * len(able))]
                least, most = low[chosen] - half, high[chosen] - half
        return least + np.floor(random[:3] * (most - least + 1)).astype(int)


def begin_range(shape: Triple, patch_size: Triple) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest first voxel of a patch; of a smaller volume what centres it."""
    room = np.subtract(shape, patch_size)
    least = np.where(room < 0, -(-room // 2), 0)
    return least, np.where(room < 0, least, room)


class Cut(NamedTuple):
    """What of a volume a patch is made of, and how."""

    start: Triple
    stop: Triple
    corner: Triple  # as in `Sample`, like the others
    grid: Float32[np.ndarray, "3 D+H+W"] | None
    beyond: bool


def cut_out(begin: Int[np.ndarray, "3"], patch_size: Triple, transform: Draw, shape: Triple) -> Cut:
    """The box of a volume of `shape` for a patch that begins at `begin` until it is transformed."""
    matrix, grid = transform.matrix, None
    start, stop, beyond = needed_box(begin, patch_size, matrix, shape)
    corner = tuple(a - b for a, b in zip(start, begin.tolist(), strict=True))
    if matrix is not None:
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        grid = grid_tables(patch_size, matrix, corner, size)
    return Cut(start, stop, corner, grid, beyond)


@contextlib.contextmanager
def case_named(case: str) -> Iterator[None]:
    """Turn what nobody saw coming into a `LoaderError` with the name of the case."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise LoaderError(f"case {case}: {text}") from error


def grid_tables(
    patch_size: Triple, matrix: Float[np.ndarray, "3 3"], corner: Triple, size: Triple
) -> Float32[np.ndarray, "3 D+H+W"]:
    """Where a patch's voxels lie in a box of `size`, as grid_sample counts without aligned corners.

    For output voxel (d, h, w) the coordinate along W, H, D of the box is the sum of columns d,
    D + h and D + H + w of row 0, 1, 2. In tables of one axis each a volume of coordinates costs one
    addition per voxel, and they are exact: float64 until here.
    """
    centre = (np.asarray(patch_size) - 1) / 2
    per_axis = [
        np.outer(matrix[:, axis], np.arange(n) - centre[axis]) for axis, n in enumerate(patch_size)
    ]
    per_axis[0] += (centre - corner + 0.5)[:, None]
    scale = 2 / np.asarray(size, float)[:, None]
    tables = np.concatenate(per_axis, axis=1) * scale
    tables[:, : patch_size[0]] -= 1
    return np.ascontiguousarray(tables[::-1], dtype=np.float32)
