"""Where the voxels that a network saw lie in the volume that was read, and the way back."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int64

from sparsemae.data.preparing.resample import Grid, resampled_grid
from sparsemae.data.reading.geometry import voxel_sizes
from sparsemae.segmentation.resampling import thick_axis
from sparsemae.triples import Triple


@dataclass(frozen=True)
class Taps:
    """Voxel i of an axis lies between two planes: (1 - weight[i]) * low[i] + weight[i] * high[i].

    Low and high never fall.
    """

    low: Int64[np.ndarray, "n"]
    high: Int64[np.ndarray, "n"]
    weight: Float32[np.ndarray, "n"]


@dataclass(frozen=True)
class Placement:
    """The way of a volume to the grid of a plan: cropped, then resampled."""

    shape: Triple  # of the volume as read, RAS
    start: Triple  # of the crop, voxels of that volume
    stop: Triple
    grid: Grid  # the plan's voxels in voxels of the crop
    thick: int | None = None  # the axis along which the nearest slice is taken

    def __post_init__(self):
        if not all(
            0 <= a < b <= n for a, b, n in zip(self.start, self.stop, self.shape, strict=True)
        ):
            raise ValueError(f"no crop {self.start} to {self.stop} in a volume of {self.shape}")

    @property
    def crop(self) -> Triple:
        """The shape of the crop, in voxels as read."""
        return tuple(b - a for a, b in zip(self.start, self.stop, strict=True))

    def taps(self, axis: int) -> Taps:
        """The planes of the plan's grid that give those of the crop; beyond its ends the last."""
        last = self.grid.shape[axis] - 1
        positions = (np.arange(self.crop[axis]) - self.grid.origin[axis]) / self.grid.step[axis]
        positions = positions.clip(0, last)
        if axis == self.thick:
            positions = np.floor(positions + 0.5).clip(0, last)
        low = np.floor(positions).astype(np.int64)
        return Taps(low, np.minimum(low + 1, last), (positions - low).astype(np.float32))


def place(
    shape: Triple,
    affine: Float[np.ndarray, "4 4"],
    crop: tuple[Triple, Triple],
    spacing: tuple[float, float, float],
) -> Placement:
    """The placement of a volume that is cropped to the box `crop` and resampled to `spacing` mm.

    Args:
        shape, affine: Of the volume as read, RAS.
        crop: First voxel, and the one after the last.

    Raises:
        ValueError: The box does not lie in the volume.
    """
    start, stop = crop
    size = tuple(b - a for a, b in zip(start, stop, strict=True))
    grid = resampled_grid(size, affine, spacing)
    # nnU-Net asks the voxels it comes from first, here the plan's
    return Placement(shape, start, stop, grid, thick_axis(spacing, voxel_sizes(affine)))
