"""Label maps and probabilities as NIfTI files on the grid, and with the header, of their image."""

import gzip
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from jaxtyping import Shaped

from sparsemae.data.codes import one_line
from sparsemae.data.reading.geometry import displacement, voxel_sizes
from sparsemae.data.reading.native import NativeGrid, to_native
from sparsemae.errors import UserError
from sparsemae.files import opened_atomically

LABEL_INTENT = 1002
_LARGEST_SIZE = (1 << 15) - 1  # of an axis, in NIfTI-1
_SQUARE = 0.01  # of a voxel: how far a qform, which knows no shear, may be off


def label_dtype(num_classes: int) -> np.dtype:
    """The smallest unsigned integer that holds class numbers 0 to `num_classes` - 1."""
    return np.min_scalar_type(num_classes - 1)


def write_like(
    path: Path,
    array: Shaped[np.ndarray, "*channels D H W"],
    native: NativeGrid,
    dtype: np.dtype | type,
) -> None:
    """Write a RAS array as `.nii` or `.nii.gz`, voxel for voxel on the grid of a file.

    The header is a copy of that file's, but for type, scaling, display range and intent, which is
    "label" for unsigned integers; extensions and frames are left out. Of other formats than NIfTI
    the geometry is kept. Channels become frames. `path` is old or new, never half.

    Raises:
        UserError: `path` has another ending.
        ValueError: The array is not on the grid, or `dtype` does not hold its values.
        OSError: It cannot be written.
    """
    dtype = np.dtype(dtype)
    packed = path.name.endswith(".nii.gz")
    if not packed and not path.name.endswith(".nii"):
        raise UserError(one_line(f"{path}: the name must end in .nii.gz or .nii"))
    if dtype.kind == "u" and (array.min() < 0 or array.max() > np.iinfo(dtype).max):
        raise ValueError(f"values {array.min()} to {array.max()} do not fit {dtype}")
    planes = _planes(to_native(array, native), dtype.newbyteorder("<"))
    with opened_atomically(path) as plain, _packed(plain) if packed else nullcontext(plain) as file:
        file.write(_header(native, array.shape[:-3], dtype).binaryblock + bytes(4))
        for plane in planes:
            file.write(plane)


def _packed(file: BinaryIO) -> gzip.GzipFile:
    """Without a time in it: equal voxels, equal bytes."""
    return gzip.GzipFile("", "wb", 6, file, mtime=0)


def _planes(stored: Shaped[np.ndarray, "*channels X Y Z"], dtype: np.dtype) -> Iterator[bytes]:
    """The voxels in the order of the file, a few at a time."""
    for frame in stored.reshape(-1, *stored.shape[-3:]) if stored.ndim > 3 else (stored,):
        for z in range(frame.shape[2]):
            yield frame[:, :, z].astype(dtype).tobytes(order="F")


def _header(native: NativeGrid, channels: tuple[int, ...], dtype: np.dtype) -> nib.Nifti1Header:
    """Little-endian, of a single file whose voxels follow at once."""
    source = native.header if native.header is not None else _new_header(native)
    fields = source.as_byteswapped("<")
    fields["magic"] = fields.single_magic  # of a pair, too
    fields["vox_offset"] = fields["sizeof_hdr"] + 4
    sizes = (*native.shape, *channels)
    fields["dim"] = [len(sizes), *sizes, *(1,) * (7 - len(sizes))]
    fields.set_data_dtype(dtype)
    fields["scl_slope"], fields["scl_inter"] = 1, 0
    fields["cal_min"] = fields["cal_max"] = 0
    fields["intent_code"] = LABEL_INTENT if dtype.kind == "u" else 0
    fields["intent_p1"] = fields["intent_p2"] = fields["intent_p3"] = 0
    fields["intent_name"] = b""
    return fields


def _new_header(native: NativeGrid) -> nib.Nifti1Header:
    """Of a volume that came in another format: its affine, in mm."""
    kind = nib.Nifti1Header if max(native.shape) <= _LARGEST_SIZE else nib.Nifti2Header
    fields = kind()
    fields.set_xyzt_units("mm")
    fields.set_sform(native.affine, code=1)
    fields.set_qform(native.affine, code=1)  # voxel sizes with it
    apart = displacement(fields.get_qform(), native.affine, native.shape)
    if apart > _SQUARE * min(voxel_sizes(native.affine)):
        fields["qform_code"] = 0
    return fields
