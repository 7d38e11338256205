"""Dice, surface Dice and Hausdorff distance of the classes of one case, on arrays.

MONAI computes the distances; what a class that is absent scores is decided here. Letters: D, H, W
voxels of the case, d, h, w of the box around one class.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Bool, Float32, Int
from pydantic import BeforeValidator, ConfigDict, ValidationInfo
from scipy import ndimage

from sparsemae.config import Strict
from sparsemae.errors import UserError

SLACK = 1e-4  # mm beyond the tolerance that still count: an affine's rounding must not decide
PERCENTILE = 95.0


class Measured(Strict):
    """A record of numbers; NaN, null in JSON, where there is nothing to measure."""

    model_config = ConfigDict(allow_inf_nan=True)


def _measure(value: Any, info: ValidationInfo) -> Any:
    if info.mode == "json" and isinstance(value, float) and not math.isfinite(value):
        raise ValueError("written as null")  # by us; a file with NaN in it was changed since
    return math.nan if value is None else value


Measure = Annotated[float, BeforeValidator(_measure)]


class Score(Measured):
    """One class of one case."""

    label: int
    dice: Measure  # 0 to 1
    nsd: Measure  # 0 to 1
    hd95: Measure  # mm
    prediction_ml: float
    reference_ml: float


def score_case(
    pred: Int[np.ndarray, "D H W"],
    ref: Int[np.ndarray, "D H W"],
    spacing: Sequence[float],
    classes: Sequence[int],
    tolerance: float | Mapping[int, float],
    ignore: int | None = None,
) -> list[Score]:
    """The scores of `classes`, in that order.

    Dice is that of the voxels. NSD is the share of both surfaces, in mm2, that lies within the
    tolerance of the other (Nikolov et al. 2018, with DeepMind's surface elements). HD95 is the
    larger of the two directed 95th percentiles of the distances between voxels on the surfaces. All
    three are NaN for a class that neither map has; for one that a single map has they are 0, 0 and
    the diagonal of the volume.

    Args:
        spacing: Voxel sizes along D, H, W in mm.
        tolerance: Of NSD, in mm; for all classes, or for each by its number.
        ignore: The number of those voxels of `ref` that are background in both maps.

    Raises:
        UserError: Shapes differ, the maps are no whole numbers, or a size or tolerance is none.
    """
    tolerances = _checked(pred, ref, spacing, classes, tolerance)
    numbers = np.unique(np.asarray(classes, np.int64))
    left_out = None if ignore is None else ref == ignore
    pred, ref = _ranked(pred, numbers, left_out), _ranked(ref, numbers, left_out)
    boxes = [ndimage.find_objects(array, max_label=numbers.size) for array in (pred, ref)]
    farthest = math.hypot(*(n * s for n, s in zip(ref.shape, spacing, strict=True)))
    scores = []
    for label, limit in zip(classes, tolerances, strict=True):
        rank = int(np.searchsorted(numbers, label)) + 1
        box = _around(*(found[rank - 1] for found in boxes))
        inside = pred[box] == rank, ref[box] == rank
        scores.append(_score(label, *inside, spacing, limit, farthest))
    return scores


def _score(
    label: int,
    pred: Bool[np.ndarray, "d h w"],
    ref: Bool[np.ndarray, "d h w"],
    spacing: Sequence[float],
    tolerance: float,
    farthest: float,
) -> Score:
    in_pred, in_ref = int(pred.sum()), int(ref.sum())
    if in_pred and in_ref:
        dice = 2 * int((pred & ref).sum()) / (in_pred + in_ref)
        nsd = _surface_dice(pred, ref, spacing, tolerance)
        hd95 = _hausdorff(pred, ref, spacing)
    else:
        dice, nsd, hd95 = (0.0, 0.0, farthest) if in_pred or in_ref else (math.nan,) * 3
    millilitres = math.prod(spacing) / 1000
    return Score(
        label=label,
        dice=dice,
        nsd=nsd,
        hd95=hd95,
        prediction_ml=in_pred * millilitres,
        reference_ml=in_ref * millilitres,
    )


def _surface_dice(
    pred: Bool[np.ndarray, "d h w"],
    ref: Bool[np.ndarray, "d h w"],
    spacing: Sequence[float],
    tolerance: float,
) -> float:
    """MONAI's `compute_surface_dice` with subvoxels, by its parts: they warn of nothing."""
    from monai.metrics import get_mask_edges

    *surfaces, areas_pred, areas_ref = get_mask_edges(pred, ref, spacing=tuple(spacing))
    near = total = 0.0
    distances = _distances(*surfaces, spacing)
    for surface, areas, apart in zip(surfaces, (areas_pred, areas_ref), distances, strict=True):
        elements = areas[surface].astype(np.float64)
        near += float(elements[apart <= tolerance + SLACK].sum())
        total += float(elements.sum())
    return near / total


def _hausdorff(
    pred: Bool[np.ndarray, "d h w"], ref: Bool[np.ndarray, "d h w"], spacing: Sequence[float]
) -> float:
    """MONAI's `compute_hausdorff_distance` by its parts: torch's quantile ends at 2^24 values."""
    from monai.metrics import get_mask_edges

    distances = _distances(*get_mask_edges(pred, ref), spacing)
    return max(float(np.percentile(apart, PERCENTILE)) for apart in distances)


def _distances(
    pred: Bool[np.ndarray, "d h w"], ref: Bool[np.ndarray, "d h w"], spacing: Sequence[float]
) -> tuple[Float32[np.ndarray, "n"], Float32[np.ndarray, "m"]]:
    """From each place on a surface to the nearest on the other, in mm, for both."""
    from monai.metrics import get_surface_distance

    return tuple(
        get_surface_distance(*pair, spacing=tuple(spacing)) for pair in ((pred, ref), (ref, pred))
    )


def _ranked(
    array: Int[np.ndarray, "D H W"],
    numbers: Int[np.ndarray, "n"],
    left_out: Bool[np.ndarray, "D H W"] | None,
) -> Int[np.ndarray, "D H W"]:
    """Each class as its place among the sorted `numbers`, from 1; 0 for all other voxels."""
    out = np.zeros(array.shape, np.min_scalar_type(numbers.size))
    for i, part in enumerate(array):  # a slice stays in a cache
        rank = np.searchsorted(numbers, part)
        known = numbers[rank.clip(max=numbers.size - 1)] == part
        if left_out is not None:
            known &= ~left_out[i]
        out[i][known] = rank[known] + 1
    return out


def _around(one: tuple[slice, ...] | None, other: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The smallest box that holds both; an empty one for none."""
    found = [box for box in (one, other) if box is not None]
    if not found:
        return (slice(0, 0),) * 3
    return tuple(
        slice(min(s.start for s in axis), max(s.stop for s in axis))
        for axis in zip(*found, strict=True)
    )


def _checked(
    pred: np.ndarray,
    ref: np.ndarray,
    spacing: Sequence[float],
    classes: Sequence[int],
    tolerance: float | Mapping[int, float],
) -> list[float]:
    """The tolerance of each class, if all arguments fit together."""
    if pred.shape != ref.shape or ref.ndim != 3:
        raise UserError(
            f"prediction {pred.shape}, reference {ref.shape}: give two maps [D, H, W] of one shape"
        )
    if not all(np.issubdtype(array.dtype, np.integer) for array in (pred, ref)):
        raise UserError(f"maps of {pred.dtype} and {ref.dtype}: give whole numbers of classes")
    if len(spacing) != 3 or not all(0 < size < math.inf for size in spacing):
        raise UserError(f"spacing {tuple(spacing)}: give three voxel sizes in mm")
    if not len(classes):
        raise UserError("no classes: name those to be scored")
    if isinstance(tolerance, Mapping):
        if missing := [label for label in classes if label not in tolerance]:
            raise UserError(f"class {missing[0]} has no tolerance; give one in mm")
        tolerances = [tolerance[label] for label in classes]
    else:
        tolerances = [tolerance] * len(classes)
    if not all(0 <= limit < math.inf for limit in tolerances):
        raise UserError(f"tolerance {tolerance}: give mm, from 0")
    return tolerances
