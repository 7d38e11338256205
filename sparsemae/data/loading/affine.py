"""Random rotation, scaling and mirroring of a patch: what is drawn, and which voxels it needs.

Everything here is geometry on a few numbers; `augment` does the interpolation.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float64, Int
from pydantic import BeforeValidator, Field

from sparsemae.config import Strict, floats
from sparsemae.triples import Triple

# Device coordinates are float32: what they may touch beyond the exact box is read along, in voxels.
_SLACK = 1e-3


def _range(value: Any) -> Any:
    """Two numbers above 0 in rising order, as a pair."""
    match floats(value):
        case (float(low), float(high)) if 0 < low <= high < math.inf:
            return low, high
    raise ValueError("give two numbers above 0, the smaller first")


Probability = Annotated[float, Field(ge=0, le=1)]


class AugmentConfig(Strict):
    """How patches are varied at random. The defaults are those of nnU-Net and nnssl.

    A rotated patch turns about its centre by an independent angle around each axis, in mm, so a
    body stays rigid on voxels of any shape. One scale factor, drawn uniformly, multiplies what the
    patch covers along all axes: above 1 it shows more and things are smaller, below 1 it zooms in.
    """

    mirror: bool = True  # flip each axis with probability 1/2
    rotation: float = Field(30.0, ge=0, le=180)  # degrees; angles are uniform in +- this
    rotation_probability: Probability = 0.2
    scale: Annotated[tuple[float, float], BeforeValidator(_range)] = (0.7, 1.4)
    scale_probability: Probability = 0.2


@dataclass(frozen=True)
class Draw:
    """The transform of one patch."""

    flips: tuple[bool, bool, bool]
    matrix: Float64[np.ndarray, "3 3"] | None  # None: no resampling, `flips` is all there is
    """Offset from the patch's centre in the output to that in the input, in voxels; with flips."""


def draw(
    rng: np.random.Generator,
    config: AugmentConfig,
    spacing: tuple[float, float, float],
    *,
    slices: int | None = None,
) -> Draw:
    """Draw the transform of a patch of voxels of `spacing` mm.

    The same numbers are drawn whatever `config` says, so that no option changes what the others do.

    Args:
        slices: The axis of slices that are too few or too thick to mix: they are turned within
            themselves, by any angle, and keep their thickness.
    """
    random = rng.random(9)
    flips = (random[:3] < 0.5) & config.mirror
    rotated = random[3] < config.rotation_probability and config.rotation > 0
    factor = 1.0
    if random[7] < config.scale_probability:
        low, high = config.scale
        factor = low + (high - low) * random[8]
    matrix = None
    if rotated or factor != 1:
        angles = np.deg2rad(config.rotation) * (2 * random[4:7] - 1) * rotated
        if slices is not None:
            angles = np.pi * (2 * random[4:7] - 1) * rotated * (np.arange(3) == slices)
        mm = np.asarray(spacing, float)
        factors = np.where(np.arange(3) == slices, 1.0, factor)
        # to mm, rotated, back to voxels
        matrix = factors[:, None] * _rotation(angles) * mm / mm[:, None]
        matrix = matrix * np.where(flips, -1, 1)
    return Draw(tuple(bool(f) for f in flips), matrix)


def needed_box(
    begin: Int[np.ndarray, "3"],
    patch_size: Triple,
    matrix: Float64[np.ndarray, "3 3"] | None,
    shape: Triple,
) -> tuple[Triple, Triple, bool]:
    """The least box [start, stop) of a volume that a patch is made of.

    Args:
        begin: The patch's first voxel before `matrix` turns it about its centre; may be negative.
        matrix: As in `Draw`.
        shape: Of the volume, which holds the centre of the patch.

    Returns:
        start, stop, and whether the patch reaches beyond the volume.
    """
    if matrix is None:
        low, high = begin, begin + patch_size
    else:
        half = (np.asarray(patch_size) - 1) / 2
        reach = np.abs(matrix) @ half
        low = np.floor(begin + half - reach - _SLACK).astype(int)
        high = np.ceil(begin + half + reach + _SLACK).astype(int) + 1
    beyond = bool((low < 0).any() or (high > shape).any())
    return tuple(np.maximum(low, 0).tolist()), tuple(np.minimum(high, shape).tolist()), beyond


def _rotation(angles: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "3 3"]:
    """Rotations about the first, then the second, then the third axis."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[[one, other], [one, other]] = math.cos(angle)
        turn[one, other], turn[other, one] = -math.sin(angle), math.sin(angle)
        matrix = turn @ matrix
    return matrix
