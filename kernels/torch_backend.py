"""The torch backend: library operators on packed blocks, no custom kernel, any device."""

import torch.nn.functional as F
from torch import Tensor

from sparsemae.kernels.rows import linear
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.torch_conv import conv3d
from sparsemae.kernels.torch_norm import instance_norm

__all__ = ["avg_pool3d", "conv3d", "conv_transpose3d", "instance_norm", "max_pool3d"]


def conv_transpose3d(x: BlockTensor, weight: Tensor, bias: Tensor | None, stride) -> BlockTensor:
    """One GEMM to all voxels of the small boxes, then interleave the boxes."""
    n, (bd, bh, bw), (kd, kh, kw) = len(x.mask), x.block, stride
    channels = weight.shape[1]
    flat = weight.permute(2, 3, 4, 1, 0).reshape(-1, weight.shape[0])  # [kd*kh*kw*Co, Ci]
    tiled = None if bias is None else bias.repeat(kd * kh * kw)
    boxes = linear(x.features, flat, tiled).view(n, bd, bh, bw, kd, kh, kw, channels)
    fine = boxes.permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.with_values(fine.reshape(n, bd * kd, bh * kh, bw * kw, channels))


def avg_pool3d(x: BlockTensor, window) -> BlockTensor:
    return _pool(F.avg_pool3d, x, window)


def max_pool3d(x: BlockTensor, window) -> BlockTensor:
    return _pool(F.max_pool3d, x, window)


def _pool(pool, x: BlockTensor, window) -> BlockTensor:
    """Windows tile the blocks, so blocks are pooled as a batch of small images."""
    if not len(x.mask):
        wd, wh, ww = window
        return x.with_values(x.features[:, ::wd, ::wh, ::ww])  # nothing, of the right shape
    pooled = pool(x.features.permute(0, 4, 1, 2, 3), window)
    return x.with_values(pooled.permute(0, 2, 3, 4, 1).contiguous())
