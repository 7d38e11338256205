"""Simulated sparsity: a dense tensor that is zero where masked.

What published CNN-MAE code does: compute everywhere, multiply by the mask. It saves nothing, but
it is easy to believe, so it is the baseline of benchmarks and the other side of whole-network
tests. Only the `reference` backend works on it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.pointwise import Pointwise


@dataclass(frozen=True, eq=False)
class DenseMasked(Pointwise):
    """A dense batch whose masked voxels are zero, with the interface of `BlockTensor`."""

    dense: Float[Tensor, "B C D H W"]
    mask: BlockMask

    @classmethod
    def pack(cls, dense: Float[Tensor, "B C D H W"], mask: BlockMask) -> "DenseMasked":
        """Multiply by the mask."""
        mask.check_batch(dense.shape)
        return cls(dense * _voxels(mask, mask.block_of(dense.shape), dense.dtype), mask)

    def unpack(self, fill: float | Float[Tensor, "C"] = 0.0) -> Float[Tensor, "B C D H W"]:
        """The dense batch, masked voxels set to `fill`."""
        self.require_fill(fill)
        if not isinstance(fill, Tensor) and fill == 0:
            return self.dense
        token = fill.view(-1, 1, 1, 1) if isinstance(fill, Tensor) else fill
        return self.dense + token * (1 - _voxels(self.mask, self.block, self.dtype))

    def with_values(self, dense: Float[Tensor, "B C D H W"]) -> "DenseMasked":
        """Other values on the same mask; they are multiplied by it."""
        return DenseMasked.pack(dense, self.mask)

    def fill(self, value: float) -> "DenseMasked":
        """Every visible voxel set to `value`."""
        return self.with_values(torch.full_like(self.dense, value))

    @property
    def values(self) -> Tensor:
        return self.dense

    @property
    def channel_dim(self) -> int:
        return 1

    @property
    def block(self) -> tuple[int, int, int]:
        """Voxels per cell and axis."""
        return self.mask.block_of(self.dense.shape)

    @property
    def channels(self) -> int:
        return self.dense.shape[1]


def _voxels(mask: BlockMask, block: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    key = "voxels", block, dtype
    if key not in mask.tables:
        mask.tables[key] = mask.voxels(block).to(dtype)
    return mask.tables[key]
