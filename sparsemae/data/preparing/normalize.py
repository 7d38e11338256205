"""Intensities of one form: which linear map, and to which range they are clipped before it.

zscore: mean to 0 and standard deviation to 1; outliers are clipped to the range of all others.
percentile: clipped to the 0.5 and 99.5 percentiles, then mean to 0 and standard deviation to 1.
ct: clipped to a window, which is mapped to [-1, 1], the same for every volume.

Statistics are those of every voxel that is not exactly air. Clipping to percentiles leaves air
alone. An outlier lies beyond the 0.5 or 99.5 percentile, stretched to hold
the background, by over 20 times their distance: no tissue does, and one 3e38 flattens all else.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.reading.sample import evenly, median

Values = Float32[np.ndarray, "voxels"]

PERCENTILES = (0.5, 99.5)
OUTLIER = 20.0  # times the distance of these percentiles
LARGEST = 60000.0  # stored value, below float16's 65504
_FLOAT32 = float(np.finfo(np.float32).max)
_CHUNK = 1 << 18  # voxels in float64 at a time


class Flat(ValueError):
    """There is no contrast to normalise."""


@dataclass(frozen=True)
class Scale:
    """stored = (raw clipped to low..high - mean) / std. All are float32 numbers."""

    mean: float
    std: float
    low: float
    high: float
    background: float  # raw value of air after clipping
    clipped: int = 0  # outliers


def measure(values: Values, background: float, config: PreprocessConfig) -> Scale:
    """The map for a volume with these voxels that are not air; `Flat` if they have no contrast."""
    if not values.size or values.min() == values.max():
        raise Flat("all voxels that are not background have one value")
    match config.normalization:
        case "zscore":
            scale = _zscore(values, background)
        case "percentile":
            low, high = np.percentile(values, PERCENTILES, method="nearest")
            scale = Scale(*_moments(values, low, high), float(low), float(high), background)
        case "ct":
            scale = _ct(values, background, config.window)
    _check(scale)
    return scale


def _zscore(values: Values, background: float) -> Scale:
    """The plain z-score, from all voxels but outliers."""
    sample = evenly(values).astype(np.float64)
    low, high = np.percentile(sample, PERCENTILES)
    low, high = min(low, background), max(high, background)
    reach = OUTLIER * (high - low)
    low, high = np.clip((low - reach, high + reach), -_FLOAT32, _FLOAT32).tolist()
    ordinary = values
    if values.min() < low or values.max() > high:
        ordinary = values[(values >= low) & (values <= high)]
    low = min(float(ordinary.min()), background)
    high = max(float(ordinary.max()), background)
    moments = _moments(ordinary, low, high)
    return Scale(*moments, low, high, background, values.size - ordinary.size)


def _ct(values: Values, background: float, window: tuple[float, float]) -> Scale:
    low, high = (float(np.float32(edge)) for edge in window)
    if values.max() <= low or values.min() >= high:
        raise Flat(f"no voxel is inside the window of {low:g} to {high:g} HU")
    mean, half = (float(np.float32(v)) for v in ((low + high) / 2, (high - low) / 2))
    return Scale(mean, half, low, high, min(max(background, low), high))


def _moments(values: Values, low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation of the voxels clipped to low..high.

    Sums are in float64 and of distances to a value in the middle; the rest of their last bits, that
    may differ between machines, is lost in the rounding to float32.
    """
    middle = min(max(median(evenly(values)), low), high)
    total = squares = 0.0
    for start in range(0, values.size, _CHUNK):
        part = values[start : start + _CHUNK].astype(np.float64)
        np.clip(part, low, high, out=part)
        part -= middle
        total += float(part.sum())
        part *= part
        squares += float(part.sum())
    shift = total / values.size
    variance = squares / values.size - shift * shift
    return float(np.float32(middle + shift)), float(np.float32(math.sqrt(max(variance, 0.0))))


def _check(scale: Scale) -> None:
    """`Flat` where a stored value would exceed float16: contrast that is nothing beside it."""
    if scale.std < np.finfo(np.float32).tiny:
        raise Flat("all voxels that are not background have nearly one value")
    extremes = (scale.low, scale.high, scale.background)
    if max(abs(v - scale.mean) for v in extremes) > LARGEST * scale.std:
        raise Flat(
            f"voxels that are not background have mean {scale.mean:g} and standard deviation "
            f"{scale.std:.3g}, which is nothing beside their distance to the background "
            f"{scale.background:g}"
        )
