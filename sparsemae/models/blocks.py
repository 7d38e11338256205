"""Building blocks of the residual-encoder U-Net, dense on a Tensor, sparse on a BlockTensor.

Names and numerics are those of dynamic-network-architectures (DNA) 0.4.4, so state dicts load both
ways. DNA registers each layer twice, `conv` and `all_modules.0`; here too the two are one module.
"""

from jaxtyping import Float
from torch import Tensor, nn

from sparsemae.kernels import (
    AvgPool3d,
    BlockTensor,
    Conv3d,
    DenseMasked,
    Identity,
    InstanceNorm3d,
    LeakyReLU,
    conv_norm_act,
)
from sparsemae.triples import Triple

Features = Float[Tensor, "B C D H W"] | BlockTensor | DenseMasked

POINT = (1, 1, 1)


class ConvNormAct(nn.Module):
    """Convolution, affine instance norm and, unless `act` is False, LeakyReLU(0.01).

    Source: DNA `ConvDropoutNormReLU`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple,
        stride: Triple = POINT,
        *,
        bias: bool = True,
        act: bool = True,
    ):
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel_size)
        self.conv = Conv3d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        self.norm = InstanceNorm3d(out_channels, eps=1e-5, affine=True)
        layers = [self.conv, self.norm]
        if act:
            self.nonlin = LeakyReLU(0.01, inplace=True)  # the norm's output is not needed again
            layers.append(self.nonlin)
        self.all_modules = nn.Sequential(*layers)

    def forward(
        self,
        x: Features,
        *,
        pool: nn.Module | None = None,
        residual: Features | None = None,
        act: nn.Module | None = None,
    ) -> Features:
        """The layers on `pool(x)`, `residual` added before the activation: `act`, or its own."""
        conv, norm, *own = self.all_modules
        act = next(iter(own), None) if act is None else act
        return conv_norm_act(x, conv, norm, act, residual=residual, pool=pool)


class ConvStack(nn.Module):
    """`depth` ConvNormActs of stride 1. Source: DNA `StackedConvBlocks`."""

    def __init__(self, depth: int, in_channels: int, out_channels: int, kernel_size: Triple):
        super().__init__()
        self.convs = nn.Sequential(
            ConvNormAct(in_channels, out_channels, kernel_size),
            *(ConvNormAct(out_channels, out_channels, kernel_size) for _ in range(depth - 1)),
        )

    def forward(self, x: Features) -> Features:
        return self.convs(x)


class ResidualBlock(nn.Module):
    """Two convolutions around a shortcut: ResNet-D's, which pools before it projects.

    The shortcut is average pooling where strided, then a 1x1x1 convolution without bias and a norm
    only where the channels change. Source: DNA `BasicBlockD`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Triple, stride: Triple):
        super().__init__()
        self.conv1 = ConvNormAct(in_channels, out_channels, kernel_size, stride)
        self.conv2 = ConvNormAct(out_channels, out_channels, kernel_size, act=False)
        self.nonlin2 = LeakyReLU(0.01, inplace=True)
        shortcut = []
        if stride != POINT:
            shortcut.append(AvgPool3d(stride, stride))
        if in_channels != out_channels:
            shortcut.append(ConvNormAct(in_channels, out_channels, POINT, bias=False, act=False))
        self.skip = nn.Sequential(*shortcut) if shortcut else Identity()

    def forward(self, x: Features) -> Features:
        residual = x
        match list(self.skip.children()):
            case [pool, project]:
                residual = project(x, pool=pool)
            case [layer]:
                residual = layer(x)
        return self.conv2(self.conv1(x), residual=residual, act=self.nonlin2)


class ResidualStage(nn.Module):
    """`depth` residual blocks, the first one strided. Source: DNA `StackedResidualBlocks`."""

    def __init__(
        self, depth: int, in_channels: int, out_channels: int, kernel_size: Triple, stride: Triple
    ):
        super().__init__()
        self.blocks = nn.Sequential(
            ResidualBlock(in_channels, out_channels, kernel_size, stride),
            *(
                ResidualBlock(out_channels, out_channels, kernel_size, POINT)
                for _ in range(depth - 1)
            ),
        )

    def forward(self, x: Features) -> Features:
        return self.blocks(x)


def initialize(network: nn.Module) -> None:
    """nnU-Net's start: He-normal weights for LeakyReLU(0.01), zero biases, identity residuals.

    The norm before each residual addition gets weight zero. Source: DNA `InitWeights_He(1e-2)` and
    `init_last_bn_before_add_to_0`.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=1e-2)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, ResidualBlock):
            nn.init.zeros_(module.conv2.norm.weight)
            nn.init.zeros_(module.conv2.norm.bias)
