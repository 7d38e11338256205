"""3x3x3 convolution that marches through planes: the fast form for wide blocks of few channels.

There L2 and shared memory bound the time, not arithmetic. A program owns ROWS voxels of a plane
(h, w) and walks along d. Each plane it loads, shifted by the nine taps of h and w, feeds three taps
of d into three rotating accumulators: 9 (b+2)/b reads per voxel and channel, not 27; most hit L1,
since the taps of a plane overlap. RESIDENT keeps all 27 weight tiles in shared memory (55 KB for 32
channels) and fetches the next tap's rows while the present ones are multiplied; otherwise both are
streamed. The epilogue adds the bias and, on request, takes the moments for the norm that follows.
Counts per result row: 54*CI*CO operations, 9 (b+2)/b * CI reads, CO writes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsemae.kernels.launch import launch
from sparsemae.kernels.precision import precision
from sparsemae.kernels.tiles import Tile
from sparsemae.kernels.triton_index import locate, merge


@triton.jit
def _weight(
    w_ptr, tap, ks, cols, CI: tl.constexpr, CO: tl.constexpr, STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr, MIRROR: tl.constexpr,
):  # fmt: skip
    """[DEPTH, COLS], the weights of one tap."""
    return tl.load(
        w_ptr
        + (26 - tap if MIRROR else tap) * (CI * CO)
        + ks[:, None] * STRIDE_K
        + cols[None, :] * STRIDE_N,
        mask=(ks < CI)[:, None] & (cols < CO)[None, :],
        other=0.0,
    )


@triton.jit
def _rows(x_ptr, neighbors_ptr, n, z, y, x, live, ks, tap, CI: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS, DEPTH], the rows of plane z under one of the nine taps of h and w."""
    source, exists = locate(neighbors_ptr, n, z, y + tap // 3 - 1, x + tap % 3 - 1, live, BLOCK)
    return tl.load(
        x_ptr + source[:, None] * CI + ks[None, :],
        mask=exists[:, None] & (ks < CI)[None, :],
        other=0.0,
    )


@triton.jit
def _plane_resident(
    x_ptr, neighbors_ptr, weights, n, z, y, x, live, above, here, below,
    CI: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr,
    ABOVE: tl.constexpr, HERE: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """`_plane` with the weights at hand, the next tap's rows fetched ahead."""
    ks = tl.arange(0, DEPTH)
    # A block is its own neighbour 13: this adds zero, but hides from the compiler that the index
    # arithmetic of nine taps is the same in every plane; kept in registers, it would spill.
    zero = (tl.load(neighbors_ptr + n * 27 + 13, mask=live, other=0) - n).to(tl.int32)
    y += zero
    x += zero
    ahead = _rows(x_ptr, neighbors_ptr, n, z, y, x, live, ks, 0, CI, BLOCK)
    for tap in tl.static_range(9):
        values = ahead
        if tap < 8:
            ahead = _rows(x_ptr, neighbors_ptr, n, z, y, x, live, ks, tap + 1, CI, BLOCK)
        if ABOVE:
            above = tl.dot(values, weights[tap], above, input_precision=PRECISION)
        if HERE:
            here = tl.dot(values, weights[tap + 9], here, input_precision=PRECISION)
        if BELOW:
            below = tl.dot(values, weights[tap + 18], below, input_precision=PRECISION)
    return above, here, below


@triton.jit
def _plane(
    x_ptr, neighbors_ptr, w_ptr, weights, n, z, y, x, live, cols, above, here, below,
    CI: tl.constexpr, CO: tl.constexpr, BLOCK: tl.constexpr, STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr, MIRROR: tl.constexpr, DEPTH: tl.constexpr, RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr, ABOVE: tl.constexpr, HERE: tl.constexpr, BELOW: tl.constexpr,
):  # fmt: skip
    """Add what input plane z gives to result planes z+1, z and z-1."""
    if RESIDENT:
        above, here, below = _plane_resident(
            x_ptr, neighbors_ptr, weights, n, z, y, x, live, above, here, below,
            CI, BLOCK, DEPTH, PRECISION, ABOVE, HERE, BELOW,
        )  # fmt: skip
    else:
        CHUNKS: tl.constexpr = (CI + DEPTH - 1) // DEPTH
        for step in range(9 * CHUNKS):
            tap = step // CHUNKS
            ks = step % CHUNKS * DEPTH + tl.arange(0, DEPTH)
            values = _rows(x_ptr, neighbors_ptr, n, z, y, x, live, ks, tap, CI, BLOCK)
            if ABOVE:
                weight = _weight(w_ptr, tap, ks, cols, CI, CO, STRIDE_K, STRIDE_N, MIRROR)
                above = tl.dot(values, weight, above, input_precision=PRECISION)
            if HERE:
                weight = _weight(w_ptr, tap + 9, ks, cols, CI, CO, STRIDE_K, STRIDE_N, MIRROR)
                here = tl.dot(values, weight, here, input_precision=PRECISION)
            if BELOW:
                weight = _weight(w_ptr, tap + 18, ks, cols, CI, CO, STRIDE_K, STRIDE_N, MIRROR)
                below = tl.dot(values, weight, below, input_precision=PRECISION)
    return above, here, below


@triton.jit(do_not_specialize=["N"])
def _march_kernel(
    x_ptr,  # [N * voxels, CI]
    neighbors_ptr,  # [N, 27]
    w_ptr,  # [27, ...] with strides STRIDE_K and STRIDE_N
    bias_ptr,  # [CO] or None
    y_ptr,  # [N * voxels, CO]
    moments_ptr,  # [programs, 2, CO] float32 or None
    N,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    MIRROR: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PLANES: tl.constexpr,
    RESIDENT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    AREA: tl.constexpr = BLOCK[1] * BLOCK[2]
    SEGMENTS: tl.constexpr = BLOCK[0] // PLANES
    q = tl.program_id(0) // SEGMENTS * ROWS + tl.arange(0, ROWS)  # voxels of all blocks' planes
    z0 = tl.program_id(0) % SEGMENTS * PLANES
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    n = (q // AREA).to(tl.int64)
    y = q % AREA // BLOCK[2]
    x = q % BLOCK[2]
    live = n < N
    weights = ()
    if RESIDENT:
        ks = tl.arange(0, DEPTH)
        for tap in tl.static_range(27):
            weights = weights + (_weight(w_ptr, tap, ks, cols, CI, CO, STRIDE_K, STRIDE_N, MIRROR),)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=cols < CO, other=0.0).to(tl.float32)
    else:
        bias = tl.zeros([COLS], dtype=tl.float32)
    mean = tl.zeros([COLS], dtype=tl.float32)
    squares = tl.zeros([COLS], dtype=tl.float32)
    nothing = tl.zeros([ROWS, COLS], dtype=tl.float32)
    out = (
        y_ptr + (((n * BLOCK[0] + z0) * BLOCK[1] + y) * BLOCK[2] + x)[:, None] * CO + cols[None, :]
    )
    mask = live[:, None] & (cols < CO)[None, :]

    here, above, below = _plane(
        x_ptr, neighbors_ptr, w_ptr, weights, n, z0 - 1, y, x, live, cols,
        nothing, nothing, nothing,
        CI, CO, BLOCK, STRIDE_K, STRIDE_N, MIRROR, DEPTH, RESIDENT, PRECISION, True, False, False,
    )  # fmt: skip
    for step in range(PLANES):
        above, here, below = _plane(
            x_ptr, neighbors_ptr, w_ptr, weights, n, z0 + step, y, x, live, cols,
            nothing, here, below,
            CI, CO, BLOCK, STRIDE_K, STRIDE_N, MIRROR, DEPTH, RESIDENT, PRECISION, True, True, True,
        )  # fmt: skip
        if step > 0:
            result = below + bias[None, :]
            tl.store(out + (step - 1) * (AREA * CO), result.to(y_ptr.dtype.element_ty), mask=mask)
            if moments_ptr is not None:
                mean, squares = merge(mean, squares, step - 1, result, live, ROWS)
        below = here
        here = above
    above, here, below = _plane(
        x_ptr, neighbors_ptr, w_ptr, weights, n, z0 + PLANES, y, x, live, cols,
        nothing, here, below,
        CI, CO, BLOCK, STRIDE_K, STRIDE_N, MIRROR, DEPTH, RESIDENT, PRECISION, False, False, True,
    )  # fmt: skip
    result = below + bias[None, :]
    tl.store(out + (PLANES - 1) * (AREA * CO), result.to(y_ptr.dtype.element_ty), mask=mask)
    if moments_ptr is not None:
        mean, squares = merge(mean, squares, PLANES - 1, result, live, ROWS)
        into = moments_ptr + tl.program_id(0).to(tl.int64) * (2 * CO) + cols
        tl.store(into, mean, mask=cols < CO)
        tl.store(into + CO, squares, mask=cols < CO)


def march_conv(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: Tile,
    *,
    mirror: bool = False,
    wants_moments: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Convolve x [N, *block, CI] with weight [27, CI, CO], or mirrored with [27, CO, CI].

    Returns the result and, if wanted and if every program lies in one block, the moments
    [programs, 2, CO] of equal runs of rows.
    """
    n, *block, ci = x.shape
    co = weight.shape[1] if mirror else weight.shape[2]
    planes = form.planes or block[0]
    area = block[1] * block[2]
    segments = block[0] // planes
    tiles = triton.cdiv(n * area, form.rows) * segments
    y = x.new_empty(n, *block, co)
    partials = None
    if wants_moments and area % form.rows == 0:
        partials = x.new_empty(tiles, 2, co, dtype=torch.float32)
    launch(
        _march_kernel,
        (tiles, triton.cdiv(co, form.cols)),
        {
            "x_ptr": x,
            "neighbors_ptr": neighbors,
            "w_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": y,
            "moments_ptr": partials,
            "N": n,
        },
        {
            "CI": ci,
            "CO": co,
            "BLOCK": tuple(block),
            "STRIDE_K": 1 if mirror else co,
            "STRIDE_N": ci if mirror else 1,
            "MIRROR": mirror,
            "ROWS": form.rows,
            "COLS": form.cols,
            "DEPTH": form.depth,
            "PLANES": planes,
            "RESIDENT": form.resident,
            "PRECISION": precision(x),
        },
        warps=form.warps,
        stages=form.stages,
    )
    return y, partials
