"""Dense definitions of every operator: slow, differentiable, any device, any dtype.

`y = op(x * m) * m` with the mask `m` at the resolution of the tensor. `unpack` gives `x * m`,
`pack` multiplies the result, for a `BlockTensor` and for a `DenseMasked` alike.
"""

import torch
import torch.nn.functional as F

from sparsemae.kernels.simulated import DenseMasked
from sparsemae.kernels.tensor import BlockTensor

Masked = BlockTensor | DenseMasked


def conv3d(x: Masked, weight, bias, stride) -> Masked:
    padding = [k // 2 for k in weight.shape[2:]]
    return x.pack(F.conv3d(x.unpack(), weight, bias, stride, padding), x.mask)


def conv_transpose3d(x: Masked, weight, bias, stride) -> Masked:
    return x.pack(F.conv_transpose3d(x.unpack(), weight, bias, stride), x.mask)


def avg_pool3d(x: Masked, window) -> Masked:
    return x.pack(F.avg_pool3d(x.unpack(), window), x.mask)


def max_pool3d(x: Masked, window) -> Masked:
    return x.pack(F.max_pool3d(x.unpack(), window), x.mask)


def instance_norm(x: Masked, weight, bias, eps) -> Masked:
    """Statistics over the visible voxels of each sample and channel, biased variance."""
    dense, visible = x.unpack(), x.mask.voxels(x.block).to(x.dtype)
    count = visible.sum((2, 3, 4), keepdim=True).clamp(min=1)
    centred = (dense - dense.sum((2, 3, 4), keepdim=True) / count) * visible
    variance = centred.square().sum((2, 3, 4), keepdim=True) / count
    scale = torch.rsqrt(variance + eps)
    if weight is not None:
        scale = scale * weight.view(-1, 1, 1, 1)
    y = centred * scale
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    return x.pack(y, x.mask)
