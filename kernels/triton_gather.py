"""Convolution by gathering: an implicit GEMM over the rows under each tap.

For every kernel, stride and block width; the fast form for wide channels, and with `splits` the
form for blocks of 1-2 voxels. A program owns ROWS x COLS results and walks taps and channel chunks,
[ROWS, DEPTH] @ [DEPTH, COLS] per step, loads pipelined. Narrow inputs put TAPS taps side by side,
so that a stem of one channel is one product of depth 32. Few rows: the walk is split over
programs, whose float32 partial sums a second kernel adds in fixed order.
Counts per result row: 2*T*Ci*Co operations; T*Ci reads, from L2 but for what stays in L1; HBM sees
every row once. The weights are read once per ROWS rows.
Also the input gradient of stride 1 (mirrored taps), 1x1 convolutions, and the input gradient of
transposed convolutions. Letters: T taps, M result rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemae.kernels.launch import launch
from sparsemae.kernels.precision import precision
from sparsemae.kernels.tiles import Triple, tile
from sparsemae.kernels.triton_index import coordinates, locate, moments


@triton.jit(do_not_specialize=["M"])
def _gather_kernel(
    x_ptr,  # [M_in, CI]
    neighbors_ptr,  # [N, 27]
    w_ptr,  # [T, ...] with strides STRIDE_K and STRIDE_N
    bias_ptr,  # [CO] or None
    y_ptr,  # [M, CO], or [SPLITS, M, CO] float32
    moments_ptr,  # [M / ROWS, 2, CO] float32 or None
    M,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK: tl.constexpr,  # of the result
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    MIRROR: tl.constexpr,
    MEAN: tl.constexpr,  # average the rows under the taps first, one weight for all
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    TAPS: tl.constexpr,
    SPLITS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    IN_BLOCK: tl.constexpr = (BLOCK[0] * STRIDE[0], BLOCK[1] * STRIDE[1], BLOCK[2] * STRIDE[2])
    # padding 0: no tap leaves the block, no neighbour is looked up
    LOCAL: tl.constexpr = PADDING[0] + PADDING[1] + PADDING[2] == 0
    CHUNKS: tl.constexpr = (CI + DEPTH - 1) // DEPTH
    GROUPS: tl.constexpr = 1 if MEAN else (T + TAPS - 1) // TAPS
    STEPS: tl.constexpr = GROUPS * CHUNKS
    PER_SPLIT: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS

    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    live = rows < M
    n, z, y, x = coordinates(rows, BLOCK)
    z = z * STRIDE[0] - PADDING[0]
    y = y * STRIDE[1] - PADDING[1]
    x = x * STRIDE[2] - PADDING[2]
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    first = tl.program_id(2) * PER_SPLIT
    for step in range(first, min(first + PER_SPLIT, STEPS)):
        group = step // CHUNKS
        ks = step % CHUNKS * DEPTH + tl.arange(0, DEPTH)
        if MEAN:
            total = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
            for tap in tl.static_range(T):
                zt = z + tap // (KERNEL[1] * KERNEL[2])
                yt = y + tap // KERNEL[2] % KERNEL[1]
                xt = x + tap % KERNEL[2]
                source = ((n * IN_BLOCK[0] + zt) * IN_BLOCK[1] + yt) * IN_BLOCK[2] + xt
                total += tl.load(
                    x_ptr + source[:, None] * CI + ks[None, :],
                    mask=live[:, None] & (ks < CI)[None, :],
                    other=0.0,
                ).to(tl.float32)
            values = (total * (1.0 / T)).to(x_ptr.dtype.element_ty)
            weights = tl.load(
                w_ptr + ks[:, None] * STRIDE_K + cols[None, :] * STRIDE_N,
                mask=(ks < CI)[:, None] & (cols < CO)[None, :],
                other=0.0,
            )
        elif TAPS == 1:
            zt = z + group // (KERNEL[1] * KERNEL[2])
            yt = y + group // KERNEL[2] % KERNEL[1]
            xt = x + group % KERNEL[2]
            if LOCAL:
                source = ((n * IN_BLOCK[0] + zt) * IN_BLOCK[1] + yt) * IN_BLOCK[2] + xt
                exists = live
            else:
                source, exists = locate(neighbors_ptr, n, zt, yt, xt, live, IN_BLOCK)
            values = tl.load(
                x_ptr + source[:, None] * CI + ks[None, :],
                mask=exists[:, None] & (ks < CI)[None, :],
                other=0.0,
            )
            tap = T - 1 - group if MIRROR else group
            weights = tl.load(
                w_ptr + tap * (CI * CO) + ks[:, None] * STRIDE_K + cols[None, :] * STRIDE_N,
                mask=(ks < CI)[:, None] & (cols < CO)[None, :],
                other=0.0,
            )
        else:
            taps = group * TAPS + tl.arange(0, TAPS)
            zt = z[:, None] + (taps // (KERNEL[1] * KERNEL[2]))[None, :]
            yt = y[:, None] + (taps // KERNEL[2] % KERNEL[1])[None, :]
            xt = x[:, None] + (taps % KERNEL[2])[None, :]
            wanted = live[:, None] & (taps < T)[None, :]
            source, exists = locate(neighbors_ptr, n[:, None], zt, yt, xt, wanted, IN_BLOCK)
            values = tl.load(
                x_ptr + source[:, :, None] * CI + ks[None, None, :],
                mask=exists[:, :, None] & (ks < CI)[None, None, :],
                other=0.0,
            ).reshape(ROWS, TAPS * DEPTH)
            tap = T - 1 - taps if MIRROR else taps
            weights = tl.load(
                w_ptr
                + tap[:, None, None] * (CI * CO)
                + ks[None, :, None] * STRIDE_K
                + cols[None, None, :] * STRIDE_N,
                mask=(taps < T)[:, None, None]
                & (ks < CI)[None, :, None]
                & (cols < CO)[None, None, :],
                other=0.0,
            ).reshape(TAPS * DEPTH, COLS)
        acc = tl.dot(values, weights, acc, input_precision=PRECISION)
    out = y_ptr + rows.to(tl.int64)[:, None] * CO + cols[None, :]
    mask = live[:, None] & (cols < CO)[None, :]
    if SPLITS > 1:
        tl.store(out + tl.program_id(2) * M.to(tl.int64) * CO, acc, mask=mask)
    else:
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < CO, other=0.0).to(tl.float32)[None, :]
        tl.store(out, acc.to(y_ptr.dtype.element_ty), mask=mask)
        if moments_ptr is not None:
            mean, squares = moments(acc, live, ROWS)
            into = moments_ptr + tl.program_id(0).to(tl.int64) * (2 * CO) + cols
            tl.store(into, mean, mask=cols < CO)
            tl.store(into + CO, squares, mask=cols < CO)


@triton.jit(do_not_specialize=["M"])
def _add_splits_kernel(
    partial_ptr,  # [SPLITS, M, CO] float32
    bias_ptr,  # [CO] or None
    y_ptr,  # [M, CO]
    M,
    CO: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (rows < M)[:, None] & (cols < CO)[None, :]
    offsets = rows[:, None] * CO + cols[None, :]
    total = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for split in range(SPLITS):
        total += tl.load(partial_ptr + split * M.to(tl.int64) * CO + offsets, mask=mask, other=0.0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + cols, mask=cols < CO, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offsets, total.to(y_ptr.dtype.element_ty), mask=mask)


def gather_conv(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Triple,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    *,
    mirror: bool = False,
    swapped: bool = False,
    mean: bool = False,
    wants_moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve x [N, *block * stride, CI] with weight [T, CI, CO] to [N, *block, CO].

    `swapped` takes the weight as [T, CO, CI]; `mirror` does, and reverses its taps: the gradient
    of stride 1.
    `mean` averages the rows under all taps and multiplies by the one weight [1, CI, CO].
    Returns the result and, if wanted and if every tile lies in one block, the moments
    [tiles, 2, CO] of equal runs of rows.
    """
    ci, swapped = x.shape[-1], swapped or mirror
    co = weight.shape[1] if swapped else weight.shape[2]
    m, voxels = x.shape[0] * math.prod(block), math.prod(block)
    taps = 1 if mean else math.prod(kernel)
    form = tile("mean" if mean else "gather", x, k=ci, n=co, width=block[2], rows=m, taps=taps)
    y = x.new_empty(x.shape[0], *block, co)
    out = y if form.splits == 1 else x.new_empty(form.splits, m, co, dtype=torch.float32)
    whole = form.splits == 1 and voxels % form.rows == 0  # every tile lies in one block
    partials = None
    if wants_moments and whole:
        partials = x.new_empty(m // form.rows, 2, co, dtype=torch.float32)
    columns = triton.cdiv(co, form.cols)
    launch(
        _gather_kernel,
        (triton.cdiv(m, form.rows), columns, form.splits),
        {
            "x_ptr": x,
            "neighbors_ptr": neighbors,
            "w_ptr": weight,
            "bias_ptr": bias if form.splits == 1 else None,
            "y_ptr": out,
            "moments_ptr": partials,
            "M": m,
        },
        {
            "CI": ci,
            "CO": co,
            "BLOCK": block,
            "KERNEL": kernel,
            "STRIDE": stride,
            "PADDING": padding,
            "STRIDE_K": 1 if swapped else co,
            "STRIDE_N": ci if swapped else 1,
            "MIRROR": mirror,
            "MEAN": mean,
            "ROWS": form.rows,
            "COLS": form.cols,
            "DEPTH": form.depth,
            "TAPS": form.taps,
            "SPLITS": form.splits,
            "PRECISION": precision(x),
        },
        warps=form.warps,
        stages=form.stages,
    )
    if form.splits > 1:
        cols = min(triton.next_power_of_2(co), 64)
        launch(
            _add_splits_kernel,
            (triton.cdiv(m, 32), triton.cdiv(co, cols)),
            {"partial_ptr": out, "bias_ptr": bias, "y_ptr": y, "M": m},
            {"CO": co, "SPLITS": form.splits, "ROWS": 32, "COLS": cols},
        )
    return y, partials
