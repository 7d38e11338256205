"""Block-sparse convolution from library convolutions and GEMMs, with hand-written gradients.

Three exact forms, chosen by shape:
- every kernel axis 1: a GEMM over packed rows.
- halo: each block with the voxels around it becomes one image of a batched valid convolution.
- taps: the rows under each tap side by side (im2col) and one GEMM, for blocks of 1-2 voxels
  where the halo would outweigh the block.
The input is saved as it is; halos and taps are gathered again in the backward pass.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels.rows import linear, linear_weight_grad, own
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.torch_tables import halo_fold, halo_gather, tap_gather

# Halo voxels per block voxel from which taps win. Measured forward + backward, fp32, 54 blocks:
# 3.4 (4^3 blocks, 128 channels): 26 ms against 56; 8 (2^3, 256): 36 against 24; 27 (1^3): 16 / 5.
TAPS_FROM = 6.0
# Haloed bytes convolved at once on CPU: they stay in cache, and below malloc's mmap threshold
# of 32 MiB, above which every allocation is paged in afresh.
CHUNK_BYTES = 16 * 2**20


def conv3d(x: BlockTensor, weight: Tensor, bias: Tensor | None, stride) -> BlockTensor:
    kernel, stride = tuple(weight.shape[2:]), tuple(stride)
    if kernel == (1, 1, 1):
        sd, sh, sw = stride
        rows = x.features[:, ::sd, ::sh, ::sw]
        return x.with_values(linear(rows, weight.flatten(1), bias))
    low = tuple(k // 2 for k in kernel)
    high = tuple(k // 2 if s == 1 else 0 for k, s in zip(kernel, stride, strict=True))
    grown = [b + lo + hi for b, lo, hi in zip(x.block, low, high, strict=True)]
    form = _TapConv if _prefers_taps(x.block, grown, stride) else _HaloConv
    return x.with_values(form.apply(x.features, weight, bias, x.mask, stride, low, high))


def _prefers_taps(block, grown, stride) -> bool:
    return stride == (1, 1, 1) and math.prod(grown) >= TAPS_FROM * math.prod(block)


class _TapConv(torch.autograd.Function):
    """im2col and one GEMM. Letters: R = N*bd*bh*bw rows, T taps."""

    @staticmethod
    def forward(ctx, features, weight, bias, mask, stride, low, high):
        ctx.mask, ctx.has_bias = mask, bias is not None
        ctx.save_for_backward(features, weight)
        columns = _columns(features, mask, weight.shape[2:])
        flat = weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1)  # [Co, T*Ci]
        return own(linear(columns, flat, bias).view(*features.shape[:4], len(weight)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        (co, ci), kernel = weight.shape[:2], weight.shape[2:]
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            # gather the output gradient through the mirrored taps: weight as [Ci, T*Co]
            mirrored = weight.flip(2, 3, 4).permute(1, 2, 3, 4, 0).reshape(ci, -1)
            dx = linear(_columns(grad, ctx.mask, kernel), mirrored, None).view_as(features)
        rows = grad.reshape(-1, co)
        if ctx.needs_input_grad[1]:
            dw = linear_weight_grad(rows, _columns(features, ctx.mask, kernel))
            dw = dw.view(co, *kernel, ci).permute(0, 4, 1, 2, 3)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None, None, None, None


def _columns(features: Tensor, mask, kernel) -> Tensor:
    """[N, bd, bh, bw, C] -> [R, T*C], the rows under each tap."""
    rows, width = features.shape[:4].numel(), math.prod(kernel) * features.shape[4]
    taps = tap_gather(mask, tuple(features.shape[1:4]), tuple(kernel))
    return taps.rows(features, 0, len(mask)).view(rows, width)


class _HaloConv(torch.autograd.Function):
    """A valid convolution of every block grown by its halo."""

    @staticmethod
    def forward(ctx, features, weight, bias, mask, stride, low, high):
        features = features.contiguous()
        ctx.mask, ctx.args, ctx.has_bias = mask, (stride, low, high), bias is not None
        ctx.save_for_backward(features, weight)
        return _convolve(features, weight, bias, mask, stride, low, high)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight = ctx.saved_tensors
        stride, low, high = ctx.args
        grad = grad.contiguous()
        dx = dw = db = None
        if ctx.needs_input_grad[0] and stride == (1, 1, 1):
            mirrored = weight.flip(2, 3, 4).transpose(0, 1)
            dx = _convolve(grad, mirrored, None, ctx.mask, stride, low, high)
        elif ctx.needs_input_grad[0]:
            dx = _strided_input_grad(grad, features.shape, weight, ctx.mask, *ctx.args)
        if ctx.needs_input_grad[1]:
            dw = torch.zeros_like(weight)
            for first, last, haloed in _chunks(features, ctx.mask, low, high):
                wanted = (False, True, False)
                dw += _convolution_backward(grad[first:last], haloed, weight, stride, wanted)[1]
        if ctx.has_bias and ctx.needs_input_grad[2]:
            db = grad.reshape(-1, len(weight)).sum(0)
        return dx, dw, db, None, None, None, None


def _convolve(features, weight, bias, mask, stride, low, high) -> Tensor:
    outputs = [
        _channels_last(torch.nn.functional.conv3d(_channels_first(h), weight, bias, stride))
        for _, _, h in _chunks(features, mask, low, high)
    ]
    if not outputs:
        block = [b // s for b, s in zip(features.shape[1:4], stride, strict=True)]
        return features.new_zeros(0, *block, weight.shape[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _strided_input_grad(grad, shape, weight, mask, stride, low, high) -> Tensor:
    block, channels = tuple(shape[1:4]), shape[4]
    grown = [b + lo + hi for b, lo, hi in zip(block, low, high, strict=True)]
    if not len(mask):
        return grad.new_zeros(shape)
    haloed = grad.new_empty(1).expand(shape[0], *grown, channels)  # only its shape is read
    dh = _convolution_backward(grad, haloed, weight, stride, (True, False, False))[0]
    dh = _channels_last(dh)  # [N, Ld, Lh, Lw, C]
    inner = tuple(slice(lo, lo + b) for lo, b in zip(low, block, strict=True))
    dx = dh[:, inner[0], inner[1], inner[2]].clone(memory_format=torch.contiguous_format)
    fold = halo_fold(mask, block, low, high)
    fold.add(dx.view(-1, channels), dh.view(-1, channels))
    return dx


def _convolution_backward(grad, haloed, weight, stride, wanted):
    return torch.ops.aten.convolution_backward(
        *(_channels_first(grad), _channels_first(haloed), weight, [weight.shape[0]], stride),
        *((0, 0, 0), (1, 1, 1), False, (0, 0, 0), 1, wanted),
    )


def _chunks(features, mask, low, high):
    """Runs of blocks with their halo: (first, last, [n, Ld, Lh, Lw, C])."""
    n, *block, channels = features.shape
    grown = [b + lo + hi for b, lo, hi in zip(block, low, high, strict=True)]
    gather = halo_gather(mask, tuple(block), low, high)
    step = max(1, n)
    if features.device.type == "cpu":
        per_block = math.prod(grown) * channels * features.element_size()
        runs = -(-n * per_block // CHUNK_BYTES)
        # equal runs of an even length: two threads share the work of a run evenly
        step = max(2, -(-n // max(1, runs) // 2) * 2)
    for first in range(0, n, step):
        last = min(n, first + step)
        yield first, last, gather.rows(features, first, last).view(-1, *grown, channels)


def _channels_first(blocks: Tensor) -> Tensor:
    """[n, d, h, w, C] seen as [n, C, d, h, w]."""
    return blocks.permute(0, 4, 1, 2, 3)


def _channels_last(images: Tensor) -> Tensor:
    return own(images.permute(0, 2, 3, 4, 1).contiguous())
