"""Weight gradient of a convolution: dW[t] = sum over rows of x[row under tap t]^T dy[row].

A program holds one strip of dy rows and loops over GROUPS x TAPS taps: TAPS taps stand side by
side, [TAPS * DEPTH, STRIP] @ [STRIP, COLS], so that 32 channels fill a tensor-core tile of 64 rows
or more, and every group has an accumulator of its own. dy is read once per program, x once per tap,
from L1 and L2. Rows are split over programs; each writes float32 partial sums, which a second
kernel adds in fixed order and turns into the layout of the weight: no atomics, equal bits always.
The bias gradient, the column sums of dy, comes along in the programs of the first taps.
Counts per row: 2*T*CI*CO operations; T*CI + CO * programs over taps reads.
Letters: T taps, M rows of dy.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemae.kernels.launch import launch
from sparsemae.kernels.precision import precision
from sparsemae.kernels.tiles import Triple, power_of_2, tile
from sparsemae.kernels.triton_index import coordinates, locate


@triton.jit
def _columns(
    x_ptr, neighbors_ptr, n, z, y, x, live, tap0, ks,
    CI: tl.constexpr, IN_BLOCK: tl.constexpr, KERNEL: tl.constexpr, LOCAL: tl.constexpr,
    TAPS: tl.constexpr, DEPTH: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    """[STRIP, TAPS * DEPTH], the rows of x under taps tap0 and following."""
    T: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    if TAPS == 1:
        wanted = live & (tap0 < T)
        zt = z + tap0 // (KERNEL[1] * KERNEL[2])
        yt = y + tap0 // KERNEL[2] % KERNEL[1]
        xt = x + tap0 % KERNEL[2]
        if LOCAL:
            source = ((n * IN_BLOCK[0] + zt) * IN_BLOCK[1] + yt) * IN_BLOCK[2] + xt
            exists = wanted
        else:
            source, exists = locate(neighbors_ptr, n, zt, yt, xt, wanted, IN_BLOCK)
        values = tl.load(
            x_ptr + source[:, None] * CI + ks[None, :],
            mask=exists[:, None] & (ks < CI)[None, :],
            other=0.0,
        )
    else:
        taps = tap0 + tl.arange(0, TAPS)
        zt = z[:, None] + (taps // (KERNEL[1] * KERNEL[2]))[None, :]
        yt = y[:, None] + (taps // KERNEL[2] % KERNEL[1])[None, :]
        xt = x[:, None] + (taps % KERNEL[2])[None, :]
        wanted = live[:, None] & (taps < T)[None, :]
        source, exists = locate(neighbors_ptr, n[:, None], zt, yt, xt, wanted, IN_BLOCK)
        values = tl.load(
            x_ptr + source[:, :, None] * CI + ks[None, None, :],
            mask=exists[:, :, None] & (ks < CI)[None, None, :],
            other=0.0,
        ).reshape(STRIP, TAPS * DEPTH)
    return values


@triton.jit(do_not_specialize=["M", "per_split"])
def _wgrad_kernel(
    x_ptr,  # [M_in, CI]
    neighbors_ptr,  # [N, 27]
    dy_ptr,  # [M, CO]
    dw_ptr,  # [splits, T, CI, CO] float32
    db_ptr,  # [splits, CO] float32 or None
    M,
    per_split,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK: tl.constexpr,  # of dy
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TAPS: tl.constexpr,
    GROUPS: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
    STRIP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    T: tl.constexpr = KERNEL[0] * KERNEL[1] * KERNEL[2]
    IN_BLOCK: tl.constexpr = (BLOCK[0] * STRIDE[0], BLOCK[1] * STRIDE[1], BLOCK[2] * STRIDE[2])
    LOCAL: tl.constexpr = PADDING[0] + PADDING[1] + PADDING[2] == 0
    CHUNKS: tl.constexpr = (CI + DEPTH - 1) // DEPTH
    tap0 = tl.program_id(0) // CHUNKS * (TAPS * GROUPS)
    ks = tl.program_id(0) % CHUNKS * DEPTH + tl.arange(0, DEPTH)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    split = tl.program_id(2).to(tl.int64)
    accs = ()
    for _ in tl.static_range(GROUPS):
        accs = accs + (tl.zeros([TAPS * DEPTH, COLS], dtype=tl.float32),)
    db = tl.zeros([COLS], dtype=tl.float32)
    begin = tl.program_id(2) * per_split
    for row0 in range(begin, min(begin + per_split, M), STRIP):
        rows = row0 + tl.arange(0, STRIP)
        live = rows < M
        dy = tl.load(
            dy_ptr + rows.to(tl.int64)[:, None] * CO + cols[None, :],
            mask=live[:, None] & (cols < CO)[None, :],
            other=0.0,
        )
        if db_ptr is not None:
            if tl.program_id(0) == 0:
                db += tl.sum(dy.to(tl.float32), 0)
        n, z, y, x = coordinates(rows, BLOCK)
        z = z * STRIDE[0] - PADDING[0]
        y = y * STRIDE[1] - PADDING[1]
        x = x * STRIDE[2] - PADDING[2]
        added = ()
        ahead = _columns(
            x_ptr, neighbors_ptr, n, z, y, x, live, tap0, ks,
            CI, IN_BLOCK, KERNEL, LOCAL, TAPS, DEPTH, STRIP,
        )  # fmt: skip
        for group in tl.static_range(GROUPS):
            values = ahead
            if group + 1 < GROUPS:
                ahead = _columns(
                    x_ptr, neighbors_ptr, n, z, y, x, live, tap0 + (group + 1) * TAPS, ks,
                    CI, IN_BLOCK, KERNEL, LOCAL, TAPS, DEPTH, STRIP,
                )  # fmt: skip
            acc = tl.dot(tl.trans(values), dy, accs[group], input_precision=PRECISION)
            added = added + (acc,)
        accs = added
    for group in tl.static_range(GROUPS):
        taps = tap0 + group * TAPS + tl.arange(0, TAPS)
        at = (split * T + taps)[:, None, None] * CI + ks[None, :, None]
        inside = (taps < T)[:, None, None] & (ks < CI)[None, :, None]
        tl.store(
            dw_ptr + at * CO + cols[None, None, :],
            accs[group].reshape(TAPS, DEPTH, COLS),
            mask=inside & (cols < CO)[None, None, :],
        )
    if db_ptr is not None:
        if tl.program_id(0) == 0:
            tl.store(db_ptr + split * CO + cols, db, mask=cols < CO)


@triton.jit(do_not_specialize=["splits"])
def _add_weights_kernel(
    partial_ptr,  # [splits, T, CI, CO] float32
    dw_ptr,  # [CO, CI, T]
    splits,
    T: tl.constexpr,
    CI: tl.constexpr,
    CO: tl.constexpr,
    TAPS: tl.constexpr,
    COLS: tl.constexpr,
):
    k = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    taps = tl.arange(0, TAPS)
    mask = (cols < CO)[:, None] & (taps < T)[None, :]
    total = tl.zeros([COLS, TAPS], dtype=tl.float32)
    for split in range(splits):
        at = (split * T + taps.to(tl.int64)[None, :]) * CI + k
        total += tl.load(partial_ptr + at * CO + cols[:, None], mask=mask, other=0.0)
    out = dw_ptr + (cols[:, None].to(tl.int64) * CI + k) * T + taps[None, :]
    tl.store(out, total.to(dw_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _add_bias_kernel(
    partial_ptr,  # [splits, CO] float32
    db_ptr,  # [CO]
    splits,
    CO: tl.constexpr,
    COLS: tl.constexpr,
):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], dtype=tl.float32)
    for split in range(splits):
        total += tl.load(partial_ptr + split * CO + cols, mask=cols < CO, other=0.0)
    tl.store(db_ptr + cols, total.to(db_ptr.dtype.element_ty), mask=cols < CO)


def conv_wgrad(
    x: Tensor,
    neighbors: Tensor,
    dy: Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    *,
    wants_bias: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the weight, [CO, CI, *kernel], and of the bias, [CO], or [0] if not wanted.

    From the input x [N, *block * stride, CI] and the output's gradient dy [N, *block, CO].
    """
    n, *block, co = dy.shape
    ci, taps, rows = x.shape[-1], math.prod(kernel), n * math.prod(block)
    form = tile("wgrad", x, k=ci, n=co, width=block[2], rows=rows, taps=taps)
    per_split = triton.cdiv(triton.cdiv(rows, form.splits), form.rows) * form.rows
    splits = triton.cdiv(rows, per_split) if rows else 0
    chunks = triton.cdiv(ci, form.depth)
    partial = x.new_empty(splits, taps, ci, co, dtype=torch.float32)
    bias_partial = x.new_empty(splits, co, dtype=torch.float32) if wants_bias else None
    launch(
        _wgrad_kernel,
        (
            triton.cdiv(taps, form.taps * form.groups) * chunks,
            triton.cdiv(co, form.cols),
            splits,
        ),
        {
            "x_ptr": x,
            "neighbors_ptr": neighbors,
            "dy_ptr": dy,
            "dw_ptr": partial,
            "db_ptr": bias_partial,
            "M": rows,
            "per_split": per_split,
        },
        {
            "CI": ci,
            "CO": co,
            "BLOCK": tuple(block),
            "KERNEL": kernel,
            "STRIDE": stride,
            "PADDING": padding,
            "TAPS": form.taps,
            "GROUPS": form.groups,
            "DEPTH": form.depth,
            "COLS": form.cols,
            "STRIP": form.rows,
            "PRECISION": precision(x),
        },
        warps=form.warps,
        stages=form.stages,
    )
    cols = power_of_2(co, 1, 32)
    dw = x.new_empty(co, ci, *kernel)
    launch(
        _add_weights_kernel,
        (ci, triton.cdiv(co, cols)),
        {"partial_ptr": partial, "dw_ptr": dw, "splits": splits},
        {"T": taps, "CI": ci, "CO": co, "TAPS": triton.next_power_of_2(taps), "COLS": cols},
    )
    if bias_partial is None:
        return dw, x.new_empty(0)
    db = x.new_empty(co)
    launch(
        _add_bias_kernel,
        (triton.cdiv(co, 32),),
        {"partial_ptr": bias_partial, "db_ptr": db, "splits": splits},
        {"CO": co, "COLS": 32},
        warps=1,
    )
    return dw, db
