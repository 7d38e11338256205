"""A case made ready for a network by nnU-Net's rules: cropped, normalised, resampled.

Letters: C channels; D, H, W voxels as read, RAS; d, h, w of the result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32
from scipy import ndimage

from sparsemae.data.codes import VolumeError
from sparsemae.data.options import MAX_VOXELS
from sparsemae.data.preparing.resample import Grid, resampled_grid
from sparsemae.data.read import Labels, Volume
from sparsemae.planning.plan import ChannelPlan, Plan
from sparsemae.segmentation.resampling import resample_image, resample_labels, thick_axis
from sparsemae.triples import Triple

_LEAST_STD = 1e-8  # nnU-Net's


@dataclass(frozen=True)
class PreparedCase:
    """A case on the grid of a plan."""

    array: Float32[np.ndarray, "C d h w"]
    labels: Int32[np.ndarray, "d h w"] | None
    affine: Float[np.ndarray, "4 4"]
    crop_start: Triple  # box of the volume as read that was kept
    crop_stop: Triple
    grid: Grid  # where the result's voxels lie in that box
    thick: int | None  # the axis that was not interpolated


def prepare_case(volumes: Sequence[Volume], labels: Labels | None, plan: Plan) -> PreparedCase:
    """Crop to what is not zero in any channel, normalise, resample; labels go with it.

    The volumes must lie on one grid; `read_case` sees to that.

    Raises:
        VolumeError: `geometry.too_large`.
    """
    first = volumes[0]
    inside = np.logical_or.reduce([v.array != 0 for v in volumes])
    start, stop = content_box(inside)
    box = tuple(map(slice, start, stop))
    # holes are part of it, as in nnU-Net
    inside = ndimage.binary_fill_holes(inside[box])
    affine = np.array(first.affine, dtype=np.float64)
    affine[:3, 3] += (affine[:3, :3] * start).sum(axis=1)
    size = tuple(b - a for a, b in zip(start, stop, strict=True))
    grid = resampled_grid(size, affine, plan.spacing)
    if (voxels := np.prod(grid.shape, dtype=object)) > MAX_VOXELS:
        mm = " x ".join(f"{s:g}" for s in plan.spacing)
        raise VolumeError(
            "geometry.too_large",
            f"{first.path}: {grid.shape} voxels at the plan's {mm} mm are {voxels}, more than "
            f"{MAX_VOXELS}; set a larger plan.spacing",
        )
    thick = thick_axis(first.spacing, plan.spacing)
    array = np.empty((len(volumes), *grid.shape), np.float32)
    for target, volume, channel in zip(array, volumes, plan.channels, strict=True):
        target[...] = resample_image(_normalized(volume, box, inside, channel), grid, thick)
    classes = None
    if labels is not None:
        classes = resample_labels(labels.array[box], grid, thick)
    return PreparedCase(array, classes, grid.affine(affine), start, stop, grid, thick)


def content_box(inside: Bool[np.ndarray, "D H W"]) -> tuple[Triple, Triple]:
    """Start and stop of the smallest box around it; of everything where there is nothing."""
    found = ndimage.find_objects(inside.astype(np.uint8))
    if not found:
        return (0, 0, 0), inside.shape
    return tuple(s.start for s in found[0]), tuple(s.stop for s in found[0])


def _normalized(
    volume: Volume,
    box: tuple[slice, ...],
    inside: Bool[np.ndarray, "D H W"],
    channel: ChannelPlan,
) -> Float32[np.ndarray, "D H W"]:
    """The cropped channel in the form that the network sees. Source: nnunetv2 2.8.1
    `default_normalization_schemes`."""
    array = volume.array[box].astype(np.float32)  # a copy
    match channel.normalization:
        case "zscore":
            values = array[inside] if channel.masked else array
            mean, std = values.mean(dtype=np.float64), values.std(dtype=np.float64)
            if std <= _LEAST_STD * max(1.0, abs(mean)):
                return np.zeros_like(array)  # a contrast that was not taken
            if channel.masked:
                array[inside] = (values - np.float32(mean)) / np.float32(std)
                array[~inside] = 0
                return array
            array -= np.float32(mean)
            array /= np.float32(std)
        case "ct":
            known = channel.intensities
            np.clip(array, known.low, known.high, out=array)
            array -= np.float32(known.mean)
            array /= np.float32(max(known.std, _LEAST_STD))
        case "rescale":
            array -= array.min()
            array /= max(array.max(), _LEAST_STD)
    return array
