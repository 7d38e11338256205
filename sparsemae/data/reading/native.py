"""A file's own grid: what reading turned to RAS, remembered so that results can be turned back."""

from dataclasses import dataclass

import nibabel as nib
import numpy as np
from jaxtyping import Float, Shaped


@dataclass(frozen=True)
class NativeGrid:
    """How a file stores its voxels: all it takes to write others on the same grid."""

    shape: tuple[int, int, int]  # as stored, without frames; the first axis varies fastest
    affine: Float[np.ndarray, "4 4"]  # stored voxel indices to RAS mm
    orientation: tuple[tuple[int, int], ...]  # per stored axis: the RAS axis, and 1 or -1 along it
    header: nib.Nifti1Header | None = None  # as the file has it; None for NRRD and MetaImage


def to_native(
    array: Shaped[np.ndarray, "*channels D H W"], native: NativeGrid
) -> Shaped[np.ndarray, "*channels X Y Z"]:
    """A RAS array in the axis order and directions of the file, as a view.

    Raises:
        ValueError: The array is not on the file's grid.
    """
    leading = array.ndim - 3
    turned = np.transpose(
        array, (*range(leading), *(leading + axis for axis, _ in native.orientation))
    )
    if turned.shape[leading:] != native.shape:
        raise ValueError(
            f"an array of shape {array.shape} is not on a file's grid of {native.shape}"
        )
    return turned[(..., *(slice(None, None, direction) for _, direction in native.orientation))]
