"""Intensities: from stored numbers to finite float32, slab by slab, and what is odd about them.

The array of the result is the only large memory. Scaling is done in float64, and nothing is
squared: 3e38 squared is infinite in float32.
"""

import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float32, Float64, Shaped

from sparsemae.data.codes import Findings
from sparsemae.data.reading.header import Header
from sparsemae.data.reading.sample import evenly
from sparsemae.data.reading.stream import CHUNK, Stream

MAX_NOT_FINITE = 0.01  # fraction of voxels up to which NaN and infinities are filled
EQUAL = 0.999  # fraction of equal voxels from which a volume is called nearly constant
RESOLUTION = 1e-5  # of the largest value; less contrast is close to float32's precision
OUTLIER = 100.0  # times the 99.9th percentile of |intensity|
PADDING = -1500.0  # no tissue is below it, in Hounsfield units or any other scanner's
MIN_PADDED = 0.001  # fraction of voxels from which a lowest value is padding and no outlier
PADDING_GAP = 0.25  # of the range of the rest

Flat = Float32[np.ndarray, "voxels"]
Sample = Float64[np.ndarray, "voxels"]  # of them, evenly spread


def chunks(
    stream: Stream, dtype: np.dtype, count: int
) -> Iterator[tuple[slice, Shaped[np.ndarray, "n"]]]:
    """The next `count` voxels in pieces, each with its place; the next overwrites it."""
    step = CHUNK // dtype.itemsize
    memory = memoryview(bytearray(min(count, step) * dtype.itemsize))
    for start in range(0, count, step):
        stop = min(start + step, count)
        view = memory[: (stop - start) * dtype.itemsize]
        stream.fill(view)
        yield slice(start, stop), np.frombuffer(view, dtype)


def read_intensities(stream: Stream, header: Header) -> Flat:
    """One frame in stored order, scaled; what float32 cannot hold is infinite."""
    array = np.empty(header.voxels, np.float32)
    scaled = (header.slope, header.intercept) != (1.0, 0.0)
    with np.errstate(all="ignore"):
        for place, raw in chunks(stream, header.dtype, header.voxels):
            array[place] = (
                raw.astype(np.float64) * header.slope + header.intercept if scaled else raw
            )
    return array


def check_intensities(
    array: Flat, header: Header, findings: Findings, *, constant: bool = False
) -> None:
    """Fill the few voxels that are not finite and lift padding, in place; refuse the rest.

    A single value is refused unless `constant`.
    """
    low = _make_finite(array, header, findings)
    high = float(max(part.max() for part in _slabs(array)))
    if low == high and constant:
        return
    if low == high:
        raise findings.refuse("intensity.constant", f"every voxel is {low:g}; remove the file")
    sample = evenly(array).astype(np.float64)
    if low < PADDING:
        low = _lift_padding(array, sample, low, findings)
    _note_contrast(array, sample, low, high, findings)
    extreme = max(-low, high)
    usual = float(np.percentile(np.abs(sample), 99.9))
    if extreme > 1e30 or (usual > 0 and extreme > OUTLIER * usual):
        value = high if extreme == high else low
        findings.warn(
            "intensity.outliers", f"a voxel of {value:g}, 99.9 % are below {usual:.4g} in size"
        )


def _slabs(array: Flat) -> Iterator[Flat]:
    for start in range(0, array.size, CHUNK):
        yield array[start : start + CHUNK]


def _make_finite(array: Flat, header: Header, findings: Findings) -> float:
    """The lowest finite value, which the voxels that are not finite now have."""
    low, bad = math.inf, 0
    for part in _slabs(array):
        finite = np.isfinite(part)
        if (missing := part.size - int(np.count_nonzero(finite))) != 0:
            bad += missing
            part = part[finite]
        if part.size:
            low = min(low, float(part.min()))
    if not bad:
        return low
    if bad > MAX_NOT_FINITE * array.size:
        if header.dtype.kind in "iu":
            raise findings.refuse(
                "intensity.slope",
                f"scaled by {header.slope:g}, {bad} of {array.size} voxels exceed float32; "
                "fix scl_slope",
            )
        raise findings.refuse(
            "intensity.not_finite",
            f"{bad} of {array.size} voxels are NaN or infinite; replace them",
        )
    for part in _slabs(array):
        part[~np.isfinite(part)] = low
    findings.warn(
        "intensity.filled",
        f"{bad} of {array.size} voxels are NaN or infinite; set to {low:g}, the lowest",
    )
    return low


def _lift_padding(array: Flat, sample: Sample, low: float, findings: Findings) -> float:
    """Raise a lowest value that many share, far below all others, to the next; the lowest now."""
    padded, lowest = 0, math.inf
    for part in _slabs(array):
        rest = part[part > low]
        padded += part.size - rest.size
        if rest.size:
            lowest = min(lowest, float(rest.min()))
    rest = sample[sample > low]
    if padded < MIN_PADDED * array.size or not rest.size:
        return low
    spread = float(np.percentile(rest, 99.9)) - lowest
    if not (spread > 0 and lowest - low > PADDING_GAP * spread):
        return low
    for part in _slabs(array):
        np.maximum(part, np.float32(lowest), out=part)
    findings.warn(
        "intensity.padding", f"{padded} voxels of {low:g} are padding; raised to {lowest:g}"
    )
    return lowest


def _note_contrast(
    array: Flat, sample: Sample, low: float, high: float, findings: Findings
) -> None:
    if high - low <= RESOLUTION * max(-low, high):
        findings.warn(
            "intensity.nearly_constant", f"all voxels lie between {low:.9g} and {high:.9g}"
        )
        return
    usual = float(np.median(sample))
    if np.count_nonzero(sample == usual) < 0.9 * sample.size:
        return
    equal = sum(int(np.count_nonzero(part == usual)) for part in _slabs(array))
    if equal >= EQUAL * array.size:
        findings.warn(
            "intensity.nearly_constant", f"{array.size - equal} voxels differ from {usual:g}"
        )
