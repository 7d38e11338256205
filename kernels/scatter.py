"""Move blocks between a dense batch and packed features.

`pack` keeps the visible blocks, `unpack` puts them back and fills the rest; each is the other's
gradient. No accumulation, so both are deterministic. On a GPU Triton's kernels do it, in the
precisions they have. Letters as in `mask.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.registry import choose
from sparsemae.kernels.rows import own


def pack_blocks(
    dense: Float[Tensor, "B C D H W"], mask: BlockMask, block: tuple[int, int, int]
) -> Float[Tensor, "N bd bh bw C"]:
    """The visible blocks of `dense`."""
    if choose("auto", dense.device, dense.dtype) == "triton":
        from sparsemae.kernels import triton_scatter

        return triton_scatter.pack_blocks(dense, mask, block)
    return _Pack.apply(dense, mask, block)


def unpack_blocks(
    features: Float[Tensor, "N bd bh bw C"], mask: BlockMask, fill: float | Float[Tensor, "C"]
) -> Float[Tensor, "B C D H W"]:
    """The dense batch with `fill` outside the visible blocks, channels-last in memory."""
    if choose("auto", features.device, features.dtype) == "triton":
        from sparsemae.kernels import triton_scatter

        return triton_scatter.unpack_blocks(features, mask, fill)
    if isinstance(fill, Tensor):
        return _Unpack.apply(features, fill.to(features.dtype), 0.0, mask)
    return _Unpack.apply(features, None, fill, mask)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dense, mask, block):
        ctx.mask = mask
        return _gather(dense, mask, block)

    @staticmethod
    def backward(ctx, grad):
        return _scatter(grad, ctx.mask, 0.0), None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, token, fill, mask):
        ctx.mask, ctx.block = mask, tuple(features.shape[1:4])
        return own(_scatter(features, mask, fill if token is None else token))

    @staticmethod
    def backward(ctx, grad):
        features = token = None
        if ctx.needs_input_grad[0]:
            features = _gather(grad, ctx.mask, ctx.block)
        if ctx.needs_input_grad[1]:
            per_cell = _blocks(grad, ctx.mask.grid, ctx.block).sum((4, 5, 6))  # [B Gd Gh Gw C]
            token = (per_cell * ~ctx.mask.visible[..., None]).sum((0, 1, 2, 3))
        return features, token, None, None


def _blocks(dense: Tensor, grid, block) -> Tensor:
    """[B, C, D, H, W] viewed as [B, Gd, Gh, Gw, bd, bh, bw, C]."""
    (gd, gh, gw), (bd, bh, bw) = grid, block
    split = dense.unflatten(4, (gw, bw)).unflatten(3, (gh, bh)).unflatten(2, (gd, bd))
    return split.permute(0, 2, 4, 6, 3, 5, 7, 1)


def _gather(dense: Tensor, mask: BlockMask, block) -> Tensor:
    return _blocks(dense, mask.grid, block)[mask.coords.long().unbind(1)].contiguous()


def _scatter(features: Tensor, mask: BlockMask, fill: float | Tensor) -> Tensor:
    batch, grid, (n, bd, bh, bw, channels) = mask.batch_size, mask.grid, features.shape
    size = [g * b for g, b in zip(grid, (bd, bh, bw), strict=True)]
    last = features.new_empty(batch, *size, channels)
    dense = last.permute(0, 4, 1, 2, 3)
    if n < batch * grid[0] * grid[1] * grid[2]:
        last.copy_(fill) if isinstance(fill, Tensor) else last.fill_(fill)
    _blocks(dense, grid, (bd, bh, bw))[mask.coords.long().unbind(1)] = features
    return dense
