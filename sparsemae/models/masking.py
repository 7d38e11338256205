"""Which cells a step hides and scores, and whether cell, patch and network fit together."""

from dataclasses import dataclass

import torch

from sparsemae.errors import UserError
from sparsemae.kernels import BlockMask
from sparsemae.triples import Triple

Decode = str | float


@dataclass(frozen=True)
class Masks:
    """What one step sees and what it is scored on; disjoint cells of one grid."""

    visible: BlockMask
    scored: BlockMask

    def __post_init__(self):
        on_host = self.visible.visible.device.type == "cpu"  # elsewhere it would wait for a device
        if on_host and (self.visible.visible & self.scored.visible).any():
            raise ValueError("scored cells must be masked, but some of them are visible")

    def to(self, device: torch.device | str) -> "Masks":
        return Masks(self.visible.to(device), self.scored.to(device))


def stage_blocks(block_size: Triple, stage_strides) -> list[Triple | None]:
    """Voxels per mask cell at each stage; None where a stage is coarser than the mask grid.

    Raises:
        UserError: A stage would cut a voxel in two.
    """
    if len(block_size) != 3 or any(type(n) is not int or n < 1 for n in block_size):
        raise UserError(
            f"mask.block_size {block_size}: needs one positive number of voxels, or three"
        )
    blocks = []
    for level, stride in enumerate(stage_strides):
        axes = list(zip(block_size, stride, strict=True))
        dense = any(cell < s for cell, s in axes)
        whole = all(cell % s == 0 or (cell < s and s % cell == 0) for cell, s in axes)
        if not whole:
            raise UserError(
                f"mask.block_size {block_size} does not fit stage {level} of the network with "
                f"stride {tuple(stride)}: use {tuple(stage_strides[-1])} or a multiple of it"
            )
        blocks.append(None if dense else tuple(cell // s for cell, s in axes))
    return blocks


def check_grid(patch_size: Triple, block_size: Triple, mask_ratio: float) -> Triple:
    """Mask cells per axis of a patch.

    Raises:
        UserError: The patch is no whole number of cells, or the ratio shows or hides none.
    """
    axes = list(zip(patch_size, block_size, strict=True))
    if any(p % c or p < c for p, c in axes):
        below, above = nearest_multiples(patch_size, block_size)
        raise UserError(
            f"data.patch_size {tuple(patch_size)} is no whole number of mask cells of "
            f"{tuple(block_size)} voxels: the nearest valid sizes are {below} and {above}"
        )
    grid = tuple(p // c for p, c in axes)
    total = grid[0] * grid[1] * grid[2]
    if total == 1:
        raise UserError(
            f"data.patch_size {tuple(patch_size)} is a single mask cell: at least one must be "
            f"visible and one masked, so use a larger patch or a smaller mask.block_size"
        )
    if not 0 < mask_ratio < 1 or not 0 < round(total * mask_ratio) < total:
        least = -(-1000 // total) / 1000  # one cell, in thousandths, upwards
        raise UserError(
            f"mask.ratio {mask_ratio} leaves no visible or no masked cell of the {total} in a "
            f"patch: choose one from {least} to {1 - least:.3g}, or a larger patch"
        )
    return grid


def check_patch(patch_size: Triple, total: Triple) -> None:
    """Refuse `data.patch_size` where a network of that total stride cannot work on it."""
    if any(p % t for p, t in zip(patch_size, total, strict=True)):
        below, above = nearest_multiples(patch_size, total)
        raise UserError(
            f"data.patch_size {patch_size} does not divide by the network's total stride {total}: "
            f"the nearest valid sizes are {below} and {above}"
        )
    if tuple(patch_size) == tuple(total):
        raise UserError(
            f"data.patch_size {patch_size} leaves one voxel at the bottleneck, which instance "
            f"norm cannot normalise: use at least {tuple(2 * t for t in total)}"
        )


def nearest_multiples(size: Triple, unit: Triple) -> tuple[Triple, Triple]:
    """The whole multiples of `unit` around `size`, at least one unit, per axis."""
    axes = list(zip(size, unit, strict=True))
    below = tuple(max(u, s // u * u) for s, u in axes)
    above = tuple(-(-s // u) * u for s, u in axes)
    return below, above


def check_decode(decode: Decode) -> Decode:
    """`decode` itself if it is "all", "masked" or a fraction in (0, 1)."""
    number = isinstance(decode, float) and not isinstance(decode, bool) and 0 < decode < 1
    if decode not in ("all", "masked") and not number:
        raise UserError(f'decode {decode!r}: choose "all", "masked", or a fraction in (0, 1)')
    return decode


def check_decode_levels(decode: Decode, levels: int, block_size: Triple, stage_strides) -> int:
    """`levels` itself if cells are whole on every level of the decoder it touches."""
    most = len(stage_strides) - 1
    if not 1 <= levels <= most:
        raise UserError(f"decode_levels {levels}: the network has {most}, choose from 1 to {most}")
    stride = stage_strides[levels]
    if decode != "all" and any(c % s for c, s in zip(block_size, stride, strict=True)):
        raise UserError(
            f"decode {decode!r} restricts {levels} levels and needs cells that are multiples of "
            f'{tuple(stride)} voxels, not {block_size}: use larger cells or decode = "all"'
        )
    return levels
