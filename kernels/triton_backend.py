"""The triton backend: our own kernels for NVIDIA (sm_80 and later) and AMD GPUs.

float32, bfloat16 and float16, sums in float32. No atomics: equal inputs give equal bits. Nothing
waits for the device or builds a table, so whole steps can be captured in a CUDA graph.
"""

import math

from torch import Tensor

from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.tiles import Triple
from sparsemae.kernels.triton_conv import conv3d, conv_transpose3d, convolve, pool_convolve
from sparsemae.kernels.triton_norm import instance_norm, norm_act
from sparsemae.kernels.triton_norm_grad import fits_one_launch
from sparsemae.kernels.triton_pool import avg_pool3d, max_pool3d

__all__ = [
    "avg_pool3d",
    "conv3d",
    "conv_norm_act",
    "conv_transpose3d",
    "instance_norm",
    "max_pool3d",
]


def conv_norm_act(
    x: BlockTensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Triple,
    window: Triple | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    slope: float | None,
    residual: BlockTensor | None,
) -> BlockTensor:
    """`leaky_relu(norm(conv(avg_pool(x))) + residual)`, without what is None.

    The convolution's epilogue takes the norm's statistics where its tiles lie in single blocks,
    unless a sample is so small that the norm holds it at once.
    """
    block = [b // s for b, s in zip(x.block, window or stride, strict=True)]  # a list is traced
    epilogue = not fits_one_launch(max(x.mask.counts, default=0) * math.prod(block))
    if window is None:
        features, moments = convolve(x, weight, bias, stride, wants_moments=epilogue)
    else:
        features, moments = pool_convolve(x, window, weight, bias, wants_moments=epilogue)
    y = x.with_values(features)
    rows = features.shape[:4].numel() // max(1, moments.shape[0])
    return norm_act(y, norm_weight, norm_bias, eps, slope, residual, (moments, rows))
