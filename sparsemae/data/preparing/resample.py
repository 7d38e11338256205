"""Resampling to another voxel size: cubic splines for images, the nearest voxel for masks.

Splines are evaluated axis by axis, by additions and multiplications of whole rows in a fixed order:
no matrix product, whose last bits depend on the library, the CPU and the number of threads. Equal
input gives equal bits everywhere. Letters: n old and m new voxels along an axis.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Float, Float32

from sparsemae.data.reading.geometry import voxel_sizes
from sparsemae.triples import FloatTriple

EQUAL = 1e-3  # of a voxel size: an axis this close to the wanted spacing is left alone
_TILE = 1 << 20  # voxels worked on at a time: 4 MiB stay in a cache
_POLE = math.sqrt(3.0) - 2.0  # of the filter that turns samples into spline coefficients
_EDGE = 2  # coefficients beyond each end that a position up to half a voxel outside needs


@dataclass(frozen=True)
class Grid:
    """Where new voxels lie: voxel j of an axis at origin + step * j, in old voxels."""

    shape: tuple[int, int, int]
    origin: FloatTriple
    step: FloatTriple  # exactly 1 along an axis that is left alone

    def affine(self, old: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "4 4"]:
        """New voxels to world mm, from the affine of the old."""
        new = np.array(old, dtype=np.float64)
        new[:3, 3] += (new[:3, :3] * self.origin).sum(axis=1)
        new[:3, :3] *= self.step
        return new


def resampled_grid(
    shape: tuple[int, int, int], affine: Float[np.ndarray, "4 4"], spacing: FloatTriple
) -> Grid:
    """The grid of `spacing` mm along the same axes, centred on the same field of view.

    Its extent differs from the old by less than half a new voxel on each side, and is at least one
    voxel.
    """
    steps, sizes, origin = [], [], []
    for n, old, new in zip(shape, voxel_sizes(affine), spacing, strict=True):
        step = 1.0 if abs(new - old) <= EQUAL * old else new / old
        m = max(1, round(n / step))
        steps.append(step)
        sizes.append(m)
        origin.append(((n - 1) - (m - 1) * step) / 2 if step != 1.0 else 0.0)
    return Grid(tuple(sizes), tuple(origin), tuple(steps))


def resample(array: Float32[np.ndarray, "D H W"], grid: Grid) -> Float32[np.ndarray, "d h w"]:
    """The cubic spline through the voxels, at the positions of `grid`; `array` itself if equal.

    Edges continue with the nearest voxel. Overshoot is clipped to the range of `array`. Axes that
    shrink go first, so no array on the way is larger than the larger of input and output, and at
    most two of them exist at a time beside the input.
    """
    axes = [a for a in np.argsort(np.divide(grid.shape, array.shape)) if grid.step[a] != 1.0]
    if not axes:
        return array
    out = array
    for axis in axes:
        positions = grid.origin[axis] + grid.step[axis] * np.arange(grid.shape[axis])
        out = _along_axis(out, int(axis), positions)
    return np.clip(out, array.min(), array.max(), out=out)


def resample_mask(mask: Bool[np.ndarray, "D H W"], grid: Grid) -> Bool[np.ndarray, "d h w"]:
    """The mask's nearest voxel at the positions of `grid`; the upper of two equally near."""
    for axis in np.argsort(np.divide(grid.shape, mask.shape)):
        if grid.step[axis] != 1.0:
            positions = grid.origin[axis] + grid.step[axis] * np.arange(grid.shape[axis])
            nearest = np.floor(positions + 0.5).astype(np.intp).clip(0, mask.shape[axis] - 1)
            mask = mask.take(nearest, axis=axis)
    return mask


def _along_axis(
    array: Float32[np.ndarray, "D H W"], axis: int, positions: Float[np.ndarray, "m"]
) -> Float32[np.ndarray, "d h w"]:
    """One axis resampled, as many lines at a time as fit a cache."""
    shape = list(array.shape)
    shape[axis] = len(positions)
    out = np.empty(shape, np.float32)
    lines, results = np.moveaxis(array, axis, 0), np.moveaxis(out, axis, 0)
    n, count, width = lines.shape
    parts = max(1, -(-n * count * width // _TILE))
    for a, b in pairwise(np.linspace(0, count, min(parts, count) + 1).astype(int)):
        coefficients = np.empty((n + 2 * _EDGE, b - a, width), np.float32)
        coefficients[_EDGE:-_EDGE] = lines[:, a:b]
        _filter(coefficients)
        results[:, a:b] = _evaluate(coefficients, positions)
    return out


def _filter(rows: Float32[np.ndarray, "n+4 ..."]) -> None:
    """Samples to a sixth of their spline coefficients along the first axis, in place.

    The samples are rows 2 to n+1; the rows around become the coefficients of a signal that goes on
    for ever with its first and last sample. Both recursions start from closed forms of that.
    """
    z, first, last = _POLE, rows[_EDGE].copy(), rows[-_EDGE - 1].copy()
    inner = rows[_EDGE:-_EDGE]
    scratch = np.empty_like(first)
    inner[0] = first / (1 - z)
    for before, here in pairwise(inner):
        np.multiply(before, z, out=scratch)
        here += scratch
    settled = last / (1 - z)  # where the first recursion ends, far beyond the last sample
    inner[-1] = -z / (1 - z) * settled - z / (1 - z * z) * (inner[-1] - settled)
    for after, here in pairwise(inner[::-1]):
        np.subtract(after, here, out=here)
        here *= z
    for k, decay in enumerate((z, z * z), start=1):
        rows[_EDGE - k] = first / 6 + decay * (inner[0] - first / 6)
        rows[-_EDGE - 1 + k] = last / 6 + decay * (inner[-1] - last / 6)


def _evaluate(
    rows: Float32[np.ndarray, "n+4 ..."], positions: Float[np.ndarray, "m"]
) -> Float32[np.ndarray, "m ..."]:
    """The spline at `positions`, from what `_filter` made."""
    out = np.empty((len(positions), *rows.shape[1:]), np.float32)
    scratch = np.empty_like(out[0])
    floor = np.floor(positions)
    t, u = positions - floor, floor + 1 - positions
    # six times the cubic B-spline at the distances of the four coefficients around
    weights = (u * u * u, (3 * t - 6) * t * t + 4, (3 * u - 6) * u * u + 4, t * t * t)
    starts = floor.astype(int) - 1 + _EDGE
    for target, start, four in zip(
        out, starts.tolist(), np.stack(weights, 1).tolist(), strict=True
    ):
        np.multiply(rows[start], four[0], out=target)
        for row, weight in zip(rows[start + 1 : start + 4], four[1:], strict=True):
            np.multiply(row, weight, out=scratch)
            target += scratch
    return out
