"""Volumes made small enough for a page: fewer voxels, 8 bits each."""

import numpy as np
from jaxtyping import Float, UInt8

from sparsemae.triples import Triple


def greys(*some: Float[np.ndarray, "N D H W"]) -> tuple[UInt8[np.ndarray, "N D H W"], ...]:
    """Volumes in 8 bits, each case on the grey scale of its first."""
    low, high = np.percentile(some[0], (0.5, 99.5), axis=(1, 2, 3))[..., None, None, None]
    return tuple(grey(volumes, low, high) for volumes in some)


def grey(
    some: Float[np.ndarray, "*shape"], low: float | np.ndarray, high: float | np.ndarray
) -> UInt8[np.ndarray, "*shape"]:
    """8 bits, black at `low` and white at `high`."""
    scaled = (some - low) * (255 / np.maximum(high - low, 1e-6))
    return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)


def factors(shape: Triple, block_size: Triple, most: int) -> Triple:
    """How many voxels become one along each axis, while there are more than `most`: parts of a
    block's width, so that blocks stay whole."""
    factors = [1, 1, 1]
    while np.prod(shape) / np.prod(factors) > most:
        able = [axis for axis in range(3) if factors[axis] < block_size[axis]]
        if not able:
            break
        axis = max(able, key=lambda a: shape[a] / factors[a])
        left = block_size[axis] // factors[axis]
        factors[axis] *= next(n for n in range(2, left + 1) if left % n == 0)
    return tuple(factors)


def averaged(some: Float[np.ndarray, "N D H W"], factors: Triple) -> Float[np.ndarray, "N d h w"]:
    """Volumes of fewer voxels, each the mean of those it stands for."""
    for axis, factor in enumerate(factors, start=1):
        shape = some.shape
        split = (*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :])
        some = some.reshape(split).mean(axis + 1) if factor > 1 else some
    return some
