"""A volume made ready for a store or a network: cropped, resampled, normalised, its masks with it.

Air stays one value on the whole way, bit for bit, so it compresses, and padding with it goes on
without an edge. Letters: D, H, W voxels as read, d, h, w of the result.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32

from sparsemae.data.codes import Notice, VolumeError, one_line
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preparing.air import find_air
from sparsemae.data.preparing.normalize import Flat, Scale, measure
from sparsemae.data.preparing.resample import Grid, resample, resample_mask, resampled_grid
from sparsemae.data.read import Volume
from sparsemae.triples import Triple


@dataclass(frozen=True)
class Prepared:
    """A volume ready for a store or a network; see `Case` for the fields of equal names."""

    array: Float32[np.ndarray, "d h w"]  # every value is one of `config.dtype`
    affine: Float[np.ndarray, "4 4"]
    background: float
    mean: float
    std: float
    crop_start: Triple
    crop_stop: Triple
    foreground: Bool[np.ndarray, "d h w"]  # the anatomy mask, or what stands out of air's noise
    excluded: Bool[np.ndarray, "d h w"] | None = None  # None if no voxel is
    warnings: tuple[Notice, ...] = ()


def prepare(
    volume: Volume,
    config: PreprocessConfig,
    *,
    excluded: Bool[np.ndarray, "D H W"] | None = None,
    anatomy: Bool[np.ndarray, "D H W"] | None = None,
) -> Prepared:
    """Crop to what is not background, resample, normalise; masks stay on the volume's grid.

    Statistics are taken before resampling, where air is still exactly air. Beside the volume this
    needs 14 bytes per voxel of crop or result, whichever has more.

    Raises:
        VolumeError: `geometry.too_large` or `intensity.flat`.
    """
    air = find_air(volume.array)
    start, stop = air.crop(volume.array)
    box = tuple(map(slice, start, stop))
    cropped = volume.array[box]
    affine = np.array(volume.affine, dtype=np.float64)
    affine[:3, 3] += (affine[:3, :3] * start).sum(axis=1)
    grid = _grid(volume, cropped.shape, affine, config)
    inside = cropped != air.value
    try:
        scale = measure(cropped[inside], air.value, config)
    except Flat as error:
        raise VolumeError("intensity.flat", f"{volume.path}: {error}; remove the file") from None
    array, background = _normalized(cropped, inside, scale, grid, config.dtype)
    warnings = _notices(volume, scale, config)
    if anatomy is not None:
        anatomy = anatomy[box]
        if not anatomy.any():
            warnings.append(_notice(volume, "labels.empty", "the anatomy mask marks nothing"))
            anatomy = None
    foreground = air.foreground(cropped) if anatomy is None else anatomy
    if excluded is not None:
        excluded = _resampled(excluded[box], grid)
        excluded = excluded if excluded.any() else None
    return Prepared(
        array=array,
        affine=affine if grid is None else grid.affine(affine),
        background=background,
        mean=scale.mean,
        std=scale.std,
        crop_start=start,
        crop_stop=stop,
        foreground=_resampled(foreground, grid),
        excluded=excluded,
        warnings=tuple(warnings),
    )


def _grid(
    volume: Volume, shape: Triple, affine: Float[np.ndarray, "4 4"], config: PreprocessConfig
) -> Grid | None:
    """Where the result's voxels lie; checked before anything is allocated for them."""
    if config.spacing is None:
        return None
    grid = resampled_grid(shape, affine, config.spacing)
    if (voxels := np.prod(grid.shape, dtype=object)) > config.max_voxels:
        mm = " x ".join(f"{s:g}" for s in config.spacing)
        raise VolumeError(
            "geometry.too_large",
            f"{volume.path}: {grid.shape} voxels at {mm} mm are {voxels}, more than "
            f"{config.max_voxels}; choose a larger --spacing",
        )
    return grid


def _normalized(
    cropped: Float32[np.ndarray, "D H W"],
    inside: Bool[np.ndarray, "D H W"],
    scale: Scale,
    grid: Grid | None,
    dtype: str,
) -> tuple[Float32[np.ndarray, "d h w"], float]:
    """The volume in its final form, and what air became.

    Splines run with air at 0, which they keep exactly, and with values of ordinary size.
    """
    air, std = np.float32(scale.background), np.float32(scale.std)
    shift = np.float32((scale.mean - scale.background) / scale.std)
    out = np.empty(cropped.shape, np.float32)
    for target, part, content in zip(out, cropped, inside, strict=True):  # a slice stays in a cache
        np.clip(part, np.float32(scale.low), np.float32(scale.high), out=target)
        if not scale.low <= scale.background <= scale.high:
            target[~content] = air
        target -= air
        target /= std
    if grid is not None:
        out = resample(out, grid)
    for part in out:
        part -= shift
        part[...] = part.astype(dtype)
    return out, float((np.float32(0) - shift).astype(dtype))


def _resampled(mask: Bool[np.ndarray, "D H W"], grid: Grid | None) -> Bool[np.ndarray, "d h w"]:
    return mask if grid is None else resample_mask(mask, grid)


def _notices(volume: Volume, scale: Scale, config: PreprocessConfig) -> list[Notice]:
    notices = []
    if scale.clipped:
        text = (
            f"{scale.clipped} voxels lie absurdly far from all others; "
            f"clipped to {scale.low:g} .. {scale.high:g}"
        )
        notices.append(_notice(volume, "intensity.clipped", text))
    if config.normalization == "ct" and volume.array.min() >= 0:
        text = "no voxel is below 0, so these are hardly Hounsfield units; check --normalization"
        notices.append(_notice(volume, "intensity.not_hounsfield", text))
    return notices


def _notice(volume: Volume, code: str, text: str) -> Notice:
    return Notice(code, one_line(f"{volume.path}: {text}"))
