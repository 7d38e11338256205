"""A few patches and what the model makes of them, kept small for the report of a run."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from sparsemae.files import write_atomically
from sparsemae.reporting.palette import coloured, draw_legend, printable
from sparsemae.reporting.planes import plane_figure
from sparsemae.reporting.scaling import averaged, factors, greys
from sparsemae.reporting.segmentation import SegmentationPreview, StoredSegmentation
from sparsemae.reporting.views import Stored, View, good_spacing
from sparsemae.runfiles import PICTURE, PREVIEW
from sparsemae.triples import Triple

MOST_VOXELS = 6_000_000  # of a volume; larger ones are averaged down
MOST_ROWS = 4  # of the picture


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

    views: ClassVar[tuple[View, ...]] = (
        View("original", "original", "original", grey="original"),
        View(
            *("masked", "masked", "masked: what the encoder sees"),
            grey="original",
            visible="visible",
        ),
        View(
            *("reconstruction", "reconstruction", "reconstruction of the masked cells"),
            grey="reconstruction",
        ),
    )
    about: ClassVar[str] = "Fixed patches with fixed masks"
    names: ClassVar[tuple[str, ...]] = ()
    colours: ClassVar[Float[np.ndarray, "n 3"]] = np.zeros((0, 3))

    @property
    def block_size(self) -> Triple:
        """Voxels of a cell here."""
        sizes = zip(self.original.shape[1:], self.visible.shape[1:], strict=True)
        return tuple(n // cells for n, cells in sizes)

    def arrays(self) -> dict[str, np.ndarray]:
        """What is written into a file."""
        return {
            "step": self.step,
            "cases": np.array(self.cases),
            "original": self.original,
            "reconstruction": self.reconstruction,
            "visible": self.visible,
            "spacing": self.spacing,
        }

    @classmethod
    def of(cls, preview: Preview, most: int) -> "StoredPreview":
        """With at most `most` voxels per volume, if cells can be that small; masks stay exact."""
        fewer = factors(preview.original.shape[1:], preview.block_size, most)
        pair = (averaged(v, fewer) for v in (preview.original, preview.reconstruction))
        original, restored = greys(*pair)
        return cls(
            step=preview.step,
            cases=preview.cases,
            original=original,
            reconstruction=restored,
            visible=preview.visible,
            spacing=preview.spacing * np.array(fewer),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "StoredPreview | None":
        """What `arrays` gave; None if its parts do not go together."""
        stored = cls(
            step=int(arrays["step"]),
            cases=tuple(map(str, arrays["cases"])),
            original=arrays["original"],
            reconstruction=arrays["reconstruction"],
            visible=arrays["visible"],
            spacing=arrays["spacing"],
        )
        return stored if stored._whole() else None

    def _whole(self) -> bool:
        volumes, visible = (self.original, self.reconstruction), self.visible
        if any(a.ndim != 4 or not a.size for a in (*volumes, visible)):
            return False
        count = len(self.cases)
        return (
            all(v.dtype == np.uint8 and v.shape == volumes[0].shape for v in volumes)
            and visible.dtype == bool
            and not any(n % g for n, g in zip(volumes[0].shape[1:], visible.shape[1:], strict=True))
            and count == len(visible) == len(volumes[0])
            and good_spacing(self.spacing, count)
        )


def save_preview(run: Path, preview: Preview | SegmentationPreview) -> None:
    """Write `preview.npz` and `preview.png` into the run folder, each whole or not at all."""
    kind = StoredPreview if isinstance(preview, Preview) else StoredSegmentation
    stored = kind.of(preview, MOST_VOXELS)
    file = io.BytesIO()
    np.savez_compressed(file, **stored.arrays())
    write_atomically(run / PREVIEW, file.getvalue())
    write_atomically(run / PICTURE, _picture(stored))


def load_preview(run: Path) -> StoredPreview | StoredSegmentation | None:
    """The preview of a run folder; None if there is none, or it is damaged."""
    try:
        with np.load(run / PREVIEW, allow_pickle=False) as arrays:
            kind = StoredSegmentation if "prediction" in arrays else StoredPreview
            return kind.from_arrays(arrays)
    except Exception:  # whatever damaged bytes make of zip, zlib and numpy's headers
        return None


def _picture(stored: Stored) -> bytes:
    """The views of the middle axial plane, a case to a row."""
    shape = getattr(stored, stored.views[0].grey).shape
    rows, shown = [], set()
    for i, case in enumerate(stored.cases[:MOST_ROWS]):
        planes = {}
        for view in stored.views:
            plane = getattr(stored, view.grey)[i, :, :, shape[3] // 2]
            if view.visible:
                cells = getattr(stored, view.visible)[i]
                for axis, width in enumerate(np.floor_divide(shape[1:], cells.shape)):
                    cells = cells.repeat(width, axis)
                plane = np.where(cells[:, :, shape[3] // 2], plane.astype(float), np.nan)
            if view.classes:
                classes = getattr(stored, view.classes)[i, :, :, shape[3] // 2]
                plane = coloured(plane, classes, stored.colours)
                shown |= set(np.unique(classes).tolist())
            planes[view.title] = plane
        rows.append((printable(case), stored.spacing[i, 1] / stored.spacing[i, 0], planes))
    figure = plane_figure(rows, (0, 255), (9, 3.2 * len(rows) + 0.4))
    figure.suptitle(f"step {stored.step}", color="white")
    draw_legend(figure, stored.names, stored.colours, sorted(shown - {0}))
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=90)
    return file.getvalue()
