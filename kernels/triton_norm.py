"""Instance norm over visible voxels, with residual and LeakyReLU in the same pass.

Few rows: a program per sample and channel tile does everything, reading x again from L1. Else a
statistics kernel takes mean and squared deviations of row tiles, shifted by the tile's first row
and in two passes over registers, so that a mean that dwarfs the deviations costs no digits; a merge
kernel joins a sample's tiles (Chan et al.), in groups first where they are many; and one pass
writes the result. Moments from a convolution's epilogue replace the first kernel.
Counts per element: read x twice (once with moments) and the residual once, write y once, about 12
operations. Gradients are in `triton_norm_grad.py`.
Letters: B samples, M packed rows (a sample's are neighbours), C channels, P partials.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels import triton_rows
from sparsemae.kernels.launch import launch, operator
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.triton_norm_grad import affine, fits_one_launch, norm_backward, small_tile
from sparsemae.kernels.triton_rows import merge_groups, require_dtype, row_tile, sample_rows

STATISTICS_ELEMENTS, STATISTICS_WARPS = 16384, 8  # per program
APPLY_ELEMENTS, APPLY_WARPS = 8192, 8
SAMPLE_BYTES = 32768  # of x that a program holds


@triton.jit
def _moments(x, first, live, count):
    """Mean, less `first`, and squared deviations of the `count` live rows of a tile."""
    shifted = tl.where(live[:, None], x.to(tl.float32) - first[None, :], 0.0)
    mean = tl.sum(shifted, 0) / count
    deviation = tl.where(live[:, None], shifted - mean[None, :], 0.0)
    return mean, tl.sum(deviation * deviation, 0)


@triton.jit
def _merge(mean, squares, count, other_mean, other_squares, other_count):
    """The moments of two sets of rows together (Chan et al.); the first may be empty."""
    share = other_count / (count + other_count)
    difference = other_mean - mean
    mean += difference * share
    squares += other_squares + difference * difference * (count * share)
    return mean, squares, count + other_count


@triton.jit
def _normalize(x, residual_ptr, offsets, mask, mean, scale, shift, slope):
    """Normalised, scaled, shifted, with residual and activation where there are any."""
    y = (x - mean[None, :]) * scale[None, :] + shift[None, :]
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if slope is not None:
        y = tl.where(y > 0, y, y * slope)
    return y


@triton.jit
def _statistics_kernel(
    x_ptr,  # [M, C]
    partials_ptr,  # [B, chunks, 2, C]: mean and squared deviations of ROWS rows
    starts_ptr,  # [B+1]
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    chunk, sample = tl.program_id(0), tl.program_id(1)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    start = chunk.to(tl.int64) * ROWS
    if start < total:
        rows = start + tl.arange(0, ROWS)
        live = rows < total
        mask = live[:, None] & (cols < C)[None, :]
        first = tl.load(x_ptr + (begin + start) * C + cols, mask=cols < C, other=0.0)
        first = first.to(tl.float32)
        x = tl.load(x_ptr + (begin + rows)[:, None] * C + cols[None, :], mask=mask, other=0.0)
        count = tl.minimum(total - start, ROWS).to(tl.float32)
        mean, squares = _moments(x, first, live, count)
        part = sample.to(tl.int64) * tl.num_programs(0) + chunk
        out = partials_ptr + part * (2 * C) + cols
        tl.store(out, first + mean, mask=cols < C)
        tl.store(out + C, squares, mask=cols < C)


@triton.jit(do_not_specialize=["parts_per_sample", "rows"])
def _merge_kernel(
    partials_ptr,  # [B, parts_per_sample, 2, C] or, without gaps, [P, 2, C]
    starts_ptr,  # [B+1]
    out_ptr,  # [B, groups, 2, C], or mean and 1 / standard deviation [B, 2, C]
    parts_per_sample,  # -1: without gaps
    rows,  # of each partial, but for the last of a sample
    eps,
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    FINISH: tl.constexpr,  # one group: all
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, sample = tl.program_id(0), tl.program_id(1)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    before = sample.to(tl.int64) * parts_per_sample
    if parts_per_sample < 0:
        before = begin // rows
    parts = ((total + rows - 1) // rows).to(tl.int32)
    first = group * PARTS
    end = parts if FINISH else tl.minimum(parts, first + PARTS)
    any_part = (first < end) & (cols < C)
    origin = tl.load(partials_ptr + (before + first) * (2 * C) + cols, mask=any_part, other=0.0)
    mean = tl.zeros([COLS], dtype=tl.float32)  # less `origin`
    squares = tl.zeros([COLS], dtype=tl.float32)
    count = 0.0
    for start in range(first, end, PARTS):
        part = start + tl.arange(0, PARTS)
        mask = (part < end)[:, None] & (cols < C)[None, :]
        source = partials_ptr + (before + part)[:, None] * (2 * C) + cols[None, :]
        means = tl.load(source, mask=mask, other=0.0)
        deviations = tl.load(source + C, mask=mask, other=0.0)
        covered = tl.minimum(tl.maximum(total - part.to(tl.int64) * rows, 0), rows)
        covered = tl.where(part < end, covered, 0).to(tl.float32)
        step = tl.sum(covered, 0)
        shifted = tl.where(mask, means - origin[None, :], 0.0)
        shift = tl.sum(shifted * covered[:, None], 0) / step
        shifted -= shift[None, :]
        deviations += shifted * shifted * covered[:, None]
        mean, squares, count = _merge(mean, squares, count, shift, tl.sum(deviations, 0), step)
    mean += origin
    if FINISH:
        out = out_ptr + sample.to(tl.int64) * (2 * C) + cols
        variance = squares / tl.maximum(total.to(tl.float32), 1.0)
        tl.store(out, mean, mask=cols < C)
        tl.store(out + C, tl.rsqrt(variance + eps), mask=cols < C)
    elif first < parts:
        out = out_ptr + (sample.to(tl.int64) * tl.num_programs(0) + group) * (2 * C) + cols
        tl.store(out, mean, mask=cols < C)
        tl.store(out + C, squares, mask=cols < C)


@triton.jit
def _apply_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    stats_ptr,  # [B, 2, C]
    y_ptr,  # [M, C]
    starts_ptr,  # [B+1]
    slope,  # None: no activation
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    sample = tl.program_id(1)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    start = tl.program_id(0).to(tl.int64) * ROWS
    if start < total:
        stats = stats_ptr + sample.to(tl.int64) * (2 * C) + cols
        mean = tl.load(stats, mask=cols < C, other=0.0)
        rstd = tl.load(stats + C, mask=cols < C, other=0.0)
        scale, shift = affine(weight_ptr, bias_ptr, rstd, cols, C)
        rows = start + tl.arange(0, ROWS)
        mask = (rows < total)[:, None] & (cols < C)[None, :]
        offsets = (begin + rows)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = _normalize(x, residual_ptr, offsets, mask, mean, scale, shift, slope)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sample_kernel(
    x_ptr,  # [M, C]
    residual_ptr,  # [M, C] or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    stats_ptr,  # [B, 2, C]
    y_ptr,  # [M, C]
    starts_ptr,  # [B+1]
    eps,
    slope,  # None: no activation
    C: tl.constexpr,
    VOXELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """All of a sample: for so few rows that they stay in L1."""
    sample = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    begin, total = sample_rows(starts_ptr, sample, VOXELS)
    total = total.to(tl.int32)
    any_row = (total > 0) & (cols < C)
    first = tl.load(x_ptr + begin * C + cols, mask=any_row, other=0.0).to(tl.float32)
    mean = tl.zeros([COLS], dtype=tl.float32)  # less `first`
    squares = tl.zeros([COLS], dtype=tl.float32)
    count = 0.0
    for start in range(0, total, ROWS):
        rows = start + tl.arange(0, ROWS)
        live = rows < total
        mask = live[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + (begin + rows)[:, None] * C + cols[None, :], mask=mask, other=0.0)
        step = tl.minimum(total - start, ROWS).to(tl.float32)
        other, deviations = _moments(x, first, live, step)
        mean, squares, count = _merge(mean, squares, count, other, deviations, step)
    mean += first
    rstd = tl.rsqrt(squares / tl.maximum(count, 1.0) + eps)
    stats = stats_ptr + sample.to(tl.int64) * (2 * C) + cols
    tl.store(stats, mean, mask=cols < C)
    tl.store(stats + C, rstd, mask=cols < C)
    scale, shift = affine(weight_ptr, bias_ptr, rstd, cols, C)
    for start in range(0, total, ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows < total)[:, None] & (cols < C)[None, :]
        offsets = (begin + rows)[:, None] * C + cols[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        y = _normalize(x, residual_ptr, offsets, mask, mean, scale, shift, slope)
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def _statistics(x: Tensor, starts: Tensor, longest: int) -> tuple[Tensor, int]:
    """Moments [B, chunks, 2, C] of tiles, and how many rows a tile has."""
    samples, channels = starts.shape[0] - 1, x.shape[4]
    rows, columns = row_tile(x, STATISTICS_ELEMENTS)
    grid = (triton.cdiv(longest, rows), samples, triton.cdiv(channels, columns))
    partials = x.new_empty(samples, grid[0], 2, channels, dtype=torch.float32)
    launch(
        _statistics_kernel,
        grid,
        {"x_ptr": x, "partials_ptr": partials, "starts_ptr": starts},
        {"C": channels, "VOXELS": math.prod(x.shape[1:4]), "ROWS": rows, "COLS": columns},
        warps=STATISTICS_WARPS,
    )
    return partials, rows


def _join(x: Tensor, partials: Tensor, starts: Tensor, rows: int, longest: int, eps: float):
    """Mean and 1 / standard deviation [B, 2, C] from moments of `rows` rows each."""
    samples, channels = starts.shape[0] - 1, x.shape[4]
    groups = 0
    while groups != 1:
        groups = merge_groups(triton.cdiv(longest, rows))
        out = x.new_empty(samples, groups, 2, channels, dtype=torch.float32)
        launch(
            _merge_kernel,
            (groups, samples, triton.cdiv(channels, triton_rows.PART_COLUMNS)),
            {
                "partials_ptr": partials,
                "starts_ptr": starts,
                "out_ptr": out,
                "parts_per_sample": partials.shape[1] if partials.ndim == 4 else -1,
                "rows": rows,
                "eps": eps,
            },
            {
                "C": channels,
                "VOXELS": math.prod(x.shape[1:4]),
                "FINISH": groups == 1,
                "PARTS": triton_rows.PARTS,
                "COLS": triton_rows.PART_COLUMNS,
            },
        )
        partials, rows = out, rows * triton_rows.PARTS
    return partials.view(samples, 2, channels)


@operator(
    "norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? partials,"
    " Tensor starts, int rows, int longest, float eps, float? slope) -> (Tensor, Tensor)"
)
def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    partials: Tensor | None,
    starts: Tensor,
    rows: int,
    longest: int,
    eps: float,
    slope: float | None,
) -> tuple[Tensor, Tensor]:
    """The result, and mean and 1 / standard deviation [B, 2, C]; `longest` rows in a sample."""
    samples, channels = starts.shape[0] - 1, x.shape[4]
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    pointers = {"x_ptr": x, "residual_ptr": residual, "weight_ptr": weight, "bias_ptr": bias}
    constants = {"C": channels, "VOXELS": math.prod(x.shape[1:4])}
    if fits_one_launch(longest):
        tile_rows, columns, warps = small_tile(x, longest, SAMPLE_BYTES // x.element_size())
        stats = x.new_empty(samples, 2, channels, dtype=torch.float32)
        pointers |= {"stats_ptr": stats, "y_ptr": y, "starts_ptr": starts}
        launch(
            _sample_kernel,
            (samples, triton.cdiv(channels, columns)),
            pointers | {"eps": eps, "slope": slope},
            constants | {"ROWS": tile_rows, "COLS": columns},
            warps=warps,
        )
        return y, stats
    if partials is None:
        partials, rows = _statistics(x, starts, longest)
    stats = _join(x, partials, starts, rows, longest, eps)
    tile_rows, columns = row_tile(x, APPLY_ELEMENTS)
    pointers |= {"stats_ptr": stats, "y_ptr": y, "starts_ptr": starts}
    launch(
        _apply_kernel,
        (triton.cdiv(longest, tile_rows), samples, triton.cdiv(channels, columns)),
        pointers | {"slope": slope},
        constants | {"ROWS": tile_rows, "COLS": columns},
        warps=APPLY_WARPS,
    )
    return y, stats


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, partials, starts, rows, longest, eps, slope):
        y, stats = norm_forward(
            x, weight, bias, residual, partials, starts, rows, longest, eps, slope
        )
        # where the activation bent: from the result or, without a residual, computed again
        signs = y if slope is not None and residual is not None else None
        ctx.save_for_backward(x, signs, weight, bias, stats, starts)
        ctx.longest, ctx.slope = longest, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        bent = ctx.slope is not None  # else the residual's gradient is the upstream one
        dx, behind, parameters = norm_backward(
            grad.contiguous(),
            *ctx.saved_tensors,
            ctx.longest,
            ctx.slope,
            wants_x,
            wants_residual and bent,
            wants_weight or wants_bias,
        )
        return (
            dx if wants_x else None,
            parameters[1] if wants_weight else None,
            parameters[0] if wants_bias else None,
            (behind if bent else grad) if wants_residual else None,
            *(None,) * 6,
        )


def norm_act(
    x: BlockTensor,
    weight: Float[Tensor, "C"] | None,
    bias: Float[Tensor, "C"] | None,
    eps: float,
    slope: float | None = None,
    residual: BlockTensor | None = None,
    moments: tuple[Float[Tensor, "P 2 C"], int] | None = None,
) -> BlockTensor:
    """`leaky_relu(instance_norm(x) * weight + bias + residual, slope)`, without what is None.

    Args:
        slope: At least 0, so that the sign of the result tells where the activation bent.
        residual: On x's mask; another dtype is promoted as in a sum.
        moments: Mean and sum of squared deviations of every `int` rows of x, in order, all within
            one sample: spares a pass over x. None where P is 0.

    Raises:
        ValueError: A precision kernels do not have, a negative slope, a residual elsewhere.
    """
    added = None if residual is None else residual.features
    require_dtype("instance_norm", x.features, weight, bias, added)
    if slope is not None and not slope >= 0:
        raise ValueError(f"slope must be at least 0, got {slope}: use a separate LeakyReLU")
    if residual is not None:
        x.require_same_voxels(residual)
        if residual.channels != x.channels:
            raise ValueError(f"x has {x.channels} channels, residual has {residual.channels}")
        added = added.contiguous()
    partials, rows = moments if moments is not None and len(moments[0]) else (None, 1)
    assert partials is None or len(partials) * rows == math.prod(x.features.shape[:4])
    longest = max(x.mask.counts, default=0) * math.prod(x.block)
    features = _NormAct.apply(
        *(x.features.contiguous(), weight, bias, added, partials, x.mask.starts),
        *(rows, longest, float(eps), None if slope is None else float(slope)),
    )
    return x.with_values(features)


def instance_norm(
    x: BlockTensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> BlockTensor:
    return norm_act(x, weight, bias, eps)
