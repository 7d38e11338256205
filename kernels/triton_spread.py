"""The transpose of a strided convolution: from coarse voxels to the fine ones they came from.

Fine voxels of one parity (their position modulo the stride) are reached by the same taps, 1 to 8
of 27 for a stride of 2, so a program owns ROWS fine voxels of one parity and COLS channels, and
gathers [ROWS, DEPTH] coarse rows under each of its taps: no zero is multiplied, nothing is added
from two sides. Over all parities the taps number 27, as in the convolution.
Counts per coarse row: 2*T*K*N operations; T*K reads, from L2; fine rows are written once.
Serves the input gradient of a strided convolution and the transposed convolution, kernel = stride,
where every parity has one tap. Letters: T taps, R coarse rows.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsemae.kernels.launch import launch
from sparsemae.kernels.precision import precision
from sparsemae.kernels.tiles import Triple, tile
from sparsemae.kernels.triton_index import coordinates, locate


@triton.jit(do_not_specialize=["R"])
def _spread_kernel(
    x_ptr,  # [R, CI] coarse
    neighbors_ptr,  # [N, 27]
    w_ptr,  # [T, ...] with strides STRIDE_K and STRIDE_N
    bias_ptr,  # [CO] or None
    y_ptr,  # [R * parities, CO] fine
    R,
    CI: tl.constexpr,
    CO: tl.constexpr,
    BLOCK: tl.constexpr,  # coarse
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    STRIDE_K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    LOCAL: tl.constexpr = PADDING[0] + PADDING[1] + PADDING[2] == 0
    CHUNKS: tl.constexpr = (CI + DEPTH - 1) // DEPTH
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    parity_d = tl.program_id(2) // (STRIDE[1] * STRIDE[2])
    parity_h = tl.program_id(2) // STRIDE[2] % STRIDE[1]
    parity_w = tl.program_id(2) % STRIDE[2]
    live = rows < R
    n, z, y, x = coordinates(rows, BLOCK)
    # tap t of fine voxel f reads coarse voxel (f + padding - t) / stride: every stride-th tap fits
    first_d = (parity_d + PADDING[0]) % STRIDE[0]
    first_h = (parity_h + PADDING[1]) % STRIDE[1]
    first_w = (parity_w + PADDING[2]) % STRIDE[2]
    taps_d = (KERNEL[0] - first_d + STRIDE[0] - 1) // STRIDE[0]
    taps_h = (KERNEL[1] - first_h + STRIDE[1] - 1) // STRIDE[1]
    taps_w = (KERNEL[2] - first_w + STRIDE[2] - 1) // STRIDE[2]
    zs = z + (parity_d + PADDING[0]) // STRIDE[0]
    ys = y + (parity_h + PADDING[1]) // STRIDE[1]
    xs = x + (parity_w + PADDING[2]) // STRIDE[2]
    acc = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for step in range(taps_d * taps_h * taps_w * CHUNKS):
        which = step // CHUNKS
        ks = step % CHUNKS * DEPTH + tl.arange(0, DEPTH)
        d = which // (taps_h * taps_w)
        h = which // taps_w % taps_h
        w = which % taps_w
        if LOCAL:
            source = rows.to(tl.int64)
            exists = live
        else:
            source, exists = locate(neighbors_ptr, n, zs - d, ys - h, xs - w, live, BLOCK)
        values = tl.load(
            x_ptr + source[:, None] * CI + ks[None, :],
            mask=exists[:, None] & (ks < CI)[None, :],
            other=0.0,
        )
        tap = first_d + d * STRIDE[0]
        tap = tap * KERNEL[1] + first_h + h * STRIDE[1]
        tap = tap * KERNEL[2] + first_w + w * STRIDE[2]
        weights = tl.load(
            w_ptr + tap * (CI * CO) + ks[:, None] * STRIDE_K + cols[None, :] * STRIDE_N,
            mask=(ks < CI)[:, None] & (cols < CO)[None, :],
            other=0.0,
        )
        acc = tl.dot(values, weights, acc, input_precision=PRECISION)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + cols, mask=cols < CO, other=0.0).to(tl.float32)[None, :]
    fine = (n * BLOCK[0] + z) * STRIDE[0] + parity_d
    fine = (fine * BLOCK[1] + y) * STRIDE[1] + parity_h
    fine = (fine * BLOCK[2] + x) * STRIDE[2] + parity_w
    tl.store(
        y_ptr + fine[:, None] * CO + cols[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=live[:, None] & (cols < CO)[None, :],
    )


def spread_conv(
    x: Tensor,
    neighbors: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    *,
    swapped: bool = False,
) -> Tensor:
    """Coarse x [N, *block, CI] to fine [N, *block * stride, CO] with weight [T, CI, CO].

    `swapped` takes the weight as [T, CO, CI], the layout of the convolution being transposed.
    """
    n, *block, ci = x.shape
    co = weight.shape[1] if swapped else weight.shape[2]
    rows, taps = n * math.prod(block), math.prod(kernel)
    form = tile("spread", x, k=ci, n=co, width=block[2], rows=rows, taps=taps)
    y = x.new_empty(n, *(b * s for b, s in zip(block, stride, strict=True)), co)
    launch(
        _spread_kernel,
        (triton.cdiv(rows, form.rows), triton.cdiv(co, form.cols), math.prod(stride)),
        {
            "x_ptr": x,
            "neighbors_ptr": neighbors,
            "w_ptr": weight,
            "bias_ptr": bias,
            "y_ptr": y,
            "R": rows,
        },
        {
            "CI": ci,
            "CO": co,
            "BLOCK": tuple(block),
            "KERNEL": kernel,
            "STRIDE": stride,
            "PADDING": padding,
            "STRIDE_K": 1 if swapped else co,
            "STRIDE_N": ci if swapped else 1,
            "ROWS": form.rows,
            "COLS": form.cols,
            "DEPTH": form.depth,
            "PRECISION": precision(x),
        },
        warps=form.warps,
        stages=form.stages,
    )
    return y
