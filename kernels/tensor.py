"""Features of the visible blocks only, and the mask they belong to."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.pointwise import Pointwise
from sparsemae.kernels.scatter import pack_blocks, unpack_blocks


@dataclass(frozen=True, eq=False)
class BlockTensor(Pointwise):
    """Channels-last features of the visible blocks of a batch of volumes.

    It stands for the dense tensor [B, C, D, H, W] whose masked voxels are absent. Pointwise torch
    functions and `torch.cat(..., dim=1)` work on it; anything else says what to do instead.
    """

    features: Float[Tensor, "N bd bh bw C"]
    mask: BlockMask

    def __repr__(self) -> str:
        return f"BlockTensor({tuple(self.shape)}, {len(self.mask)} blocks of {self.block})"

    def __post_init__(self):
        if self.features.ndim != 5 or self.features.shape[0] != len(self.mask):
            raise ValueError(
                f"features {tuple(self.features.shape)} must be [N, bd, bh, bw, C] "
                f"with N = {len(self.mask)} visible blocks"
            )

    @classmethod
    def pack(cls, dense: Float[Tensor, "B C D H W"], mask: BlockMask) -> "BlockTensor":
        """Keep the visible blocks of a dense batch; masked voxels are never read."""
        mask.check_batch(dense.shape)
        return cls(pack_blocks(dense, mask, mask.block_of(dense.shape)), mask)

    @classmethod
    def full(cls, value: Float[Tensor, "C"], mask: BlockMask, block: tuple[int, int, int]):
        """Blocks that hold one value per channel; an expanded view, not to be written to."""
        return cls(value.expand(len(mask), *block, -1), mask)

    def unpack(self, fill: float | Float[Tensor, "C"] = 0.0) -> Float[Tensor, "B C D H W"]:
        """The dense batch (channels-last in memory), masked voxels set to `fill`.

        `fill` is a number or one value per channel (a mask token), which gets its gradient.
        """
        self.require_fill(fill)
        return unpack_blocks(self.features, self.mask, fill)

    def fill(self, value: float) -> "BlockTensor":
        """Every visible voxel set to `value`."""
        return self.with_values(torch.full_like(self.features, value))

    def with_values(self, features: Float[Tensor, "N bd bh bw C"]) -> "BlockTensor":
        """Other features on the same mask."""
        return replace(self, features=features)

    @property
    def values(self) -> Tensor:
        return self.features

    @property
    def channel_dim(self) -> int:
        return 4

    @property
    def block(self) -> tuple[int, int, int]:
        """Voxels per cell and axis."""
        return tuple(self.features.shape[1:4])

    @property
    def channels(self) -> int:
        return self.features.shape[4]
