"""The sparse masked autoencoder: encode the visible blocks, fill in tokens, decode, score.

The encoder never sees a masked voxel, not even through the stem. Each skip becomes dense by a
learned mask token per channel, and, on every level but the finest, a convolution that blurs the
border between features and tokens ("densify"). Source: "Revisiting MAE pre-training for 3D medical
image segmentation", arXiv 2410.23132; the decode policies are ours, after CrossMAE (2401.14391).
"""

import contextlib
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparsemae.errors import UserError
from sparsemae.kernels import BlockMask, BlockTensor, Conv3d, DenseMasked, set_backend
from sparsemae.kernels.mask import Generators
from sparsemae.models.blocks import initialize
from sparsemae.models.masking import (
    Decode,
    Masks,
    check_decode,
    check_decode_levels,
    check_grid,
    stage_blocks,
)
from sparsemae.models.resenc import ResEncUNet
from sparsemae.triples import Triple


class SparseMAE(nn.Module):
    """Masked autoencoding of volumes with a `ResEncUNet`.

    Args:
        network: Reconstructs as many channels as it takes in, without deep supervision.
        block_size: Voxels of a mask cell per axis: a multiple of the stage strides, or one of them
            (coarser stages then run dense). The network's total stride if None.
        decode: "all" decodes every voxel. "masked" runs the finest `decode_levels` levels in the
            masked cells only, all the loss looks at. A fraction in (0, 1) does so in a random
            part of the masked cells, drawn every step, and scores only that part.
        decode_levels: Finest decoder levels that a restricted `decode` restricts.
        densify: Convolve each token-filled skip but the finest.
        sparse: False is the dense MAE: masked input, plain dense network, no tokens.
        backend: Of the sparse operators. "reference" simulates sparsity densely.

    Raises:
        UserError: (a ValueError) An argument does not fit the network; names it and the remedy.
    """

    def __init__(
        self,
        network: ResEncUNet,
        block_size: int | Triple | None = None,
        *,
        decode: Decode = "all",
        decode_levels: int = 2,
        densify: bool = True,
        sparse: bool = True,
        backend: str = "auto",
    ):
        super().__init__()
        self.network = network
        block_size = network.total_stride if block_size is None else block_size
        self.block_size = (block_size,) * 3 if isinstance(block_size, int) else tuple(block_size)
        self.decode = check_decode(decode)
        self.sparse = sparse
        self.simulated = backend == "reference"
        heads = network.decoder.seg_layers
        if network.decoder.deep_supervision:
            raise UserError("deep_supervision: a masked autoencoder scores one output; turn it off")
        channels = network.encoder.stem.convs[0].conv.in_channels
        if heads[-1].out_channels != channels:
            raise UserError(
                f"num_classes: the network takes {channels} channels and must reconstruct as "
                f"many, not {heads[-1].out_channels}"
            )
        self.stage_blocks = stage_blocks(self.block_size, network.stage_strides)
        self.decode_levels = check_decode_levels(
            decode, decode_levels, self.block_size, network.stage_strides
        )
        topology = network.topology
        self.mask_tokens = nn.ParameterDict()
        self.densify = nn.ModuleDict()
        if sparse:
            stages = zip(topology.features, self.stage_blocks, strict=True)
            for level, (width, block) in enumerate(stages):
                if block is not None:
                    self.mask_tokens[str(level)] = nn.Parameter(torch.randn(width) * 0.02)
                if densify and level > 0:
                    kernel = topology.kernels[level]
                    padding = [k // 2 for k in kernel]
                    self.densify[str(level)] = Conv3d(width, width, kernel, padding=padding)
            initialize(self.densify)
        set_backend(self, backend)

    def draw_masks(
        self,
        batch_size: int,
        patch_size: Triple,
        mask_ratio: float,
        *,
        generator: Generators = None,
    ) -> Masks:
        """Random masks for a batch, on the CPU, the same number of cells in every sample.

        With one generator for each sample, its masks do not depend on the rest of the batch.

        Raises:
            UserError: Patch, cell and ratio leave no whole, no visible or no masked cell.
        """
        grid = check_grid(patch_size, self.block_size, mask_ratio)
        visible = BlockMask.random(batch_size, grid, mask_ratio, generator=generator)
        scored = visible.hidden()
        if isinstance(self.decode, float):
            scored = scored.sample(self.decode, generator=generator)
        return Masks(visible, scored)

    def forward(
        self, x: Float[Tensor, "B C D H W"], masks: Masks
    ) -> Float[Tensor, "B C D H W"] | BlockTensor:
        """Reconstruct from the visible voxels of `x`; masked ones are never read.

        Returns:
            The whole volume for `decode="all"`, else a BlockTensor on the scored cells.
        """
        skips = self.network.encoder(self.masked_input(x, masks.visible))
        finest = 0 if self.decode == "all" else self.decode_levels
        return self.network.decoder(
            [self._skip(i, s, masks, restricted=i < finest) for i, s in enumerate(skips)]
        )

    def masked_input(
        self, x: Float[Tensor, "B C D H W"], visible: BlockMask
    ) -> BlockTensor | DenseMasked | Tensor:
        """What the encoder is given: visible blocks, or a volume that is zero elsewhere."""
        if self.sparse and not self.simulated:
            return BlockTensor.pack(x, visible)
        # pack and unpack rather than multiply: NaN times zero is NaN
        masked = BlockTensor.pack(x, visible).unpack()
        return DenseMasked(masked, visible) if self.sparse else masked

    def _skip(self, level: int, skip, masks: Masks, *, restricted: bool):
        """The skip of one level for the decoder: no gaps, or only the scored cells."""
        token = self.mask_tokens.get(str(level))
        densify = dict(self.densify.items()).get(str(level))  # a ModuleDict has no get
        if densify is None and restricted and isinstance(skip, BlockTensor):
            # scored cells are masked: all they hold is the token
            return BlockTensor.full(token.to(skip.dtype), masks.scored, skip.block)
        if not isinstance(skip, Tensor):
            skip = skip.unpack(token)
        if densify is not None:
            skip = densify(skip)
        return BlockTensor.pack(skip, masks.scored) if restricted else skip

    @contextlib.contextmanager
    def decoding_all_masked(self) -> Iterator[None]:
        """Within it, a model that decodes a fraction of the masked cells decodes all of them."""
        decode, self.decode = self.decode, "all" if self.decode == "all" else "masked"
        try:
            yield
        finally:
            self.decode = decode

    @torch.no_grad()
    def reconstruct(
        self, x: Float[Tensor, "B C D H W"], masks: Masks
    ) -> Float[Tensor, "B C D H W"]:
        """`x` with the scored cells replaced by their reconstruction."""
        predicted = on_cells(self(x, masks), masks.scored)
        chosen = masks.scored.voxels(predicted.block)
        return torch.where(chosen, predicted.unpack().to(x.dtype), x)


def masked_mse(
    reconstruction: Float[Tensor, "B C D H W"] | BlockTensor,
    target: Float[Tensor, "B C D H W"],
    scored: BlockMask,
    excluded: Bool[Tensor, "B 1 D H W"] | None = None,
) -> Float[Tensor, ""]:
    """Mean squared error over scored cells minus excluded (defaced, padded) voxels.

    Zero, with zero gradients, if every scored voxel is excluded.
    """
    total, weight = masked_error(reconstruction, target, scored, excluded)
    return total / weight.clamp(min=1e-12)


def masked_error(
    reconstruction: Float[Tensor, "B C D H W"] | BlockTensor,
    target: Float[Tensor, "B C D H W"],
    scored: BlockMask,
    excluded: Bool[Tensor, "B 1 D H W"] | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """`masked_mse` in two numbers, so that parts of a batch add up to the whole batch's.

    Returns:
        The squared errors that count, over the number of all scored voxels; and the fraction of
        these that counts. The mean over parts of equal size is the sum of one / that of the other.
    """
    predicted = on_cells(reconstruction, scored).features
    exact = torch.promote_types(predicted.dtype, torch.float32)
    difference = predicted.to(exact) - BlockTensor.pack(target, scored).features.to(exact)
    if excluded is None:
        return difference.square().mean(), difference.new_ones(())
    left_out = BlockTensor.pack(excluded, scored).features  # one channel for all
    # filled, not multiplied: what is excluded may be NaN
    return difference.masked_fill(left_out, 0).square().mean(), (~left_out).to(exact).mean()


def on_cells(x: Tensor | BlockTensor, cells: BlockMask) -> BlockTensor:
    """A dense volume or a BlockTensor on `cells`, as the latter."""
    return BlockTensor.pack(x, cells) if isinstance(x, Tensor) else x
