"""The one guarded reader: a file as a float32 volume in RAS orientation, or a clear refusal.

The usual readers accept damaged files (nibabel never reads the gzip trailer), so the bytes are
checked here and libraries only interpret headers. D, H, W are voxels left to right, posterior to
anterior, inferior to superior. docs/bad-input.md lists what is refused or warned about.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Shaped

from sparsemae.data.codes import Findings, Notice, VolumeError
from sparsemae.data.options import MAX_VOXELS
from sparsemae.data.reading.decode import decode, sniff
from sparsemae.data.reading.geometry import displacement, voxel_sizes
from sparsemae.data.reading.header import Header
from sparsemae.data.reading.intensity import check_intensities, read_intensities
from sparsemae.data.reading.labels import check_labels, read_classes, read_set
from sparsemae.data.reading.native import NativeGrid

__all__ = [
    "SUFFIXES", "Labels", "NativeGrid", "Volume",
    "read_labels", "read_mask", "read_volume", "sniff", "voxel_sizes",
]  # fmt: skip

SUFFIXES = (
    *(".nii.gz", ".nii", ".hdr.gz", ".hdr", ".img.gz", ".img"),
    *(".nrrd", ".nhdr", ".mha", ".mhd"),
)
MISPLACED = 0.25  # of the smallest voxel size: how far off a label map may lie


@dataclass(frozen=True)
class Volume:
    """A volume in RAS orientation; `affine` maps its voxel indices to world mm."""

    array: Float32[np.ndarray, "D H W"]
    affine: Float[np.ndarray, "4 4"]
    spacing: tuple[float, float, float]  # mm along D, H, W
    path: Path  # where it was read from, for messages
    warnings: tuple[Notice, ...] = ()
    native: NativeGrid | None = None  # how the file stores it; None if it is from no file


@dataclass(frozen=True)
class Labels:
    """A label map in RAS orientation; `affine` maps its voxel indices to world mm."""

    array: Int32[np.ndarray, "D H W"]
    affine: Float[np.ndarray, "4 4"]
    spacing: tuple[float, float, float]  # mm along D, H, W
    path: Path
    warnings: tuple[Notice, ...] = ()
    native: NativeGrid | None = None  # how the file stores it; None if it is from no file


def read_volume(
    path: Path | str,
    *,
    frame: int | None = None,
    max_voxels: int = MAX_VOXELS,
    constant: bool = False,
) -> Volume:
    """Read a volume, its format told by its content; raise `VolumeError` if it is unfit.

    Of a file with several frames, `frame` is read, counted from 0; without it that is refused, as
    is a volume of more than `max_voxels`, and one of a single value unless `constant`. Nothing but
    `VolumeError` is raised for a bad file.
    """
    findings = Findings(Path(path))
    flat, header = decode(findings, frame, max_voxels, read_intensities, constant=constant)
    check_intensities(flat, header, findings, constant=constant)
    array, affine, native = _oriented(flat, header, findings)
    notices = tuple(findings.notices)
    return Volume(array, affine, voxel_sizes(affine), findings.path, notices, native)


def read_mask(path: Path | str, like: Volume) -> Bool[np.ndarray, "D H W"]:
    """Where the mask at `path` is not 0; `VolumeError` unless it is on the grid of `like`."""
    findings = Findings(Path(path))
    flat, header = decode(findings, None, max(like.array.size, MAX_VOXELS), read_set, constant=True)
    array, affine, _ = _oriented(flat, header, findings)
    _check_grid(array.shape, affine, like, findings)
    return array


def read_labels(
    path: Path | str,
    *,
    like: Volume | Labels | None = None,
    classes: Collection[int] | None = None,
) -> Labels:
    """Read a label map of whole numbers from 0; floats are fine where they are whole.

    `VolumeError` for a class that is not in `classes`, and unless the map is on the grid of `like`.
    """
    findings = Findings(Path(path))
    try:
        flat, header = decode(findings, None, MAX_VOXELS, read_classes, constant=True)
    except VolumeError as error:
        if error.code != "header.frames":
            raise
        raise findings.refuse(
            "labels.one_hot", "a map for each class; give one map of class numbers"
        ) from None
    check_labels(flat, classes, findings)
    array, affine, native = _oriented(flat, header, findings)
    if like is not None:
        _check_grid(array.shape, affine, like, findings)
    notices = tuple(findings.notices)
    return Labels(array, affine, voxel_sizes(affine), findings.path, notices, native)


def _oriented(
    flat: Shaped[np.ndarray, "voxels"], header: Header, findings: Findings
) -> tuple[Shaped[np.ndarray, "D H W"], Float[np.ndarray, "4 4"], NativeGrid]:
    """Turned to RAS, with the affine of the turned voxels and the grid they were stored on."""
    stored = header.affine(findings)
    shape = header.shape[:3]
    orientation = nib.io_orientation(stored)
    affine = stored @ nib.orientations.inv_ornt_aff(orientation, shape)
    array = nib.apply_orientation(flat.reshape(shape, order="F"), orientation)
    turns = tuple((int(axis), int(direction)) for axis, direction in orientation)
    native = NativeGrid(shape, stored, turns, header.nifti)
    return np.ascontiguousarray(array), affine, native


def _check_grid(
    shape: tuple[int, ...],
    affine: Float[np.ndarray, "4 4"],
    like: Volume | Labels,
    findings: Findings,
) -> None:
    if shape != like.array.shape:
        raise findings.refuse(
            "labels.shape",
            f"shape {shape}, that of {like.path} is {like.array.shape}; resample it to that",
        )
    apart = displacement(affine, like.affine, shape)
    if apart > MISPLACED * min(like.spacing):
        raise findings.refuse(
            "labels.affine",
            f"lies up to {apart:.4g} mm off {like.path}; resample it to that",
        )
