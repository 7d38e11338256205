"""Blocks copied between a dense batch and packed features, and the gradient of the mask token.

Rows are walked block by block, so that a program of a wide block looks its place up once. `pack`
reads the visible voxels of a dense batch of any strides (16 bytes at a time along whichever of
channels and width is contiguous) and no others. `unpack` writes every voxel of a channels-last
batch once: features, or the fill. The token's gradient adds up the masked voxels' gradients in two
fixed stages.
Counts per channel: pack one read and one write per visible voxel; unpack a read per visible and a
write per voxel; the token's gradient one read per masked voxel. No arithmetic but its sum.
Letters: B samples, G cells, N visible ones, M rows, C channels, P partials.
"""

import math

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsemae.kernels.launch import launch, operator
from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.registry import TRITON_DTYPES
from sparsemae.kernels.rows import own
from sparsemae.kernels.triton_rows import LINE, add_partials, require_dtype

COPY_ELEMENTS, COPY_WARPS = 8192, 4  # per program
TOKEN_ELEMENTS, TOKEN_WARPS = 16384, 8
LEAST_ROWS = 32  # of a tile that is kept within one block

Triple = tuple[int, int, int]


@triton.jit
def _rows(M, VOXELS: tl.constexpr, ROWS: tl.constexpr):
    """Of this program's rows: block (one number where all share it), voxel in it, existence."""
    if VOXELS % ROWS == 0:
        block = (tl.program_id(0) // (VOXELS // ROWS)).to(tl.int64)
        inside = tl.program_id(0) % (VOXELS // ROWS) * ROWS + tl.arange(0, ROWS)
        live = tl.full([ROWS], True, dtype=tl.int1)
    else:
        rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        live = rows < M
        rows = tl.minimum(rows, M - 1)
        block = rows // VOXELS
        inside = (rows - block * VOXELS).to(tl.int32)
    return block, inside, live


@triton.jit
def _dense_offsets(
    b, d, h, w, inside, cols, stride_b, stride_c, stride_d, stride_h, stride_w,
    BLOCK: tl.constexpr, UNIT: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS], where voxels of cell (b, d, h, w) lie in a dense batch: see `_strides`."""
    z = d.to(tl.int64) * BLOCK[0] + inside // (BLOCK[1] * BLOCK[2])
    y = h.to(tl.int64) * BLOCK[1] + inside // BLOCK[2] % BLOCK[1]
    x = w.to(tl.int64) * BLOCK[2] + inside % BLOCK[2]
    rows = (b.to(tl.int64) * stride_b + z * stride_d + y * stride_h) * UNIT
    if INNER == "width":
        rows += x
    else:
        rows += x * stride_w * UNIT
    if INNER != "channels":
        cols = cols.to(tl.int64) * stride_c * UNIT
    return rows[:, None] + cols[None, :]


@triton.jit
def _cell(cell, Gd, Gh, Gw):
    """Sample and place on the grid of the cell with this number."""
    cell = cell.to(tl.int32)
    line = cell // Gw
    plane = line // Gh
    return plane // Gd, plane % Gd, line % Gh, cell % Gw


@triton.jit(
    do_not_specialize=[
        *("M", "next_block", "next_axis"),
        *("stride_b", "stride_c", "stride_d", "stride_h", "stride_w"),
    ]
)
def _pack_kernel(
    dense_ptr,  # [B, C, D, H, W] with strides
    coords_ptr,  # [N, 4] with strides: `nonzero` gives columns
    y_ptr,  # [M, C]
    M,
    next_block,
    next_axis,
    stride_b,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    VOXELS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    n, inside, live = _rows(M, VOXELS, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = live[:, None] & (cols < C)[None, :]
    place = coords_ptr + n * next_block
    b = tl.load(place)
    d = tl.load(place + next_axis)
    h = tl.load(place + next_axis * 2)
    w = tl.load(place + next_axis * 3)
    offsets = _dense_offsets(
        b, d, h, w, inside, cols, stride_b, stride_c, stride_d, stride_h, stride_w,
        BLOCK, UNIT, INNER,
    )  # fmt: skip
    values = tl.load(dense_ptr + offsets, mask=mask, other=0.0)
    packed = (n * VOXELS + inside)[:, None] * C + cols[None, :]
    tl.store(y_ptr + packed, values, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("M", "Gd", "Gh", "Gw", "stride_b", "stride_c", "stride_d", "stride_h", "stride_w")
    ]
)
def _unpack_kernel(
    x_ptr,  # [N * voxels, C]
    slots_ptr,  # [B, Gd, Gh, Gw]
    token_ptr,  # [C] or None
    dense_ptr,  # [B, C, D, H, W] with strides
    fill,  # where there is no token
    M,
    Gd,
    Gh,
    Gw,
    stride_b,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    VOXELS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    cell, inside, live = _rows(M, VOXELS, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = live[:, None] & (cols < C)[None, :]
    n = tl.load(slots_ptr + cell)
    packed = (n.to(tl.int64) * VOXELS + inside)[:, None] * C + cols[None, :]
    visible = ((n >= 0) & live)[:, None]
    values = tl.load(x_ptr + packed, mask=visible & mask, other=0.0)
    if token_ptr is not None:
        elsewhere = tl.load(token_ptr + cols, mask=cols < C, other=0.0)
    else:
        elsewhere = tl.full([COLS], fill, dtype=tl.float32)
    values = tl.where(visible, values, elsewhere.to(values.dtype)[None, :])
    b, d, h, w = _cell(cell, Gd, Gh, Gw)
    offsets = _dense_offsets(
        b, d, h, w, inside, cols, stride_b, stride_c, stride_d, stride_h, stride_w,
        BLOCK, UNIT, INNER,
    )  # fmt: skip
    tl.store(dense_ptr + offsets, values, mask=mask)


@triton.jit(
    do_not_specialize=[
        *("M", "Gd", "Gh", "Gw", "stride_b", "stride_c", "stride_d", "stride_h", "stride_w")
    ]
)
def _token_kernel(
    dense_ptr,  # [B, C, D, H, W] with strides
    slots_ptr,  # [B, Gd, Gh, Gw]
    partials_ptr,  # [P, C]
    M,
    Gd,
    Gh,
    Gw,
    stride_b,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
    INNER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    VOXELS: tl.constexpr = BLOCK[0] * BLOCK[1] * BLOCK[2]
    cell, inside, live = _rows(M, VOXELS, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    masked = (tl.load(slots_ptr + cell) < 0) & live
    mask = masked[:, None] & (cols < C)[None, :]
    b, d, h, w = _cell(cell, Gd, Gh, Gw)
    offsets = _dense_offsets(
        b, d, h, w, inside, cols, stride_b, stride_c, stride_d, stride_h, stride_w,
        BLOCK, UNIT, INNER,
    )  # fmt: skip
    values = tl.load(dense_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = partials_ptr + tl.program_id(0).to(tl.int64) * C + cols
    tl.store(out, tl.sum(values, 0), mask=cols < C)


def _strides(dense: Tensor) -> tuple[dict[str, int], dict[str, object]]:
    """Where the kernels find a voxel of [B, C, D, H, W]: strides, and what is fixed about them.

    The axis INNER has stride 1; the other strides count UNIT elements, which tells the compiler
    that they are multiples of it, and so that it may read 16 bytes at a time.
    """
    # the only index of an axis is 0, whatever its stride
    strides = [0 if n == 1 else s for n, s in zip(dense.shape, dense.stride(), strict=True)]
    inner = "channels" if strides[1] == 1 else "width" if strides[4] == 1 else "none"
    skipped = {"channels": 1, "width": 4, "none": None}[inner]
    unit = math.gcd(16, *(s for axis, s in enumerate(strides) if axis != skipped))
    names = ("stride_b", "stride_c", "stride_d", "stride_h", "stride_w")
    counted = {name: s // unit for name, s in zip(names, strides, strict=True)}
    return counted, {"UNIT": unit, "INNER": inner}


def _block_tile(x: Tensor, channels: int, voxels: int, elements: int) -> dict[str, int]:
    """A tile that stays within one block; a small one, for the registers' sake, if blocks are."""
    columns = min(triton.next_power_of_2(channels), LINE // x.element_size())
    rows = elements // columns
    divisor = voxels & -voxels  # the largest power of 2 in it
    rows = min(rows, divisor) if divisor >= LEAST_ROWS else rows // 4
    return {"ROWS": max(1, rows), "COLS": columns}


@operator("pack_blocks(Tensor dense, Tensor coords, int[] block) -> Tensor")
def pack(dense: Tensor, coords: Tensor, block: list[int]) -> Tensor:
    """[B, C, D, H, W] to [N, *block, C]."""
    blocks, channels, voxels = coords.shape[0], dense.shape[1], math.prod(block)
    y = dense.new_empty(blocks, *block, channels)
    strides, fixed = _strides(dense)
    tile = _block_tile(dense, channels, voxels, COPY_ELEMENTS)
    launch(
        _pack_kernel,
        (triton.cdiv(blocks * voxels, tile["ROWS"]), triton.cdiv(channels, tile["COLS"])),
        {
            "dense_ptr": dense,
            "coords_ptr": coords,
            "y_ptr": y,
            "M": blocks * voxels,
            "next_block": coords.stride(0),
            "next_axis": coords.stride(1),
            **strides,
        },
        {"C": channels, "BLOCK": tuple(block), **fixed, **tile},
        warps=COPY_WARPS,
    )
    return y


def _grid(slots: Tensor) -> dict[str, int]:
    return dict(zip(("Gd", "Gh", "Gw"), slots.shape[1:], strict=True))


@operator("unpack_blocks(Tensor features, Tensor slots, Tensor? token, float fill) -> Tensor")
def unpack(features: Tensor, slots: Tensor, token: Tensor | None, fill: float) -> Tensor:
    """[N, *block, C] to [B, D, H, W, C], masked voxels set to the token or number."""
    block, channels = tuple(features.shape[1:4]), features.shape[4]
    size = [g * b for g, b in zip(slots.shape[1:], block, strict=True)]
    last = features.new_empty(slots.shape[0], *size, channels)
    strides, fixed = _strides(last.permute(0, 4, 1, 2, 3))
    voxels, rows = math.prod(block), math.prod(last.shape[:4])
    tile = _block_tile(features, channels, voxels, COPY_ELEMENTS)
    launch(
        _unpack_kernel,
        (triton.cdiv(rows, tile["ROWS"]), triton.cdiv(channels, tile["COLS"])),
        {
            "x_ptr": features,
            "slots_ptr": slots,
            "token_ptr": token,
            "dense_ptr": last,
            "fill": fill,
            "M": rows,
            **_grid(slots),
            **strides,
        },
        {"C": channels, "BLOCK": block, **fixed, **tile},
        warps=COPY_WARPS,
    )
    return last


@operator("token_gradient(Tensor grad, Tensor slots, int[] block) -> Tensor")
def token_gradient(grad: Tensor, slots: Tensor, block: list[int]) -> Tensor:
    """Float32 sums [C] of the masked voxels of [B, C, D, H, W]."""
    channels, voxels = grad.shape[1], math.prod(block)
    rows = math.prod(slots.shape) * voxels
    strides, fixed = _strides(grad)
    tile = _block_tile(grad, channels, voxels, TOKEN_ELEMENTS)
    programs = triton.cdiv(rows, tile["ROWS"])
    partials = grad.new_empty(1, programs, channels, dtype=torch.float32)
    launch(
        _token_kernel,
        (programs, triton.cdiv(channels, tile["COLS"])),
        {
            "dense_ptr": grad,
            "slots_ptr": slots,
            "partials_ptr": partials,
            "M": rows,
            **_grid(slots),
            **strides,
        },
        {"C": channels, "BLOCK": tuple(block), **fixed, **tile},
        warps=TOKEN_WARPS,
    )
    return add_partials(partials).view(channels)


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dense, coords, slots, block):
        ctx.save_for_backward(slots)
        return pack(dense, coords, block)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slots,) = ctx.saved_tensors
        dense = unpack(grad.contiguous(), slots, None, 0.0)
        return dense.permute(0, 4, 1, 2, 3), None, None, None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, token, fill, coords, slots):
        ctx.save_for_backward(coords, slots)
        ctx.block = tuple(features.shape[1:4])
        return own(unpack(features, slots, token, fill).permute(0, 4, 1, 2, 3))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        coords, slots = ctx.saved_tensors
        features = pack(grad, coords, ctx.block) if ctx.needs_input_grad[0] else None
        token = token_gradient(grad, slots, ctx.block) if ctx.needs_input_grad[1] else None
        return features, token, None, None, None


