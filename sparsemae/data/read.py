"""The one guarded reader: a NIfTI file as a float32 volume in RAS orientation, or a clear refusal.

nibabel alone accepts damaged files (it never reads the gzip trailer), so the bytes are checked here
and nibabel only interprets them. D, H, W are voxels left to right, posterior to anterior, inferior
to superior. World coordinates are nibabel's choice: sform, else qform, else centred voxel sizes.
"""

import gzip
import logging
import math
import os
import stat
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float, Float32

from sparsemae.data.codes import VolumeError
from sparsemae.errors import UserError

SPACING_RANGE = (0.01, 50.0)  # mm; outside it the header's unit or number is wrong
SUFFIXES = (".nii.gz", ".nii")
_HEADER_BYTES = 352  # enough to sniff both NIfTI versions


@dataclass(frozen=True)
class Volume:
    """A volume in RAS orientation; `affine` maps its voxel indices to world mm."""

    array: Float32[np.ndarray, "D H W"]
    affine: Float[np.ndarray, "4 4"]
    spacing: tuple[float, float, float]  # mm along D, H, W
    path: Path  # where it was read from, for messages


def read_volume(path: Path | str) -> Volume:
    """Read a .nii or .nii.gz file, told apart by content; raise `VolumeError` if it is unfit.

    Trailing dimensions of size 1 are dropped, so a 4D file with one frame is a volume. Intensities
    are scaled by the header's slope and intercept.
    """
    path = Path(path)
    data = _contents(path)
    image = _interpret(path, data)
    shape = _check_header(path, image, len(data))
    affine = _check_affine(path, image)
    array = _intensities(path, image).reshape(shape)
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, shape)
    array = np.ascontiguousarray(nib.apply_orientation(array, orientation))
    return Volume(array, affine, voxel_sizes(affine), path)


def voxel_sizes(affine: Float[np.ndarray, "4 4"]) -> tuple[float, float, float]:
    """Millimetres from one voxel centre to the next along each array axis."""
    x, y, z = np.sqrt((np.asarray(affine, np.float64)[:3, :3] ** 2).sum(0)).tolist()
    return x, y, z


def find_volumes(sources: Sequence[Path]) -> list[Path]:
    """NIfTI files among `sources`: files as given, folders searched recursively by extension.

    Hidden files and folders are skipped; the result is sorted, each file once. A missing source, a
    folder without NIfTI and a given file that is not NIfTI raise `UserError`.
    """
    found: dict[str, Path] = {}
    for source in map(Path, sources):
        if source.is_dir():
            files = _search(source)
            if not files:
                raise UserError(f"{source}: no .nii or .nii.gz file in this folder; check the path")
        else:
            _sniff(source)
            files = [source]
        found.update((os.path.abspath(file), file) for file in files)
    if not found:
        raise UserError("no source given; name a folder or a NIfTI file")
    return [found[key] for key in sorted(found)]


def volume_name(path: Path) -> str:
    """The file name without .nii or .nii.gz."""
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.name


