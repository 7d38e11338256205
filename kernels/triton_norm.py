"""Instance norm over visible voxels, with residual and LeakyReLU in the same pass.

Few rows: one program per sample and channel tile does everything, the second read from L1. Else
a statistics kernel takes mean and squared deviations of row tiles (shifted by the tile's first
row, then in two passes over registers: a mean that dwarfs the deviations costs no digits), a merge
kernel joins the tiles of a sample (Chan et al.), and one apply pass writes the result. Moments that
a convolution took in its epilogue replace the first.
Counts per element: read x twice (with moments once) and the residual once, write y once; about 12
operations.
Letters: B samples, M packed rows, C channels, P partials. Rows of a sample are neighbours.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels import triton_rows
from sparsemae.kernels.launch import launch, operator
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.triton_norm_grad import norm_backward
from sparsemae.kernels.triton_norm_math import load_affine, merge, moments, one_launch
from sparsemae.kernels.triton_rows import merge_groups, require_dtype, row_tile, sample_rows

Moments = tuple[Tensor, int]

STATISTICS = 16384  # elements per program
APPLY = 8192


@triton.jit
def _finish(
    x, residual_ptr, offsets, mask, mean, scale, bias, slope
):  # fmt: skip
    """Normalised, shifted, residual added, activated."""
    y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if slope is not None:
        y = tl.where(y > 0, y, y * slope)
    return y
