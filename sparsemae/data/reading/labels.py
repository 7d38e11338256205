"""Label maps and masks: whole numbers from stored ones, slab by slab, or a refusal."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Float64, Int32

from sparsemae.data.codes import Findings
from sparsemae.data.reading.header import Header
from sparsemae.data.reading.intensity import chunks
from sparsemae.data.reading.stream import Stream

WHOLE = 1e-3  # how far off a whole number a scaled or rounded label may be
_LARGEST = np.iinfo(np.int32).max


def read_classes(stream: Stream, header: Header) -> Int32[np.ndarray, "voxels"]:
    """One frame in stored order; `VolumeError` unless all are whole numbers of int32 from 0."""
    array = np.empty(header.voxels, np.int32)
    findings = stream.findings
    for place, raw in chunks(stream, header.dtype, header.voxels):
        scaled = _scaled(raw, header, findings)
        low, high = scaled.min(), scaled.max()
        if low < -WHOLE:
            raise findings.refuse(
                "labels.negative", f"a label of {low:g}; renumber the classes from 0"
            )
        if high > _LARGEST:
            raise findings.refuse(
                "labels.range", f"a label of {high:.10g}; renumber the classes from 0"
            )
        whole = np.rint(scaled)
        if (off := np.abs(scaled - whole)).max() > WHOLE:
            value = scaled[off.argmax()]
            raise findings.refuse(
                "labels.fractional", f"a label of {value:g}; give a map of classes, no probability"
            )
        array[place] = whole
    return array


def read_set(stream: Stream, header: Header) -> Bool[np.ndarray, "voxels"]:
    """Where one frame, in stored order, is not 0."""
    array = np.empty(header.voxels, np.bool_)
    for place, raw in chunks(stream, header.dtype, header.voxels):
        array[place] = _scaled(raw, header, stream.findings) != 0
    return array


def check_labels(
    array: Int32[np.ndarray, "voxels"], classes: Collection[int] | None, findings: Findings
) -> None:
    """`VolumeError` for a class that is not in `classes`; warn where there is background only."""
    if not array.any():
        findings.warn("labels.empty", "background only")
    if classes is None:
        return
    present: set[int] = set()
    for start in range(0, array.size, 1 << 20):
        present.update(np.unique(array[start : start + (1 << 20)]).tolist())
    if unknown := sorted(present - set(classes)):
        raise findings.refuse(
            "labels.classes",
            f"class {', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''} "
            f"is not among {_listed(sorted(classes))}; add it, or correct the map",
        )


def _listed(classes: list[int]) -> str:
    return ", ".join(map(str, classes[:8])) + (", ..." if len(classes) > 8 else "")


def _scaled(raw: np.ndarray, header: Header, findings: Findings) -> Float64[np.ndarray, "n"]:
    with np.errstate(all="ignore"):
        scaled = raw.astype(np.float64) * header.slope + header.intercept
    if not np.isfinite(scaled).all():
        raise findings.refuse("labels.not_finite", "NaN or infinite labels; replace them")
    return scaled
