"""Samples of labelled cases as the loader's workers read them; `patches.assemble` makes patches.

Where a sample lies and how it is varied follows from the seed and its number in the run alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float32, Int

from sparsemae.data.loading.affine import AugmentConfig, Draw, draw, needed_box
from sparsemae.data.loading.order import case_of, generator_of
from sparsemae.data.loading.samples import begin_range, case_named, cut_out
from sparsemae.segmentation.intensity import IntensityDraw, draw_intensity
from sparsemae.segmentation.library import LibraryAugmentation, slice_axis
from sparsemae.segmentation.store import LabelledStore, StoredCase
from sparsemae.triples import Triple

Vary = Literal["plain", "batchgenerators", "none"]
PLAIN, LIBRARY = "plain", "batchgenerators"


@dataclass(frozen=True)
class LabelledSample:
    """A box of a case that becomes a patch. Its arrays may also be tensors, on any device."""

    case: str
    voxels: Float[np.ndarray, "C d h w"]
    labels: Int[np.ndarray, "d h w"]
    corner: Triple  # where the box lies in a patch that is not resampled, before it is mirrored
    flips: tuple[bool, bool, bool]
    grid: Float32[np.ndarray, "3 D+H+W"] | None  # None: not resampled; else see `grid_tables`
    intensity: IntensityDraw | None = None  # what is done to the finished patch

    def map(self, move: Callable[[Any], Any]) -> "LabelledSample":
        """The sample with `move` applied to each of its arrays."""
        arrays = {name: getattr(self, name) for name in ("voxels", "labels", "grid")}
        return replace(self, **{k: move(v) for k, v in arrays.items() if v is not None})


class LabelledReader:
    """`reader(i)` is sample i of a run, the same in whatever process and order.

    Args:
        batch_size: Of all ranks together. In every batch the last samples, `foreground` of them
            rounded to at least one, are sure to show a class, drawn among those the case has.
        masked: Of each channel whether its voxels of exactly 0 show nothing.
        vary: "plain": geometry as `augment` says, and intensities on the device. "batchgenerators":
            all of it by that library, here. "none": nothing.
    """

    def __init__(
        self,
        store: LabelledStore,
        patch_size: Triple,
        batch_size: int,
        *,
        seed: int,
        augment: AugmentConfig,
        masked: Sequence[bool],
        vary: Vary,
        foreground: float,
    ):
        self.store, self.patch_size, self.batch_size = store, patch_size, batch_size
        self.seed, self.augment, self.masked, self.vary = seed, augment, tuple(masked), vary
        self.library = LibraryAugmentation(patch_size, augment, masked) if vary == LIBRARY else None
        # as nnU-Net: of two patches the second, with a share of 0.33
        self.anywhere = round(batch_size * (1 - foreground))
        if foreground > 0:
            self.anywhere = min(self.anywhere, batch_size - 1)
        self.slices = slice_axis(patch_size)
        self.ignores = store.made["ignore"] is not None

    def case_of(self, sample: int) -> StoredCase:
        """The case that a sample shows; every case once per epoch of as many samples as cases."""
        return self.store.cases[case_of(sample, len(self.store), self.seed)]

    def __call__(self, sample: int) -> LabelledSample:
        """Read sample `sample` >= 0.

        Raises:
            UserError: The case's file is damaged or gone.
            LoaderError: Anything else, with the name of the case.
        """
        case = self.case_of(sample)
        with case_named(case.id):
            return self._read(case, sample)

    def begin(self, case: StoredCase, sample: int, random: Float[np.ndarray, "5"]) -> np.ndarray:
        """The case's voxel that is the patch's first; negative where the case is smaller."""
        least, most = begin_range(case.shape, self.patch_size)
        sure, known = sample % self.batch_size >= self.anywhere, self.ignores
        there = np.flatnonzero(case.counts[: len(case.counts) - known])
        if (sure and len(there)) or (known and case.counts[-1]):
            number = len(case.counts) - 1  # of any class
            if sure and len(there):
                number = int(there[int(random[3] * len(there))])
            which = int(random[4] * case.counts[number])
            voxel = self.store.location(case, number + 1, which)
            return np.clip(voxel - np.floor_divide(self.patch_size, 2), least, most)
        return least + np.floor(random[:3] * (most - least + 1)).astype(int)

    def _read(self, case: StoredCase, sample: int) -> LabelledSample:
        rng = generator_of(sample, len(self.store), self.seed)
        begin = self.begin(case, sample, rng.random(5))
        if self.library is not None:
            return self._read_for_library(case, begin, int(rng.integers(2**32)))
        transform = Draw((False,) * 3, None)
        if self.vary == PLAIN:
            transform = draw(rng, self.augment, case.spacing, slices=self.slices)
        cut = cut_out(begin, self.patch_size, transform, case.shape)
        return LabelledSample(
            case=case.id,
            voxels=self.store.read_image(case, cut.start, cut.stop),
            labels=self.store.read_labels(case, cut.start, cut.stop),
            corner=cut.corner,
            flips=transform.flips,
            grid=cut.grid,
            intensity=draw_intensity(rng, self.masked) if self.vary == PLAIN else None,
        )

    def _read_for_library(
        self, case: StoredCase, begin: Int[np.ndarray, "3"], seed: int
    ) -> LabelledSample:
        """A patch that is finished but for its way to the device."""
        size = self.library.needed
        begin = begin - np.subtract(size, self.patch_size) // 2
        start, stop, _ = needed_box(begin, size, None, case.shape)
        corner, end = np.subtract(start, begin), np.subtract(stop, begin)
        place = (slice(None), *map(slice, corner, end))
        image = np.zeros((len(case.images), *size), np.float32)
        labels = np.full((1, *size), -1, np.int16)  # beyond the case
        image[place] = self.store.read_image(case, start, stop)
        labels[place] = self.store.read_labels(case, start, stop)
        image, labels = self.library(image, labels, seed)
        return LabelledSample(case.id, image, labels, (0, 0, 0), (False,) * 3, None)