def pack_blocks(
    dense: Float[Tensor, "B C D H W"], mask: BlockMask, block: Triple
) -> Float[Tensor, "N bd bh bw C"]:
    """The visible blocks of `dense`, whatever its strides; masked voxels are never read."""
    require_dtype("pack", dense)
    _require_device(mask, dense)
    return _Pack.apply(dense, mask.coords, mask.slots, tuple(block))


def unpack_blocks(
    features: Float[Tensor, "N bd bh bw C"], mask: BlockMask, fill: float | Float[Tensor, "C"]
) -> Float[Tensor, "B C D H W"]:
    """The dense batch with `fill` outside the visible blocks, channels-last in memory.

    A token may be of another precision: it is rounded where written, and its gradient is not.
    """
    require_dtype("unpack", features)
    _require_device(mask, features)
    token, number = None, 0.0
    if not isinstance(fill, Tensor):
        number = float(fill)
    elif fill.dtype in TRITON_DTYPES:
        token = fill.contiguous()
    else:
        token = fill.to(features.dtype).contiguous()
    return _Unpack.apply(features.contiguous(), token, number, mask.coords, mask.slots)


def _require_device(mask: BlockMask, x: Tensor) -> None:
    if mask.slots.device != x.device:
        raise ValueError(
            f"the mask is on {mask.slots.device}, the tensor on {x.device}: move the mask with "
            f"mask.to({str(x.device)!r})"
        )
