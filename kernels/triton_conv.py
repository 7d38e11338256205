"""Block-sparse convolutions of the triton backend: which kernel runs, and their gradients.

- 3x3x3 of stride 1 on wide blocks of few channels: the plane march.
- every other convolution: the gather, split over taps and channels where rows are few.
- input gradients: the same two with mirrored taps for stride 1, the spread for strides.
- transposed convolutions: the spread forward, the gather backward; weights like a convolution's.
Weights are repacked to [T, Ci, Co] once per call and kept for the backward pass, in place of the
weight itself; the input gradient reads the same copy with its channels swapped.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels.launch import operator
from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.registry import TRITON_DTYPES
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.tiles import Triple, march_tile
from sparsemae.kernels.triton_gather import gather_conv
from sparsemae.kernels.triton_march import march_conv
from sparsemae.kernels.triton_spread import spread_conv
from sparsemae.kernels.triton_wgrad import conv_wgrad

POINT = (1, 1, 1)


def conv3d(x: BlockTensor, weight: Tensor, bias: Tensor | None, stride: Triple) -> BlockTensor:
    return x.with_values(convolve(x, weight, bias, stride, wants_moments=False)[0])


def convolve(
    x: BlockTensor, weight: Tensor, bias: Tensor | None, stride: Triple, *, wants_moments: bool
) -> tuple[Tensor, Tensor]:
    """Features of the convolution and the moments of runs of its rows, see `norm_act`.

    The moments are [0, 2, Co] where they are not wanted or a tile spans several blocks.
    """
    check(x, weight, bias)
    features = x.features.contiguous()
    return _Conv3d.apply(features, x.mask.neighbors, weight, bias, tuple(stride), wants_moments)


def conv_transpose3d(
    x: BlockTensor, weight: Tensor, bias: Tensor | None, stride: Triple
) -> BlockTensor:
    check(x, weight, bias)
    features = x.features.contiguous()
    return x.with_values(_ConvTranspose3d.apply(features, x.mask.neighbors, weight, bias))


def pool_convolve(
    x: BlockTensor, window: Triple, weight: Tensor, bias: Tensor | None, *, wants_moments: bool
) -> tuple[Tensor, Tensor]:
    """Average over windows, then a 1x1x1 convolution, in one pass over x; and moments."""
    check(x, weight, bias)
    features = x.features.contiguous()
    return _PoolConv3d.apply(
        features, x.mask.neighbors, weight, bias, tuple(window), wants_moments
    )


def check(x: BlockTensor, *parameters: Tensor | None) -> None:
    """Raise a ValueError unless the kernels have x's precision and all tensors share it."""
    if x.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend 'triton' computes in float32, bfloat16 and float16, not {x.dtype}: "
            f"convert, or use backend='torch'"
        )
    for p in parameters:
        if p is not None and (p.dtype != x.dtype or p.device != x.device):
            raise ValueError(
                f"features are {x.dtype} on {x.device}, a parameter is {p.dtype} on {p.device}: "
                f"convert one of them, or run under torch.autocast"
            )


def _pack(weight: Tensor) -> Tensor:
    """[Co, Ci, kd, kh, kw] -> [T, Ci, Co]"""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


def _same_padding(kernel: Triple) -> Triple:
    return tuple(k // 2 for k in kernel)


class _Conv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, neighbors, weight, bias, stride, wants_moments):
        packed, kernel = _pack(weight), tuple(weight.shape[2:])
        y, moments = _forward(features, neighbors, packed, bias, kernel, stride, wants_moments)
        ctx.save_for_backward(features, neighbors, packed)
        ctx.kernel, ctx.stride, ctx.has_bias = kernel, stride, bias is not None
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        features, neighbors, packed = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _input_grad(grad, neighbors, packed, ctx.kernel, ctx.stride)
        wants_bias = ctx.has_bias and ctx.needs_input_grad[3]
        if ctx.needs_input_grad[2] or wants_bias:
            padding = _same_padding(ctx.kernel)
            dw, db = _weight_grad(
                features, neighbors, grad, ctx.kernel, ctx.stride, padding, wants_bias
            )
        return dx, None, dw, db if wants_bias else None, None, None


class _ConvTranspose3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, neighbors, weight, bias):
        kernel = tuple(weight.shape[2:])
        packed = weight.flatten(2).permute(2, 0, 1).contiguous()  # [T, Ci, Co]
        ctx.save_for_backward(features, neighbors, packed)
        ctx.kernel, ctx.has_bias = kernel, bias is not None
        return _spread(features, neighbors, packed, bias, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, neighbors, packed = ctx.saved_tensors
        grad, kernel = grad.contiguous(), ctx.kernel
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _spread_grad(grad, neighbors, packed, kernel)
        if ctx.needs_input_grad[2]:  # a strided convolution of grad would have this weight
            dw, _ = _weight_grad(grad, neighbors, features, kernel, kernel, (0, 0, 0), False)
        if ctx.has_bias and ctx.needs_input_grad[3]:
            db = _column_sums(grad)
        return dx, None, dw, db


class _PoolConv3d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, neighbors, weight, bias, window, wants_moments):
        packed = _pack(weight)
        y, moments = _pool_forward(features, neighbors, packed, bias, window, wants_moments)
        ctx.save_for_backward(features, neighbors, packed)
        ctx.window, ctx.has_bias = window, bias is not None
        ctx.mark_non_differentiable(moments)
        return y, moments

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        features, neighbors, packed = ctx.saved_tensors
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            pooled_grad = _input_grad(grad, neighbors, packed, POINT, POINT)
            dx = torch.ops.sparsemae.avg_pool_grad(pooled_grad, ctx.window)
        wants_bias = ctx.has_bias and ctx.needs_input_grad[3]
        if ctx.needs_input_grad[2] or wants_bias:
            pooled = torch.ops.sparsemae.avg_pool(features, ctx.window)
            dw, db = _weight_grad(
                pooled, neighbors, grad, POINT, POINT, (0, 0, 0), wants_bias
            )
        return dx, None, dw, db if wants_bias else None, None, None
