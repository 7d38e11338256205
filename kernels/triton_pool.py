"""Average and maximum over windows that tile the blocks.

A program owns a tile of results [rows, columns] and walks the taps of the window, which never
leaves a block. The maximum notes its tap in one byte, by which the gradient finds it without
reading x again. The gradients write every voxel under a window once: no zero fill, no atomics.
Counts per result: forward T reads (and a byte written), one write; backward one read (and a byte),
T writes; T operations either way. Rows of a window are sectors apart, lines are shared in L1.
Letters: T taps, M result rows, C channels.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels.launch import launch, operator
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.triton_index import coordinates
from sparsemae.kernels.triton_rows import require_dtype, row_tile

ELEMENTS, WARPS = 2048, 4  # per program


@triton.jit
def _under(tap: tl.constexpr, n, z, y, x, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """Row of x under one tap of the windows of result voxels (z, y, x)."""
    z = z * WINDOW[0] + tap // (WINDOW[1] * WINDOW[2])
    y = y * WINDOW[1] + tap // WINDOW[2] % WINDOW[1]
    x = x * WINDOW[2] + tap % WINDOW[2]
    return ((n * (BLOCK[0] * WINDOW[0]) + z) * (BLOCK[1] * WINDOW[1]) + y) * (
        BLOCK[2] * WINDOW[2]
    ) + x


@triton.jit
def _tile(M, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Voxels and channels of this program's results, where they lie, and which exist."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    n, z, y, x = coordinates(rows, BLOCK)
    mask = (rows < M)[:, None] & (cols < C)[None, :]
    return n, z, y, x, cols, rows[:, None] * C + cols[None, :], mask


@triton.jit(do_not_specialize=["M"])
def _average_kernel(
    x_ptr,  # [N * voxels, C]
    y_ptr,  # [M, C]
    M,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # of the result
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    n, z, y, x, cols, results, mask = _tile(M, C, BLOCK, ROWS, COLS)
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for tap in tl.static_range(T):
        offsets = _under(tap, n, z, y, x, BLOCK, WINDOW)[:, None] * C + cols[None, :]
        total += tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + results, (total * (1.0 / T)).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _maximum_kernel(
    x_ptr,  # [N * voxels, C]
    y_ptr,  # [M, C]
    taps_ptr,  # [M, C] uint8: which tap won
    M,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # of the result
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    n, z, y, x, cols, results, mask = _tile(M, C, BLOCK, ROWS, COLS)
    best = tl.full([ROWS, COLS], float("-inf"), dtype=tl.float32)
    taps = tl.zeros([ROWS, COLS], dtype=tl.int32)
    for tap in tl.static_range(T):
        offsets = _under(tap, n, z, y, x, BLOCK, WINDOW)[:, None] * C + cols[None, :]
        value = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        wins = (value > best) | (value != value)  # as in torch: the first, or the last NaN
        best = tl.where(wins, value, best)
        taps = tl.where(wins, tap, taps)
    tl.store(y_ptr + results, best.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(taps_ptr + results, taps.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _gradient_kernel(
    dy_ptr,  # [M, C]
    taps_ptr,  # [M, C] uint8, or None for the average
    dx_ptr,  # [N * voxels, C]
    M,
    C: tl.constexpr,
    BLOCK: tl.constexpr,  # of the result
    WINDOW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    T: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    n, z, y, x, cols, results, mask = _tile(M, C, BLOCK, ROWS, COLS)
    dy = tl.load(dy_ptr + results, mask=mask, other=0.0).to(tl.float32)
    if taps_ptr is None:
        dy *= 1.0 / T
    else:
        taps = tl.load(taps_ptr + results, mask=mask, other=0).to(tl.int32)
    for tap in tl.static_range(T):
        dx = dy
        if taps_ptr is not None:
            dx = tl.where(taps == tap, dy, 0.0)
        offsets = _under(tap, n, z, y, x, BLOCK, WINDOW)[:, None] * C + cols[None, :]
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel, pointers: dict[str, Tensor | None], result: Tensor, window: list[int]) -> None:
    channels, rows = result.shape[4], math.prod(result.shape[:4])
    vectors = channels * result.element_size() % 16 == 0
    # without vectors every value has its own address: fewer fit the registers
    tile_rows, columns = row_tile(result, ELEMENTS if vectors else ELEMENTS // 8)
    launch(
        kernel,
        (triton.cdiv(rows, tile_rows), triton.cdiv(channels, columns)),
        pointers | {"M": rows},
        {
            "C": channels,
            "BLOCK": tuple(result.shape[1:4]),
            "WINDOW": tuple(window),
            "ROWS": tile_rows,
            "COLS": columns,
        },
        warps=WARPS,
    )


def _pooled(x: Tensor, window: list[int]) -> list[int]:
    """Shape of the result for x [N, *block, C]."""
    block = (b // w for b, w in zip(x.shape[1:4], window, strict=True))
    return [x.shape[0], *block, x.shape[4]]


def _spread(dy: Tensor, window: list[int]) -> list[int]:
    """Shape of what gave dy [N, *block, C]."""
    block = (b * w for b, w in zip(dy.shape[1:4], window, strict=True))
    return [dy.shape[0], *block, dy.shape[4]]


@operator("avg_pool(Tensor x, int[] window) -> Tensor")
def avg_pool(x: Tensor, window: list[int]) -> Tensor:
    y = x.new_empty(_pooled(x, window))
    _launch(_average_kernel, {"x_ptr": x, "y_ptr": y}, y, window)
    return y


@operator("avg_pool_grad(Tensor dy, int[] window) -> Tensor")
def avg_pool_grad(dy: Tensor, window: list[int]) -> Tensor:
    dx = dy.new_empty(_spread(dy, window))
    _launch(_gradient_kernel, {"dy_ptr": dy, "taps_ptr": None, "dx_ptr": dx}, dy, window)
    return dx


@operator("max_pool(Tensor x, int[] window) -> (Tensor, Tensor)")
def max_pool(x: Tensor, window: list[int]) -> tuple[Tensor, Tensor]:
    """The maxima, and the number of the tap that each comes from."""
    y = x.new_empty(_pooled(x, window))
    taps = x.new_empty(y.shape, dtype=torch.uint8)
    _launch(_maximum_kernel, {"x_ptr": x, "y_ptr": y, "taps_ptr": taps}, y, window)
    return y, taps


@operator("max_pool_grad(Tensor dy, Tensor taps, int[] window) -> Tensor")
def max_pool_grad(dy: Tensor, taps: Tensor, window: list[int]) -> Tensor:
    dx = dy.new_empty(_spread(dy, window))
    _launch(_gradient_kernel, {"dy_ptr": dy, "taps_ptr": taps, "dx_ptr": dx}, dy, window)
    return dx


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, window):
        ctx.window = window
        return avg_pool(x, window)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return avg_pool_grad(grad.contiguous(), ctx.window), None


class _MaximumPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, window):
        y, taps = max_pool(x, window)
        ctx.window = window
        ctx.save_for_backward(taps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return max_pool_grad(grad.contiguous(), *ctx.saved_tensors, ctx.window), None


def avg_pool3d(x: BlockTensor, window: tuple[int, int, int]) -> BlockTensor:
    """Mean over windows, which must divide the block; gradients spread evenly."""
    require_dtype("avg_pool3d", x.features)
    return x.with_values(_AveragePool.apply(x.features.contiguous(), tuple(window)))


def max_pool3d(x: BlockTensor, window: tuple[int, int, int]) -> BlockTensor:
    """Maximum over windows, which must divide the block; gradients go to the first maximum."""
    require_dtype("max_pool3d", x.features)
    return x.with_values(_MaximumPool.apply(x.features.contiguous(), tuple(window)))
