"""Which volumes are left out of a store although they can be read."""

import numpy as np

from sparsemae.data.codes import VolumeError
from sparsemae.data.options import FilterConfig
from sparsemae.data.read import Volume
from sparsemae.data.reading.sample import evenly
from sparsemae.data.transforms import Prepared


def assess(prepared: Prepared, volume: Volume, config: FilterConfig) -> None:
    """Refuse a volume that is not worth learning from.

    Field of view and spacing are those of the scan, as it was read. Slices are counted inside the
    crop: empty ones hold nothing. Contrast is that of the raw intensities of the foreground.

    Raises:
        VolumeError: `quality.field_of_view`, `quality.spacing`, `quality.slices` or
            `quality.contrast`; the message has the numbers.
    """
    extent = np.multiply(volume.array.shape, volume.spacing)
    if extent.min() < config.field_of_view:
        raise _refusal(
            *(volume, "quality.field_of_view", f"field of view {_by(extent)} mm"),
            f"at least {config.field_of_view:g}",
        )
    if max(volume.spacing) > config.spacing:
        raise _refusal(
            *(volume, "quality.spacing", f"voxels of {_by(volume.spacing)} mm"),
            f"at most {config.spacing:g}",
        )
    slices = np.subtract(prepared.crop_stop, prepared.crop_start)
    if slices.min() < config.slices:
        raise _refusal(
            *(volume, "quality.slices", f"{_by(slices)} slices that are not empty"),
            f"at least {config.slices}",
        )
    low, high = _percentiles(prepared)
    size = abs(low) + abs(high)
    if high - low < config.contrast * size:
        raise _refusal(
            *(volume, "quality.contrast", f"98 % of its content between {low:.5g} and {high:.5g}"),
            f"a contrast of {config.contrast:g}, it has {(high - low) / size:.2g}",
        )


def _percentiles(prepared: Prepared) -> tuple[float, float]:
    """Raw intensities that 1 % of the foreground are below, and above."""
    values = evenly(prepared.array[prepared.foreground]).astype(np.float64)
    low, high = np.percentile(values, (1, 99)) if values.size else (0.0, 0.0)
    return low * prepared.std + prepared.mean, high * prepared.std + prepared.mean


def _by(numbers: np.ndarray | tuple[float, ...]) -> str:
    return " x ".join(f"{n:.4g}" for n in numbers)


def _refusal(volume: Volume, code: str, found: str, wanted: str) -> VolumeError:
    return VolumeError(code, f"{volume.path}: {found}; --filter asks for {wanted}")
