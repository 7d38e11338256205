"""Which blocks of a batch of volumes are visible, and who neighbours whom.

Letters: B batch, Gd/Gh/Gw blocks (cells) per axis, N visible blocks in the batch, 27 = 3x3x3
neighbours in the order of a 3x3x3 kernel's taps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""CPU generators: one for a whole batch, or one for each sample; the global one if None."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """The visible blocks of a batch of volumes on a regular grid, and the tables operators read.

    `visible` is True where the encoder sees the block. Packed tensors hold the visible blocks in
    the order of `torch.nonzero(visible)`, so blocks of one sample are neighbours in memory. One
    mask serves every stage of a network: only the width of a block changes.
    Build it on the host and move it with `to`: nothing later waits for the device.
    """

    visible: Bool[Tensor, "B Gd Gh Gw"]
    coords: Int[Tensor, "N 4"]  # (sample, d, h, w) of each visible block
    neighbors: Int[Tensor, "N 27"]  # packed position, -1 where masked or outside
    slots: Int[Tensor, "B Gd Gh Gw"]  # packed position of each block, -1 where masked
    starts: Int[Tensor, "B+1"]  # packed position of each sample's first block, then N
    counts: tuple[int, ...]  # visible blocks of each sample
    tables: dict = field(default_factory=dict, repr=False)  # filled by backends, once per mask

    @classmethod
    def from_visible(cls, visible: Bool[Tensor, "B Gd Gh Gw"]) -> "BlockMask":
        """Build the tables of a given pattern; waits for the device if `visible` is not on CPU."""
        if visible.ndim != 4 or visible.dtype != torch.bool:
            raise ValueError(
                f"visible must be bool [batch, d, h, w], got {visible.dtype} {tuple(visible.shape)}"
            )
        device, visible = visible.device, visible.cpu().clone()
        order = visible.flatten().cumsum(0, dtype=torch.int32).view_as(visible) - 1
        slots = torch.where(visible, order, -1)
        padded = F.pad(slots, (1, 1, 1, 1, 1, 1), value=-1)
        windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
        counts = visible.flatten(1).sum(1)
        mask = cls(
            visible,
            visible.nonzero().int().contiguous(),  # nonzero is column-major
            windows[visible].contiguous(),
            slots,
            F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)),
            tuple(counts.tolist()),
        )
        return mask.to(device)

    @classmethod
    def random(
        cls,
        batch_size: int,
        grid: tuple[int, int, int],
        mask_ratio: float,
        *,
        generator: Generators = None,
    ) -> "BlockMask":
        """Hide the same number of blocks, `mask_ratio` of them, in every sample of the batch.

        Args:
            grid: Blocks per axis.
            mask_ratio: Fraction hidden, in [0, 1]; rounded to whole blocks.
            generator: With one for each sample, a sample's mask does not depend on the others.
        """
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must lie in [0, 1], got {mask_ratio}")
        total = grid[0] * grid[1] * grid[2]
        keep = total - round(total * mask_ratio)
        everything = torch.ones(batch_size, *grid, dtype=torch.bool)
        return cls.from_visible(_keep_random(everything, [keep] * batch_size, generator))

    def hidden(self) -> "BlockMask":
        """The mask that shows exactly what this one hides."""
        return BlockMask.from_visible(~self.visible)

    def sample(self, fraction: float, *, generator: Generators = None) -> "BlockMask":
        """A random `fraction` in (0, 1] of each sample's visible blocks, at least one."""
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {fraction}")
        keep = [min(n, max(1, round(n * fraction))) for n in self.counts]
        visible = _keep_random(self.visible.cpu(), keep, generator)
        return BlockMask.from_visible(visible.to(self.visible.device))

    def voxels(self, block: tuple[int, int, int]) -> Bool[Tensor, "B 1 D H W"]:
        """The mask at the resolution where a cell is `block` voxels wide."""
        out = self.visible[:, None]
        for axis, width in enumerate(block):
            out = out.repeat_interleave(width, axis + 2, output_size=out.shape[axis + 2] * width)
        return out

    def block_of(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Voxels per cell and axis of a volume [..., D, H, W] laid over this grid."""
        grid, size = self.grid, tuple(shape[-3:])
        if any(s % g or s == 0 for s, g in zip(size, grid, strict=True)):
            raise ValueError(f"a volume of {size} voxels does not tile onto a grid of {grid} cells")
        return tuple(s // g for s, g in zip(size, grid, strict=True))

    def check_batch(self, shape: tuple[int, ...]) -> None:
        """Raise a ValueError unless a dense batch of `shape` has as many samples as the mask."""
        if len(shape) != 5 or shape[0] != self.batch_size:
            raise ValueError(
                f"a mask of {self.batch_size} samples takes [B, C, D, H, W] with that batch, "
                f"got {tuple(shape)}"
            )

    def to(self, device: torch.device | str) -> "BlockMask":
        """The same mask on another device; itself if it is there already."""
        waits = torch.device(device).type == "cpu"  # values must have arrived before the host reads
        visible, *others = (t.to(device, non_blocking=not waits) for t in self._tensors)
        if visible is self.visible:  # "cuda" is "cuda:0" too
            return self
        return BlockMask(visible, *others, self.counts)

    def copy_(self, other: "BlockMask") -> "BlockMask":
        """Take over another mask's pattern in place, for a CUDA graph that has captured this one.

        Raises:
            ValueError: Another grid, or another number of visible blocks in some sample: kernels
                were launched for these sizes.
        """
        if (other.grid, other.counts) != (self.grid, self.counts):
            raise ValueError(
                f"a mask of grid {self.grid} with {self.counts} visible blocks cannot become one "
                f"of grid {other.grid} with {other.counts}: draw masks of one ratio and batch size"
            )
        for mine, theirs in zip(self._tensors, other._tensors, strict=True):
            mine.copy_(theirs, non_blocking=True)
        self.tables.clear()
        return self

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.visible, self.coords, self.neighbors, self.slots, self.starts

    @property
    def batch_size(self) -> int:
        return self.visible.shape[0]

    @property
    def grid(self) -> tuple[int, int, int]:
        return tuple(self.visible.shape[1:])

    def __len__(self) -> int:
        return self.coords.shape[0]


def _keep_random(candidates: Tensor, keep: list[int], generator: Generators) -> Tensor:
    """Switch off all but `keep[i]` randomly chosen True entries of sample i."""
    shape = candidates.shape
    if isinstance(generator, Sequence):
        if len(generator) != len(keep):
            raise ValueError(f"{len(generator)} generators for {len(keep)} samples")
        noise = torch.stack([torch.rand(shape[1:], generator=g) for g in generator])
    else:
        noise = torch.rand(shape, generator=generator)
    noise = noise.masked_fill_(~candidates, 2.0)
    ranks = noise.flatten(1).argsort(1).argsort(1)
    return (ranks < torch.tensor(keep)[:, None]).view_as(candidates)
