"""nnU-Net's residual-encoder U-Net, one module for pre-training and fine-tuning.

Module tree, parameter names and numerics are those of `ResidualEncoderUNet` in
dynamic-network-architectures (DNA) 0.4.4. That includes its aliases: the decoder holds the encoder,
so `decoder.encoder.*` names the encoder's own tensors again, in the state dict and nowhere else.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsemae.errors import UserError
from sparsemae.kernels import Conv3d, ConvTranspose3d
from sparsemae.models.blocks import ConvStack, Features, ResidualStage, initialize
from sparsemae.models.topology import PRESETS, PerAxis, Topology, positive
from sparsemae.triples import Triple


class ResEncoder(nn.Module):
    """A stem at full resolution, then stages of residual blocks. Source: DNA `ResidualEncoder`."""

    def __init__(self, input_channels: int, topology: Topology):
        super().__init__()
        self.topology = topology
        width = topology.features[0]
        self.stem = ConvStack(1, input_channels, width, topology.kernels[0])
        stages = []
        for depth, features, kernel, stride in zip(
            topology.blocks, topology.features, topology.kernels, topology.strides, strict=True
        ):
            stages.append(ResidualStage(depth, width, features, kernel, stride))
            width = features
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Features) -> list[Features]:
        """The output of every stage, finest first.

        Stages coarser than the mask grid of a BlockTensor are plain Tensors.

        Raises:
            ValueError: The volume is not a whole number of bottleneck voxels.
        """
        size, step = tuple(x.shape[-3:]), self.topology.total_stride
        if any(n % t or n == 0 for n, t in zip(size, step, strict=True)):
            raise ValueError(
                f"a volume of {size} voxels does not divide by the network's total stride {step}: "
                f"crop or pad it to multiples"
            )
        x = self.stem(x)
        skips = []
        for stage in self.stages:
            x = stage(x)
            skips.append(x)
        return skips


class UNetDecoder(nn.Module):
    """Upsample, concatenate the skip, convolve, deepest first. Source: DNA `UNetDecoder`.

    It has an output layer on every level but uses only the finest without deep supervision: the
    others then get no gradient. `parameters()` includes the encoder's, as DNA's does.
    """

    def __init__(self, encoder: ResEncoder, num_classes: int, deep_supervision: bool):
        super().__init__()
        self.deep_supervision = deep_supervision
        self.encoder = encoder
        topology = encoder.topology
        stages, transpconvs, seg_layers = [], [], []
        for depth, level in zip(
            topology.decoder_convs, reversed(range(len(topology.features) - 1)), strict=True
        ):
            below, width = topology.features[level + 1], topology.features[level]
            stride = topology.strides[level + 1]
            transpconvs.append(ConvTranspose3d(below, width, stride, stride))
            stages.append(ConvStack(depth, 2 * width, width, topology.kernels[level]))
            seg_layers.append(Conv3d(width, num_classes, 1))
        self.stages = nn.ModuleList(stages)
        self.transpconvs = nn.ModuleList(transpconvs)
        self.seg_layers = nn.ModuleList(seg_layers)

    def forward(self, skips: Sequence[Features]) -> Features | list[Features]:
        """The output at full resolution; with deep supervision one per level, finest first.

        Args:
            skips: Features of every stage, finest first. From the first BlockTensor on, going up
                from the bottleneck, the decoder runs in the blocks of its mask only, and so must
                all finer skips be: the output is a BlockTensor.

        Raises:
            ValueError: As many skips as stages are needed; a Tensor above a BlockTensor.
        """
        if len(skips) != len(self.stages) + 1:
            raise ValueError(f"got {len(skips)} skips for {len(self.stages) + 1} encoder stages")
        outputs = []
        x, *finer = reversed(skips)
        for level, (skip, upsample, stage, head) in enumerate(
            zip(finer, self.transpconvs, self.stages, self.seg_layers, strict=True), start=1
        ):
            if isinstance(x, Tensor) and not isinstance(skip, Tensor):
                x = type(skip).pack(x, skip.mask)
            elif isinstance(skip, Tensor) and not isinstance(x, Tensor):
                raise ValueError(
                    f"skips[{len(finer) - level}] is dense but the coarser level is block-sparse: "
                    f"unpack the coarser skips, or pack this one with the same mask"
                )
            x = stage(torch.cat((upsample(x), skip), 1))
            if self.deep_supervision or level == len(finer):
                outputs.append(head(x))
        return outputs[::-1] if self.deep_supervision else outputs[0]


class ResEncUNet(nn.Module):
    """Residual-encoder U-Net with bias, affine instance norm (eps 1e-5) and LeakyReLU(0.01).

    Args:
        input_channels: Channels of the input volumes.
        num_classes: Channels of the output; 1 for reconstruction.
        features_per_stage: Channels of each stage, finest first.
        strides: Per stage 1 or 2, or three of them; the first stage has stride 1.
        n_blocks_per_stage: Residual blocks of each stage.
        kernel_sizes: One size for all stages, or per stage 1 or 3, or three of them.
        n_conv_per_stage_decoder: One number for all decoder stages, or one each, deepest first.
        deep_supervision: Return one output per decoder level, finest first.

    Raises:
        UserError: (a ValueError) An argument is impossible; names it and the remedy.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        features_per_stage: Sequence[int],
        strides: Sequence[PerAxis],
        n_blocks_per_stage: Sequence[int],
        kernel_sizes: int | Sequence[PerAxis] = 3,
        n_conv_per_stage_decoder: int | Sequence[int] = 1,
        deep_supervision: bool = False,
    ):
        super().__init__()
        self.topology = Topology.parse(
            features_per_stage,
            strides,
            n_blocks_per_stage,
            kernel_sizes,
            n_conv_per_stage_decoder,
        )
        self.encoder = ResEncoder(positive("input_channels", input_channels), self.topology)
        num_classes = positive("num_classes", num_classes)
        self.decoder = UNetDecoder(self.encoder, num_classes, deep_supervision)
        initialize(self)

    @classmethod
    def from_preset(
        cls, name: str, input_channels: int = 1, num_classes: int = 1, **overrides: Any
    ) -> "ResEncUNet":
        """The network of `PRESETS[name]`; `overrides` replace arguments of the constructor."""
        if name not in PRESETS:
            raise UserError(f"preset: unknown {name!r}, choose from {', '.join(PRESETS)}")
        return cls(input_channels, num_classes, **(PRESETS[name] | overrides))

    def forward(self, x: Features) -> Features | list[Features]:
        """[B, input_channels, D, H, W] to [B, num_classes, D, H, W], dense or block-sparse."""
        return self.decoder(self.encoder(x))

    @property
    def stage_strides(self) -> tuple[Triple, ...]:
        """Input voxels per voxel of each encoder stage and axis, finest first."""
        return self.topology.stage_strides

    @property
    def total_stride(self) -> Triple:
        """Input voxels per bottleneck voxel and axis; divides every input size."""
        return self.topology.total_stride
