"""Gradients of the fused instance norm.

Pass 1 adds up g and g * xhat per sample and channel (g: the upstream gradient behind activation
and residual), as partial sums of row tiles added in a fixed order; pass 2 writes
dx = scale * (g - mean(g) - xhat * mean(g * xhat)). The residual's gradient is g: pass 1 writes it,
and pass 2 reads that instead of the upstream gradient and the signs. Where the activation bent is
read off y if there was a residual, else computed again from x. Few rows: both passes in one
program, the second read from L1.
Counts per element: read x and the upstream gradient twice, write dx; with a residual read x, g
twice and y once, write two. About 20 operations. Letters as in `triton_norm.py`.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from sparsemae.kernels.launch import launch, operator
from sparsemae.kernels.triton_rows import add_partials, row_tile, sample_rows

SMALL_ROWS = 4096  # of a sample that one program reads twice: with 16 channels 128 KB of L1
SMALL_LINE = 32  # bytes of channels in a tile then: one sector, for the sake of more programs
SUMS_ELEMENTS, SUMS_WARPS = 8192, 8
INPUT_ELEMENTS, INPUT_WARPS = 8192, 8
SAMPLE_ELEMENTS = 8192


def fits_one_launch(longest: int) -> bool:
    """Whether samples of at most so many rows are normalised by one program per channel tile."""
    return longest <= SMALL_ROWS


def small_tile(x: Tensor, longest: int, elements: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of at most `elements` values of few rows."""
    columns = min(triton.next_power_of_2(x.shape[4]), SMALL_LINE // x.element_size())
    rows = min(triton.next_power_of_2(max(longest, 1)), max(1, elements // columns))
    return rows, columns, min(8, max(1, rows * columns * 8 // elements))


@triton.jit
def affine(weight_ptr, bias_ptr, rstd, cols, C: tl.constexpr):
    """What centred values are multiplied by, and what is added."""
    scale = rstd
    if weight_ptr is not None:
        scale *= tl.load(weight_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + cols, mask=cols < C, other=0.0).to(tl.float32)
    else:
        shift = tl.zeros_like(rstd)
    return scale, shift


@triton.jit
def _behind(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope):
    """The upstream gradient behind the activation."""
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if slope is not None:
        if y_ptr is not None:
            sign = tl.load(y_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        else:
            sign = centred * scale[None, :] + shift[None, :]
        g = tl.where(sign > 0, g, g * slope)
    return g


@triton.jit
def _sums_kernel(
    grad_ptr,  # [M, C]
    x_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    stats_ptr,  # [B, 2, C]
    partials_ptr,  # [B, chunks, 2, C]: sums of g and of g * xhat
    g_ptr,  # [M, C] or None, written
    starts_ptr,  # [B+1]
    slope,  # None: no activation
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = (rows < total)[:, None] & (cols < C)[None, :]
    offsets = (begin + rows)[:, None] * C + cols[None, :]
    mean = tl.load(stats_ptr + sample * (2 * C) + cols, mask=cols < C, other=0.0)
    rstd = tl.load(stats_ptr + sample * (2 * C) + C + cols, mask=cols < C, other=0.0)
    scale, shift = affine(weight_ptr, bias_ptr, rstd, cols, C)
    centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
    g = _behind(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope)
    if g_ptr is not None:
        tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
    out = partials_ptr + (sample * tl.num_programs(0) + tl.program_id(0)) * (2 * C) + cols
    tl.store(out, tl.sum(g, 0), mask=cols < C)  # also zeros beyond the sample
    tl.store(out + C, tl.sum(g * centred, 0) * rstd, mask=cols < C)


@triton.jit
def _input_kernel(
    grad_ptr,  # [M, C]
    x_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    stats_ptr,  # [B, 2, C]
    sums_ptr,  # [B, 2, C]
    dx_ptr,  # [M, C]
    starts_ptr,  # [B+1]
    slope,  # None: no activation
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start < total:
        rows = start + tl.arange(0, ROWS)
        mask = (rows < total)[:, None] & (cols < C)[None, :]
        offsets = (begin + rows)[:, None] * C + cols[None, :]
        at = sample * (2 * C) + cols
        mean = tl.load(stats_ptr + at, mask=cols < C, other=0.0)
        rstd = tl.load(stats_ptr + at + C, mask=cols < C, other=0.0)
        scale, shift = affine(weight_ptr, bias_ptr, rstd, cols, C)
        count = total.to(tl.float32)
        mean_g = tl.load(sums_ptr + at, mask=cols < C, other=0.0) / count
        slant = tl.load(sums_ptr + at + C, mask=cols < C, other=0.0) / count * rstd
        centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        g = _behind(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope)
        dx = scale[None, :] * (g - mean_g[None, :] - centred * slant[None, :])
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sample_gradient_kernel(
    grad_ptr,  # [M, C]
    x_ptr,  # [M, C]
    y_ptr,  # [M, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    stats_ptr,  # [B, 2, C]
    sums_ptr,  # [B, 2, C], written
    dx_ptr,  # [M, C] or None
    g_ptr,  # [M, C] or None, written
    starts_ptr,  # [B+1]
    slope,  # None: no activation
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """All of a sample: for so few rows that they stay in L1."""
    sample = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    total = total.to(tl.int32)
    at = sample * (2 * C) + cols
    mean = tl.load(stats_ptr + at, mask=cols < C, other=0.0)
    rstd = tl.load(stats_ptr + at + C, mask=cols < C, other=0.0)
    scale, shift = affine(weight_ptr, bias_ptr, rstd, cols, C)
    sum_g = tl.zeros([COLS], dtype=tl.float32)
    sum_gx = tl.zeros([COLS], dtype=tl.float32)
    for start in range(0, total, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < total)[:, None] & (cols < C)[None, :]
        offsets = (begin + rows)[:, None] * C + cols[None, :]
        centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
        g = _behind(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope)
        if g_ptr is not None:
            tl.store(g_ptr + offsets, g.to(g_ptr.dtype.element_ty), mask=mask)
        sum_g += tl.sum(g, 0)
        sum_gx += tl.sum(g * centred, 0)
    sum_gx *= rstd
    tl.store(sums_ptr + at, sum_g, mask=cols < C)
    tl.store(sums_ptr + at + C, sum_gx, mask=cols < C)
    if dx_ptr is not None:
        count = tl.maximum(total, 1).to(tl.float32)
        mean_g = sum_g / count
        slant = sum_gx / count * rstd
        for start in range(0, total, ROWS):
            rows = start + tl.arange(0, ROWS)
            mask = (rows < total)[:, None] & (cols < C)[None, :]
            offsets = (begin + rows)[:, None] * C + cols[None, :]
            centred = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32) - mean[None, :]
            g = _behind(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope)
            dx = scale[None, :] * (g - mean_g[None, :] - centred * slant[None, :])
            tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@operator(
    "norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor? bias, Tensor stats,"
    " Tensor starts, int longest, float? slope, bool wants_x, bool wants_residual,"
    " bool wants_parameters) -> (Tensor, Tensor, Tensor)"
)
def norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    starts: Tensor,
    longest: int,
    slope: float | None,
    wants_x: bool,
    wants_residual: bool,
    wants_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual, and of bias and weight [2, C]; empty if not wanted."""
    samples, channels = starts.shape[0] - 1, x.shape[4]
    dx = x.new_empty(x.shape if wants_x else 0)
    g = grad.new_empty(x.shape if wants_residual else 0)
    inputs = {"grad_ptr": grad, "x_ptr": x, "y_ptr": y, "weight_ptr": weight, "bias_ptr": bias}
    inputs |= {"stats_ptr": stats}
    written = g if wants_residual else None
    constants = {"C": channels, "VOXELS": math.prod(x.shape[1:4])}
    if fits_one_launch(longest):
        rows, columns, warps = small_tile(x, longest, SAMPLE_ELEMENTS)
        sums = stats.new_empty(samples, 2, channels)
        launch(
            _sample_gradient_kernel,
            (samples, triton.cdiv(channels, columns)),
            {
                **inputs,
                "sums_ptr": sums,
                "dx_ptr": dx if wants_x else None,
                "g_ptr": written,
                "starts_ptr": starts,
                "slope": slope,
            },
            constants | {"ROWS": rows, "COLS": columns},
            warps=warps,
        )
        return dx, g, _over_samples(sums, wants_parameters)
    rows, columns = row_tile(x, SUMS_ELEMENTS)
    grid = (triton.cdiv(longest, rows), samples, triton.cdiv(channels, columns))
    partials = stats.new_empty(samples, grid[0], 2 * channels)
    launch(
        _sums_kernel,
        grid,
        {
            **inputs,
            "partials_ptr": partials,
            "g_ptr": written,
            "starts_ptr": starts,
            "slope": slope,
        },
        constants | {"ROWS": rows, "COLS": columns},
        warps=SUMS_WARPS,
    )
    if not (wants_x or wants_parameters):
        return dx, g, _over_samples(stats, False)
    sums = add_partials(partials).view(samples, 2, channels)
    if wants_x:
        rows, columns = row_tile(x, INPUT_ELEMENTS)
        if wants_residual:
            inputs |= {"grad_ptr": g, "y_ptr": None}
            slope = None
        launch(
            _input_kernel,
            (triton.cdiv(longest, rows), samples, triton.cdiv(channels, columns)),
            {**inputs, "sums_ptr": sums, "dx_ptr": dx, "starts_ptr": starts, "slope": slope},
            constants | {"ROWS": rows, "COLS": columns},
            warps=INPUT_WARPS,
        )
    return dx, g, _over_samples(sums, wants_parameters)


def _over_samples(sums: Tensor, wanted: bool) -> Tensor:
    """[B, 2, C] added up over samples, [2, C]."""
    if not wanted:
        return sums.new_empty(0)
    return add_partials(sums.view(1, sums.shape[0], -1)).view(sums.shape[1:])
