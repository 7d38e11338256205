"""Block-masked sparse 3D operators: a mask, a packed tensor, functions and layers on them."""

from sparsemae.kernels.fused import conv_norm_act
from sparsemae.kernels.mask import BlockMask
from sparsemae.kernels.modules import (
    GELU,
    AvgPool3d,
    Conv3d,
    ConvTranspose3d,
    Dropout,
    Identity,
    InstanceNorm3d,
    LeakyReLU,
    MaxPool3d,
    ReLU,
)
from sparsemae.kernels.registry import available, set_backend
from sparsemae.kernels.simulated import DenseMasked
from sparsemae.kernels.tensor import BlockTensor

__all__ = [
    "GELU",
    "AvgPool3d",
    "BlockMask",
    "BlockTensor",
    "Conv3d",
    "ConvTranspose3d",
    "DenseMasked",
    "Dropout",
    "Identity",
    "InstanceNorm3d",
    "LeakyReLU",
    "MaxPool3d",
    "ReLU",
    "available",
    "conv_norm_act",
    "set_backend",
]
