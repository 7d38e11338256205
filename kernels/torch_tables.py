"""Index tables of the torch backend, built once per mask and kept in `mask.tables`.

Rows are voxels of packed features, [N*bd*bh*bw, C]. A halo table lists, for every voxel of every
block grown by its halo, the row it comes from; a tap table lists, for every voxel, the rows under
a kernel's taps. Rows that do not exist (masked or outside) are listed apart and zeroed.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from sparsemae.kernels.mask import BlockMask

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Gather:
    """Rows to read, `per_block` of them for each block, and which of them are really zero."""

    source: Int[Tensor, "N*per_block"]  # 0 where there is nothing to read
    absent: Int[Tensor, "Z"]  # positions in `source` to zero, ascending
    absent_before: tuple[int, ...]  # how many of them lie before block n, for n = 0..N
    per_block: int

    def rows(self, features: Tensor, first: int, last: int) -> Tensor:
        """[n, bd, bh, bw, C] -> [(last-first)*per_block, C] for the blocks first..last-1."""
        begin, end = first * self.per_block, last * self.per_block
        out = features.reshape(-1, features.shape[-1]).index_select(0, self.source[begin:end])
        zero = self.absent[self.absent_before[first] : self.absent_before[last]]
        return out.index_fill_(0, zero - begin, 0)


@dataclass(frozen=True)
class Fold:
    """The transpose of a halo gather: halo rows to add onto the rows they were read from.

    One pair of tables per direction, so that no row is written twice within a pair.
    """

    onto: tuple[Int[Tensor, "P"], ...]
    halo: tuple[Int[Tensor, "P"], ...]

    def add(self, interior: Tensor, haloed: Tensor) -> None:
        """Add halo rows of `haloed` [N*L, C] to `interior` [N*b, C] in place."""
        for onto, halo in zip(self.onto, self.halo, strict=True):
            interior.index_copy_(
                0, onto, interior.index_select(0, onto) + haloed.index_select(0, halo)
            )


def halo_gather(mask: BlockMask, block: Triple, low: Triple, high: Triple) -> Gather:
    """Blocks grown by `low` and `high` voxels (0 or 1 per axis)."""
    key = "halo", block, low, high
    if key not in mask.tables:
        axes = [_grown(b, lo, hi) for b, lo, hi in zip(block, low, high, strict=True)]
        neighbor, inside = _combine([a[0] for a in axes], (9, 3, 1)), _inside(axes, block)
        mask.tables[key] = _gather(mask, block, neighbor, inside)
    return mask.tables[key]


def tap_gather(mask: BlockMask, block: Triple, kernel: Triple) -> Gather:
    """The taps of a stride-1 `kernel` around every voxel, tap index fastest."""
    key = "taps", block, kernel
    if key not in mask.tables:
        axes = [_taps(b, k) for b, k in zip(block, kernel, strict=True)]  # each [b, k]
        neighbor, inside = _combine([a[0] for a in axes], (9, 3, 1)), _inside(axes, block)
        mask.tables[key] = _gather(mask, block, neighbor, inside)
    return mask.tables[key]


def halo_fold(mask: BlockMask, block: Triple, low: Triple, high: Triple) -> Fold:
    """Where the gradient of each halo voxel belongs."""
    key = "fold", block, low, high
    if key not in mask.tables:
        gather = halo_gather(mask, block, low, high)
        axes = [_grown(b, lo, hi)[0] for b, lo, hi in zip(block, low, high, strict=True)]
        direction = _combine(axes, (9, 3, 1)).to(gather.source.device)  # [L], 13 is the block
        exists = torch.ones_like(gather.source, dtype=torch.bool)
        exists[gather.absent] = False
        exists = exists.view(len(mask), -1)
        onto, halo = [], []
        for d in sorted(set(direction.tolist()) - {13}):
            rows = (exists & (direction == d)).flatten().nonzero()[:, 0]
            onto.append(gather.source[rows])
            halo.append(rows)
        mask.tables[key] = Fold(tuple(onto), tuple(halo))
    return mask.tables[key]


def _grown(b: int, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Neighbour step (0, 1, 2) and coordinate inside it of each voxel of a grown axis."""
    steps = [0] * low + [1] * b + [2] * high
    inside = [b - 1] * low + list(range(b)) + [0] * high
    return torch.tensor(steps), torch.tensor(inside)


def _taps(b: int, k: int) -> tuple[Tensor, Tensor]:
    """The same for the taps of each voxel of an axis, both [b, k]."""
    position = torch.arange(b)[:, None] + torch.arange(k) - k // 2 + b
    return position // b, position % b


def _combine(axes: list[Tensor], weights: tuple[int, int, int]) -> Tensor:
    """Weighted outer sum over the axes: first all voxel dimensions, then all tap dimensions."""
    rank = axes[0].ndim
    total = torch.zeros((1,) * 3 * rank, dtype=torch.long)
    for i, (axis, weight) in enumerate(zip(axes, weights, strict=True)):
        shape = [1] * 3 * rank
        for r in range(rank):
            shape[3 * r + i] = axis.shape[r]
        total = total + axis.reshape(shape) * weight
    return total.flatten()


def _inside(axes: list[tuple[Tensor, Tensor]], block: Triple) -> Tensor:
    return _combine([a[1] for a in axes], (block[1] * block[2], block[2], 1))


def _gather(mask: BlockMask, block: Triple, neighbor: Tensor, inside: Tensor) -> Gather:
    """`neighbor` and `inside`, both [per_block], say which neighbour and which voxel of it."""
    device = mask.neighbors.device
    blocks = mask.neighbors.long().index_select(1, neighbor.to(device))  # [N, per_block]
    rows = blocks * (block[0] * block[1] * block[2]) + inside.to(device)
    absent = blocks < 0
    before = torch.cat([absent.new_zeros(1).long(), absent.sum(1).cumsum(0)])
    return Gather(
        source=rows.masked_fill_(absent, 0).flatten(),
        absent=absent.flatten().nonzero()[:, 0],
        absent_before=tuple(before.tolist()),
        per_block=len(neighbor),
    )
