"""Block-sparse convolutions of the triton backend: which kernel runs, and their gradients.

- 3x3x3 of stride 1 on wide blocks of few channels: the plane march.
- every other convolution: the gather, split over taps and channels where rows are few.
- input gradients: the same two with mirrored taps for stride 1, the spread for strides.
- transposed convolutions: the spread forward, the gather backward; weights like a convolution's.
Weights are repacked to [T, Ci, Co] once per call and kept for the backward pass, in place of the
weight itself; the input gradient reads the same copy with its channels swapped.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels.launch import operator
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.tiles import Triple, march_tile
from sparsemae.kernels.triton_gather import gather_conv
from sparsemae.kernels.triton_march import march_conv
from sparsemae.kernels.triton_pool import avg_pool, avg_pool_grad
from sparsemae.kernels.triton_rows import require_dtype
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
    return _PoolConv3d.apply(features, x.mask.neighbors, weight, bias, tuple(window), wants_moments)


def check(x: BlockTensor, *parameters: Tensor | None) -> None:
    """Raise a ValueError unless the kernels have x's precision and all tensors share it."""
    require_dtype("a convolution", x.features)
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


@operator(
    "conv(Tensor x, Tensor neighbors, Tensor weight, Tensor? bias, int[] kernel, int[] stride,"
    " bool wants_moments) -> (Tensor, Tensor)"
)
def _forward(x, neighbors, weight, bias, kernel, stride, wants_moments):
    kernel, stride = tuple(kernel), tuple(stride)
    if stride == POINT and kernel == (3, 3, 3):
        form = march_tile(x, k=x.shape[4], n=weight.shape[2], block=tuple(x.shape[1:4]))
        if form is not None:
            y, moments = march_conv(x, neighbors, weight, bias, form, wants_moments=wants_moments)
            return y, _or_empty(y, moments)
    block = tuple(b // s for b, s in zip(x.shape[1:4], stride, strict=True))
    y, moments = gather_conv(
        *(x, neighbors, weight, bias, block, kernel, stride, _same_padding(kernel)),
        wants_moments=wants_moments,
    )
    return y, _or_empty(y, moments)


@operator(
    "conv_input_grad(Tensor dy, Tensor neighbors, Tensor weight, int[] kernel, int[] stride)"
    " -> Tensor"
)
def _input_grad(dy, neighbors, weight, kernel, stride):
    kernel, stride, block = tuple(kernel), tuple(stride), tuple(dy.shape[1:4])
    padding = _same_padding(kernel)
    if stride != POINT:
        return spread_conv(dy, neighbors, weight, None, kernel, stride, padding, swapped=True)
    if kernel == (3, 3, 3):
        form = march_tile(dy, k=dy.shape[4], n=weight.shape[1], block=block)
        if form is not None:
            return march_conv(dy, neighbors, weight, None, form, mirror=True)[0]
    return gather_conv(dy, neighbors, weight, None, block, kernel, stride, padding, mirror=True)[0]


@operator(
    "conv_weight_grad(Tensor x, Tensor neighbors, Tensor dy, int[] kernel, int[] stride,"
    " int[] padding, bool wants_bias) -> (Tensor, Tensor)"
)
def _weight_grad(x, neighbors, dy, kernel, stride, padding, wants_bias):
    triples = (tuple(t) for t in (kernel, stride, padding))
    return conv_wgrad(x, neighbors, dy, *triples, wants_bias=wants_bias)


@operator(
    "conv_transpose(Tensor x, Tensor neighbors, Tensor weight, Tensor? bias, int[] kernel)"
    " -> Tensor"
)
def _spread(x, neighbors, weight, bias, kernel):
    kernel = tuple(kernel)
    return spread_conv(x, neighbors, weight, bias, kernel, kernel, (0, 0, 0))


@operator(
    "conv_transpose_input_grad(Tensor dy, Tensor neighbors, Tensor weight, int[] kernel) -> Tensor"
)
def _spread_grad(dy, neighbors, weight, kernel):
    kernel = tuple(kernel)
    block = tuple(b // k for b, k in zip(dy.shape[1:4], kernel, strict=True))
    return gather_conv(
        *(dy, neighbors, weight, None, block, kernel, kernel, (0, 0, 0)), swapped=True
    )[0]


@operator(
    "pool_conv(Tensor x, Tensor neighbors, Tensor weight, Tensor? bias, int[] window,"
    " bool wants_moments) -> (Tensor, Tensor)"
)
def _pool_forward(x, neighbors, weight, bias, window, wants_moments):
    window = tuple(window)
    block = tuple(b // w for b, w in zip(x.shape[1:4], window, strict=True))
    y, moments = gather_conv(
        *(x, neighbors, weight, bias, block, window, window, (0, 0, 0)),
        mean=True,
        wants_moments=wants_moments,
    )
    return y, _or_empty(y, moments)


def _or_empty(y: Tensor, moments: Tensor | None) -> Tensor:
    """Operators return tensors only: no moments are an empty one."""
    return y.new_empty(0, 2, y.shape[4], dtype=torch.float32) if moments is None else moments


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
            db = grad.flatten(0, 3).sum(0, dtype=torch.float32).to(grad.dtype)
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
            dx = avg_pool_grad(pooled_grad, ctx.window)
        wants_bias = ctx.has_bias and ctx.needs_input_grad[3]
        if ctx.needs_input_grad[2] or wants_bias:
            pooled = avg_pool(features, ctx.window)
            dw, db = _weight_grad(pooled, neighbors, grad, POINT, POINT, (0, 0, 0), wants_bias)
        return dx, None, dw, db if wants_bias else None, None, None
