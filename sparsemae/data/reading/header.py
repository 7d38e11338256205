"""What the bytes of a volume mean, in any format: the result of reading a header."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from jaxtyping import Float

from sparsemae.data.codes import Findings


@dataclass(frozen=True, kw_only=True)
class Header:
    """Where the voxels are, how they are written, and how to find their place in the world."""

    file: Path  # that holds the voxels
    begin: int = 0  # bytes of the file before the stream with the voxels begins
    compressed: bool | None = None  # that stream; None: its first bytes tell
    offset: int  # bytes of the stream, inflated, before the first frame
    shape: tuple[int, ...]  # the first axis varies fastest; a fourth counts frames
    dtype: np.dtype
    slope: float = 1.0
    intercept: float = 0.0
    affine: Callable[[Findings], Float[np.ndarray, "4 4"]]  # voxel indices to RAS mm, checked
    nifti: nib.Nifti1Header | None = None  # every field as read, to be copied and never trusted

    @property
    def voxels(self) -> int:
        """Of one frame."""
        return math.prod(self.shape[:3])

    @property
    def frames(self) -> int:
        return math.prod(self.shape[3:])

    @property
    def frame_bytes(self) -> int:
        return self.voxels * self.dtype.itemsize

    @property
    def end(self) -> int:
        """Bytes of the stream up to the end of the last frame."""
        return self.offset + self.frames * self.frame_bytes


def plain_shape(sizes: list[int], findings: Findings) -> tuple[int, ...]:
    """`sizes` without trailing ones: three, or four with the frames last."""
    shape = tuple(sizes)
    if min(shape) < 1:
        raise findings.refuse("header.dims", f"shape {shape}; no size may be below 1")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 4:
        raise findings.refuse(
            "header.dims", f"shape {shape} has {len(shape)} dimensions; split it into 3D volumes"
        )
    if len(shape) < 3 or min(shape[:3]) < 2:
        raise findings.refuse(
            "header.dims", f"shape {shape}; a volume needs three sizes of at least 2"
        )
    return shape
