"""Patches from samples on the training device: padding, mirroring, and one resampling of each.

Rotation, scaling and mirroring are one matrix, so a patch is interpolated once. Each sample is done
on its own box, without padding it to its batch mates': what it becomes depends on nothing else, bit
for bit, so ranks and batch sizes see the same patches. Nothing here waits for the device.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemae.data.loading.samples import RawBatch, Sample
from sparsemae.triples import Triple

# Slices resampled at a time: a grid of coordinates for 16 of 160^2 stays in a CPU's cache.
_SLICES = 16


def assemble(batch: RawBatch) -> dict[str, Any]:
    """The patches of a batch, on the device its samples are on.

    Returns:
        {"image": float32 [B, 1, D, H, W], "excluded": bool [B, 1, D, H, W], "case": B ids}. Beyond
        the volume the image is the case's background and excluded. Unresampled patches are exact
        copies; the others are trilinear in the image and nearest in the excluded voxels.
    """
    first = batch.samples[0].voxels
    shape = (len(batch.samples), 1, *batch.patch_size)
    image = torch.empty(shape, dtype=torch.float32, device=first.device)
    excluded = torch.zeros(shape, dtype=torch.bool, device=first.device)
    for sample, patch, mask in zip(batch.samples, image[:, 0], excluded[:, 0], strict=True):
        place = _copy if sample.grid is None else _resample
        place(sample, patch, mask)
    return {"image": image, "excluded": excluded, "case": [s.case for s in batch.samples]}


def place_of(
    corner: Triple, flips: tuple[bool, bool, bool], box: Sequence[int], patch: Sequence[int]
) -> tuple[tuple[slice, ...], list[int]]:
    """Where a box that lies at `corner` of a patch lies once all is mirrored, and along which axes
    it is."""
    axes = [axis for axis, flip in enumerate(flips) if flip]
    place = []
    for axis, flip in enumerate(flips):
        start, size = corner[axis], box[axis]
        start = patch[axis] - start - size if flip else start
        place.append(slice(start, start + size))
    return tuple(place), axes


def points_of(grid: Tensor, patch: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """Some slices of a patch at a time, and where they lie in its box: points [3, slices, H, W].

    Args:
        grid: Tables [3, D + H + W] as `samples.grid_tables` makes them.
    """
    d, h, w = grid.split(tuple(patch), dim=1)  # [3, D], [3, H], [3, W]
    for start in range(0, patch[0], _SLICES):
        some = slice(start, start + _SLICES)
        yield some, (d[:, some, None] + h[:, None])[..., None] + w[:, None, None]


def _copy(sample: Sample, patch: Tensor, mask: Tensor) -> None:
    """Put the box at its place in the patch, and mirror all of it."""
    place, axes = place_of(sample.corner, sample.flips, sample.voxels.shape, patch.shape)
    if sample.beyond:
        patch.fill_(sample.background)
        mask.fill_(True)
        mask[place] = False
    patch[place] = sample.voxels.flip(axes) if axes else sample.voxels
    if sample.excluded is not None:
        mask[place] = sample.excluded.flip(axes)


def _resample(sample: Sample, patch: Tensor, mask: Tensor) -> None:
    # zeros are what grid_sample finds beyond its input
    voxels, background = sample.voxels.float(), sample.background if sample.beyond else 0.0
    voxels = voxels - background if background else voxels
    included = None if sample.excluded is None else (~sample.excluded).float()
    for some, points in points_of(sample.grid, patch.shape):
        torch.add(sampled(voxels, points, "bilinear"), background, out=patch[some])
        if included is not None:
            torch.lt(sampled(included, points, "nearest"), 0.5, out=mask[some])
        elif sample.beyond:
            torch.ge(points.abs().amax(0), 1, out=mask[some])


def sampled(box: Tensor, points: Tensor, mode: str) -> Tensor:
    """`box` [d, h, w] at `points` [3, slices, H, W]; 0 beyond it.

    A slice is a row of the batch: the CPU's grid_sample runs those in parallel.
    """
    boxes = box.expand(points.shape[1], 1, -1, -1, -1)
    rows = points.permute(1, 2, 3, 0)[:, None]
    return F.grid_sample(boxes, rows, mode, "zeros", align_corners=False)[:, 0, 0]
