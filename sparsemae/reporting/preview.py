"""A few patches and what the model makes of them, kept small for the report of a run."""

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from sparsemae.files import write_atomically
from sparsemae.reporting.planes import plane_figure
from sparsemae.runfiles import PICTURE, PREVIEW

Triple = tuple[int, int, int]

MOST_VOXELS = 6_000_000  # of a volume; larger ones are averaged down
MOST_ROWS = 4  # of the picture
_LETTERS, _LAST_LETTER = 36, "\u024f"  # of a case's name in the picture; the last of Latin


@dataclass(frozen=True)
class Preview:
    """Patches with axes R, A, S, their masks, and the model's reconstruction of them.

    In `reconstruction` visible voxels are the original's.
    """

    step: int
    cases: tuple[str, ...]
    original: Float32[np.ndarray, "N D H W"]
    reconstruction: Float32[np.ndarray, "N D H W"]
    visible: Bool[np.ndarray, "N Gd Gh Gw"]  # cells that the encoder saw
    block_size: Triple  # voxels of a cell
    spacing: Float[np.ndarray, "N 3"]  # mm


@dataclass(frozen=True)
class StoredPreview:
    """A preview in 8 bits, each case on a grey scale of its own."""

    step: int
    cases: tuple[str, ...]
    original: UInt8[np.ndarray, "N D H W"]
    reconstruction: UInt8[np.ndarray, "N D H W"]
    visible: Bool[np.ndarray, "N Gd Gh Gw"]
    spacing: Float[np.ndarray, "N 3"]  # mm of a voxel here

    @property
    def block_size(self) -> Triple:
        """Voxels of a cell here."""
        sizes = zip(self.original.shape[1:], self.visible.shape[1:], strict=True)
        return tuple(n // cells for n, cells in sizes)


def save_preview(run: Path, preview: Preview) -> None:
    """Write `preview.npz` and `preview.png` into the run folder, each whole or not at all."""
    stored = _stored(preview)
    file = io.BytesIO()
    np.savez_compressed(
        file,
        step=stored.step,
        cases=np.array(stored.cases),
        original=stored.original,
        reconstruction=stored.reconstruction,
        visible=stored.visible,
        spacing=stored.spacing,
    )
    write_atomically(run / PREVIEW, file.getvalue())
    write_atomically(run / PICTURE, _picture(stored))


def load_preview(run: Path) -> StoredPreview | None:
    """The preview of a run folder; None if there is none, or it is damaged."""
    try:
        with np.load(run / PREVIEW, allow_pickle=False) as arrays:
            stored = StoredPreview(
                step=int(arrays["step"]),
                cases=tuple(map(str, arrays["cases"])),
                original=arrays["original"],
                reconstruction=arrays["reconstruction"],
                visible=arrays["visible"],
                spacing=arrays["spacing"],
            )
    except Exception:  # whatever damaged bytes make of zip, zlib and numpy's headers
        return None
    return stored if _whole(stored) else None


def _whole(stored: StoredPreview) -> bool:
    volumes, visible = (stored.original, stored.reconstruction), stored.visible
    if any(a.ndim != 4 or not a.size for a in (*volumes, visible)):
        return False
    count = len(stored.cases)
    return (
        all(v.dtype == np.uint8 and v.shape == volumes[0].shape for v in volumes)
        and visible.dtype == bool
        and not any(n % g for n, g in zip(volumes[0].shape[1:], visible.shape[1:], strict=True))
        and count == len(visible) == len(volumes[0])
        and stored.spacing.shape == (count, 3)
        and stored.spacing.dtype.kind == "f"
        and bool((np.isfinite(stored.spacing) & (stored.spacing > 0)).all())
    )


def _stored(preview: Preview) -> StoredPreview:
    factors = _factors(preview.original.shape[1:], preview.block_size)
    original = _averaged(preview.original, factors)
    restored = _averaged(preview.reconstruction, factors)
    low, high = np.percentile(original, (0.5, 99.5), axis=(1, 2, 3))
    scale = 255 / np.maximum(high - low, 1e-6)

    def grey(volumes: np.ndarray) -> np.ndarray:
        scaled = (volumes - low[:, None, None, None]) * scale[:, None, None, None]
        return np.nan_to_num(scaled).clip(0, 255).round().astype(np.uint8)

    return StoredPreview(
        step=preview.step,
        cases=preview.cases,
        original=grey(original),
        reconstruction=grey(restored),
        visible=preview.visible,
        spacing=preview.spacing * np.array(factors),
    )


def _factors(shape: Triple, block_size: Triple) -> Triple:
    """How many voxels become one along each axis: parts of a cell's width, while it is too large.

    Cells stay whole, so that the mask stays exact.
    """
    factors = [1, 1, 1]
    while np.prod(shape) / np.prod(factors) > MOST_VOXELS:
        able = [axis for axis in range(3) if factors[axis] < block_size[axis]]
        if not able:
            break
        axis = max(able, key=lambda a: shape[a] / factors[a])
        left = block_size[axis] // factors[axis]
        factors[axis] *= next(n for n in range(2, left + 1) if left % n == 0)
    return tuple(factors)


def _averaged(volumes: np.ndarray, factors: Triple) -> np.ndarray:
    for axis, factor in enumerate(factors, start=1):
        shape = volumes.shape
        split = (*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :])
        volumes = volumes.reshape(split).mean(axis + 1) if factor > 1 else volumes
    return volumes


def _picture(stored: StoredPreview) -> bytes:
    """Original, masked and reconstruction in the middle axial plane, a case to a row."""
    hidden = ~stored.visible
    for axis, width in enumerate(stored.block_size, start=1):
        hidden = hidden.repeat(width, axis)
    rows, middle = [], stored.original.shape[3] // 2
    for i, case in enumerate(stored.cases[:MOST_ROWS]):
        original = stored.original[i, :, :, middle].astype(float)
        planes = {
            "original": original,
            "masked": np.where(hidden[i, :, :, middle], np.nan, original),
            "reconstruction": stored.reconstruction[i, :, :, middle],
        }
        rows.append((_short(case), stored.spacing[i, 1] / stored.spacing[i, 0], planes))
    figure = plane_figure(rows, (0, 255), (9, 3.2 * len(rows) + 0.4))
    figure.suptitle(f"step {stored.step}", color="white")
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()


def _short(case: str) -> str:
    """What has room beside a picture, in letters that its font is sure to have."""
    case = "".join(c if c.isprintable() and c <= _LAST_LETTER else "?" for c in case)
    return case if len(case) <= _LETTERS else f"{case[: _LETTERS // 2]}…{case[-_LETTERS // 2 :]}"
