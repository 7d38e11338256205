"""Resampling of labelled volumes by nnU-Net's rules: cubic images, linear votes of classes.

Along the one axis of thick slices, where voxels are over three times as long as along the others,
neither interpolates: the nearest slice is taken. Source: nnunetv2 2.8.1 `resample_data_or_seg`.
"""

from dataclasses import replace

import numpy as np
from jaxtyping import Float, Float32, Int32, Shaped
from scipy import ndimage

from sparsemae.data.preparing.resample import EQUAL, Grid, resample
from sparsemae.triples import FloatTriple

ANISOTROPIC = 3.0  # times the smallest voxel size


def thick_axis(old: FloatTriple, new: FloatTriple) -> int | None:
    """The axis that is not interpolated between voxels of `old` and `new` mm; None if all are.

    It is that of the thickest slices of `old`, or else of `new`; with two axes as thick there is
    none.
    """
    for spacing in (old, new):
        if max(spacing) / min(spacing) > ANISOTROPIC:
            thick = [a for a, size in enumerate(spacing) if size > (1 - EQUAL) * max(spacing)]
            return thick[0] if len(thick) == 1 else None
    return None


def resample_image(
    array: Float32[np.ndarray, "D H W"], grid: Grid, thick: int | None
) -> Float32[np.ndarray, "d h w"]:
    """The cubic spline through the voxels at the positions of `grid`; slices are taken whole."""
    array, grid = _slices(array, grid, thick)
    return resample(array, grid)


def resample_labels(
    labels: Int32[np.ndarray, "D H W"], grid: Grid, thick: int | None
) -> Int32[np.ndarray, "d h w"]:
    """The class with the largest share at the positions of `grid`; of equal ones the higher.

    Shares are linear between voxels, and each class is looked at inside its own box only.
    """
    labels, grid = _slices(labels, grid, thick)
    if all(step == 1.0 for step in grid.step):
        return labels
    out = np.zeros(grid.shape, labels.dtype)
    best = np.zeros(grid.shape, np.float32)
    boxes = ndimage.find_objects(labels + 1)  # of class 0 too
    for number, box in enumerate(boxes):
        if box is None:
            continue
        mask, corner = _with_border(labels == number, box)
        share, place = _linear(mask, corner, grid)
        here, most = out[place], best[place]
        wins = (share >= most) & (share > 0)
        here[wins] = number
        most[wins] = share[wins]
    return out


def _slices(
    array: Shaped[np.ndarray, "D H W"], grid: Grid, thick: int | None
) -> tuple[Shaped[np.ndarray, "d H W"], Grid]:
    """The slices of the thick axis that are nearest, and the grid of what is left to do."""
    if thick is None or grid.step[thick] == 1.0:
        return array, grid
    positions = grid.origin[thick] + grid.step[thick] * np.arange(grid.shape[thick])
    nearest = np.floor(positions + 0.5).astype(int).clip(0, array.shape[thick] - 1)
    step = tuple(1.0 if a == thick else s for a, s in enumerate(grid.step))
    origin = tuple(0.0 if a == thick else o for a, o in enumerate(grid.origin))
    return array.take(nearest, axis=thick), replace(grid, step=step, origin=origin)


def _with_border(mask, box) -> tuple[Float32[np.ndarray, "d h w"], list[int]]:
    """The mask in its box and one voxel around, as far as there is any."""
    start = [max(0, s.start - 1) for s in box]
    stop = [min(n, s.stop + 1) for s, n in zip(box, mask.shape, strict=True)]
    return mask[tuple(map(slice, start, stop))].astype(np.float32), start


def _linear(
    part: Float32[np.ndarray, "d h w"], corner: list[int], grid: Grid
) -> tuple[Float32[np.ndarray, "e f g"], tuple[slice, ...]]:
    """`part`, which lies at `corner`, at the positions of `grid` inside it, and where those are."""
    place = []
    for axis in range(3):
        positions = grid.origin[axis] + grid.step[axis] * np.arange(grid.shape[axis])
        if grid.step[axis] == 1.0:
            place.append(slice(corner[axis], corner[axis] + part.shape[axis]))
            continue
        # beyond the volume the outermost voxel goes on
        local = positions - corner[axis]
        last = part.shape[axis] - 1
        inside = np.flatnonzero((local > -1) & (local < last + 1))
        place.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0))
        part = take_linear(part, axis, local[inside])
    return part, tuple(place)


def take_linear(
    array: Float32[np.ndarray, "..."], axis: int, positions: Float[np.ndarray, "n"]
) -> Float32[np.ndarray, "..."]:
    """`array` between its voxels along an axis; beyond its ends the last voxel."""
    last = array.shape[axis] - 1
    positions = np.clip(positions, 0, last)
    low = np.minimum(np.floor(positions).astype(int), max(last - 1, 0))
    high = np.minimum(low + 1, last)
    weight = (positions - low).astype(np.float32)
    weight = weight.reshape([-1 if a == axis else 1 for a in range(array.ndim)])
    below = array.take(low, axis=axis)
    return below + weight * (array.take(high, axis=axis) - below)