def _search(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [
            Path(parent, name)
            for name in names
            if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return files


def _check_file(path: Path) -> None:
    """A regular, non-empty file; decided before opening, since a FIFO would block."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise VolumeError("container.missing", f"{path}: no such file; check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not stat.S_ISREG(status.st_mode):
        raise VolumeError("container.not_file", f"{path}: not a regular file; name a NIfTI file")
    if status.st_size == 0:
        raise VolumeError("container.empty", f"{path}: the file is empty; copy it again")


def _unreadable(path: Path, error: OSError) -> VolumeError:
    reason = error.strerror or error
    return VolumeError("container.unreadable", f"{path}: {reason}; check permissions and the disk")


def _contents(path: Path) -> bytes:
    """The file's bytes, decompressed to the end of the gzip stream so that its CRC is checked."""
    _check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from None
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except EOFError:
            raise VolumeError(
                "container.truncated", f"{path}: the gzip stream ends too early; copy it again"
            ) from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise VolumeError(
                "container.damaged", f"{path}: damaged gzip stream ({error}); copy it again"
            ) from None
    _nifti_version(path, data)
    return data


def _sniff(path: Path) -> None:
    """Raise `VolumeError` unless the file starts like NIfTI; reads its first bytes only."""
    _check_file(path)
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER_BYTES)
        if head[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                head = file.read(_HEADER_BYTES)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        head = b""
    except OSError as error:
        raise _unreadable(path, error) from None
    _nifti_version(path, head)


def _nifti_version(path: Path, head: bytes) -> int:
    """1 or 2 from the header's size and magic; `VolumeError` if it is neither."""
    sizes = {struct.unpack(order + "i", head[:4])[0] for order in "<>"} if len(head) >= 4 else set()
    if 348 in sizes and head[344:348] == b"n+1\0":
        return 1
    if 540 in sizes and head[4:8] == b"n+2\0":
        return 2
    if 348 in sizes and head[344:348] == b"ni1\0":
        raise VolumeError(
            "container.pair", f"{path}: a header of an .hdr/.img pair; convert it to one .nii file"
        )
    raise VolumeError("container.not_nifti", f"{path}: not a NIfTI file; convert it to .nii.gz")


def _interpret(path: Path, data: bytes) -> nib.Nifti1Image:
    kind = nib.Nifti1Image if _nifti_version(path, data) == 1 else nib.Nifti2Image
    log = nib.imageglobals.logger
    level = log.level
    log.setLevel(logging.CRITICAL)  # what nibabel would log is raised here as one line
    try:
        return kind.from_bytes(data)
    except Exception as error:  # nibabel raises many types on a damaged header
        raise VolumeError(
            "header.invalid", f"{path}: invalid NIfTI header ({_line(error)}); export it again"
        ) from None
    finally:
        log.setLevel(level)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_header(path: Path, image: nib.Nifti1Image, size: int) -> tuple[int, int, int]:
    """The shape [D, H, W] as stored, after checking dimensions, data type and payload length."""
    shape = tuple(int(n) for n in image.header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3 and min(shape[:3]) >= 2:
        raise VolumeError(
            "header.frames", f"{path}: {shape} holds several frames; split it into 3D volumes"
        )
    if len(shape) != 3 or min(shape) < 2:
        raise VolumeError(
            "header.dims", f"{path}: shape {shape}; a volume needs three sizes of at least 2"
        )
    dtype = image.header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise VolumeError(
            "header.dtype", f"{path}: voxel type {dtype}; convert it to one real number per voxel"
        )
    need = int(image.dataobj.offset) + math.prod(shape) * dtype.itemsize
    if size < need:
        raise VolumeError(
            "container.short", f"{path}: {size} bytes where the header needs {need}; copy it again"
        )
    return shape


def _check_affine(path: Path, image: nib.Nifti1Image) -> Float[np.ndarray, "4 4"]:
    affine = np.array(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all():
        raise VolumeError("geometry.affine", f"{path}: the affine is not finite; fix the header")
    spacing = voxel_sizes(affine)
    low, high = SPACING_RANGE
    if min(spacing) == 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise VolumeError("geometry.affine", f"{path}: the affine is singular; fix the header")
    if not all(low <= s <= high for s in spacing):
        sizes = ", ".join(f"{s:.4g}" for s in spacing)
        raise VolumeError(
            "geometry.spacing",
            f"{path}: voxel size {sizes} mm is outside [{low}, {high}]; fix the header's units",
        )
    return affine


def _intensities(path: Path, image: nib.Nifti1Image) -> Float32[np.ndarray, "..."]:
    try:
        with np.errstate(all="ignore"):
            array = np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except Exception as error:  # scaling or reading failed inside nibabel
        raise VolumeError(
            "intensity.unreadable", f"{path}: voxels unreadable ({_line(error)}); export it again"
        ) from None
    if bad := array.size - int(np.isfinite(array).sum()):
        raise VolumeError(
            "intensity.not_finite",
            f"{path}: {bad} of {array.size} voxels are NaN or infinite; replace them",
        )
    if array.min() == array.max():
        raise VolumeError(
            "intensity.constant", f"{path}: every voxel is {array.min():g}; remove the file"
        )
    return array
