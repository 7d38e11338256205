"""What the memory-bound kernels share: tiles of packed rows, and sums of partial sums.

A program reads a tile [rows, columns] of one sample: up to 128 bytes of channels, so that a warp
reads whole lines, and as many rows as its registers hold. Where it writes a sum over the tile,
`add_partials` adds these up in a fixed order, 512 at a time.
Letters: S samples, P partials, W columns.
"""

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from sparsemae.kernels.launch import launch
from sparsemae.kernels.registry import TRITON_DTYPES

LINE = 128  # bytes of channels in a tile
PARTS = 512  # partials per step
PART_COLUMNS = 8  # one sector of 32 bytes: many programs of few steps
STEPS = 4  # that one program takes; more partials are first added up in groups of PARTS


@triton.jit
def sample_rows(starts_ptr, sample, VOXELS: tl.constexpr):
    """First packed row of a sample, and how many it has (int64)."""
    begin = tl.load(starts_ptr + sample).to(tl.int64) * VOXELS
    return begin, tl.load(starts_ptr + sample + 1).to(tl.int64) * VOXELS - begin


@triton.jit(do_not_specialize=["P"])
def _add_kernel(
    partials_ptr,  # [S, P, W]
    sums_ptr,  # [S, groups, W]
    P,
    W: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
):
    group, groups, sample = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * COLS + tl.arange(0, COLS)
    share = (P + groups - 1) // groups
    end = tl.minimum(P, (group + 1) * share)
    total = tl.zeros([PARTS, COLS], dtype=tl.float32)
    for start in range(group * share, end, PARTS):
        parts = start + tl.arange(0, PARTS)
        total += tl.load(
            partials_ptr + (sample * P + parts)[:, None] * W + cols[None, :],
            mask=(parts < end)[:, None] & (cols < W)[None, :],
            other=0.0,
        )
    tl.store(sums_ptr + (sample * groups + group) * W + cols, tl.sum(total, 0), mask=cols < W)


def add_partials(partials: Float[Tensor, "S P W"]) -> Float[Tensor, "S W"]:
    """Float32 sums over the second axis, the same bits in every run; zeros if P is 0."""
    while True:
        samples, parts, width = partials.shape
        groups = merge_groups(parts)
        sums = partials.new_empty(samples, groups, width)
        launch(
            _add_kernel,
            (groups, samples, triton.cdiv(width, PART_COLUMNS)),
            {"partials_ptr": partials, "sums_ptr": sums, "P": parts},
            {"W": width, "PARTS": PARTS, "COLS": PART_COLUMNS},
        )
        if groups == 1:
            return sums.view(samples, width)
        partials = sums


def merge_groups(parts: int) -> int:
    """Groups that one launch leaves of so many partials: one if a program can take them all."""
    return 1 if parts <= STEPS * PARTS else triton.cdiv(parts, PARTS)


def row_tile(x: Tensor, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of `elements` values of x [..., C]."""
    columns = min(triton.next_power_of_2(x.shape[-1]), LINE // x.element_size())
    return max(1, elements // columns), columns


def require_dtype(op: str, *tensors: Tensor | None) -> None:
    """Raise a ValueError for a precision that Triton kernels do not have."""
    for x in tensors:
        if x is not None and x.dtype not in TRITON_DTYPES:
            names = ", ".join(str(d).removeprefix("torch.") for d in TRITON_DTYPES)
            raise ValueError(
                f"{op}: backend 'triton' takes {names}, not {str(x.dtype).removeprefix('torch.')}: "
                f"convert, or use backend='torch'"
            )
