"""Layers that run dense on a Tensor and sparse on a BlockTensor, with one set of parameters.

A network built from them needs no conversion step: pre-training hands it a BlockTensor,
fine-tuning a Tensor, and the state dict is that of the plain PyTorch layers.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from sparsemae.kernels import ops
from sparsemae.kernels.ops import Masked
from sparsemae.kernels.torch_norm import instance_norm_dense


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that also convolves visible blocks.

    Sparse input takes kernels of 1 or 3, strides of 1 or 2, per axis, with padding (k-1)/2.
    """

    backend: str = "auto"

    def forward(self, x: Tensor | Masked) -> Tensor | Masked:
        if isinstance(x, Tensor):
            return super().forward(x)
        self.require_sparse_form()
        return ops.conv3d(x, self.weight, self.bias, self.stride, backend=self.backend)

    def require_sparse_form(self) -> None:
        """Raise a ValueError if blocks cannot be convolved with these settings."""
        same = tuple(k // 2 for k in self.kernel_size)
        if self.padding != same or self.dilation != (1, 1, 1) or self.groups != 1:
            raise ValueError(
                f"no block-sparse form of {self}: it needs padding {same}, dilation 1, groups 1"
            )
        if self.padding_mode != "zeros":
            raise ValueError(f"no block-sparse form of {self}: padding_mode must be 'zeros'")


class ConvTranspose3d(nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` that also upsamples visible blocks where kernel = stride."""

    backend: str = "auto"

    def forward(self, x: Tensor | Masked, output_size=None) -> Tensor | Masked:
        if isinstance(x, Tensor):
            return super().forward(x, output_size)
        if self.kernel_size != self.stride or any((*self.padding, *self.output_padding)):
            raise ValueError(f"no block-sparse form of {self}: needs kernel = stride, no padding")
        if self.groups != 1 or self.dilation != (1, 1, 1):
            raise ValueError(f"no block-sparse form of {self}: needs dilation 1, groups 1")
        return ops.conv_transpose3d(x, self.weight, self.bias, backend=self.backend)


class InstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d`; sparse input is normalised over its visible voxels."""

    backend: str = "auto"

    def forward(self, x: Tensor | Masked) -> Tensor | Masked:
        if isinstance(x, Tensor):
            if _channels_last_on_cpu(x) and not self.track_running_stats:
                return instance_norm_dense(x, self.weight, self.bias, self.eps)
            return super().forward(x)
        self.require_sparse_form()
        return ops.instance_norm(x, self.weight, self.bias, self.eps, backend=self.backend)

    def require_sparse_form(self) -> None:
        """Raise a ValueError if blocks cannot be normalised with these settings."""
        if self.track_running_stats:
            raise ValueError(f"no block-sparse form of {self}: running statistics are not kept")


def _channels_last_on_cpu(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.ndim != 5 or x.is_contiguous():
        return False
    return x.is_contiguous(memory_format=torch.channels_last_3d)


class AvgPool3d(nn.AvgPool3d):
    """`torch.nn.AvgPool3d`; sparse input needs stride = kernel and no padding."""

    backend: str = "auto"

    def forward(self, x: Tensor | Masked) -> Tensor | Masked:
        if isinstance(x, Tensor):
            return super().forward(x)
        return ops.avg_pool3d(x, tiling_window(self), backend=self.backend)


class MaxPool3d(nn.MaxPool3d):
    """`torch.nn.MaxPool3d`; sparse input needs stride = kernel and no padding."""

    backend: str = "auto"

    def forward(self, x: Tensor | Masked) -> Tensor | Masked:
        if isinstance(x, Tensor):
            return super().forward(x)
        if _triple(self.dilation) != (1, 1, 1) or self.return_indices:
            raise ValueError(f"no block-sparse form of {self}: no dilation, no indices")
        return ops.max_pool3d(x, tiling_window(self), backend=self.backend)


def tiling_window(pool: nn.AvgPool3d | nn.MaxPool3d) -> tuple[int, int, int]:
    """The window of a pool that tiles the volume, the only kind with a sparse form."""
    window = _triple(pool.kernel_size)
    if _triple(pool.stride) != window or any(_triple(pool.padding)) or pool.ceil_mode:
        raise ValueError(f"no block-sparse form of {pool}: it needs stride = kernel, no padding")
    return window


class _Pointwise:
    """Mixin: the torch module applied to whatever voxels there are."""

    def forward(self, x: Tensor | Masked) -> Tensor | Masked:
        return super().forward(x) if isinstance(x, Tensor) else x.map(super().forward)


class LeakyReLU(_Pointwise, nn.LeakyReLU):
    """`torch.nn.LeakyReLU` on either representation."""


class ReLU(_Pointwise, nn.ReLU):
    """`torch.nn.ReLU` on either representation."""


class GELU(_Pointwise, nn.GELU):
    """`torch.nn.GELU` on either representation."""


class Dropout(_Pointwise, nn.Dropout):
    """`torch.nn.Dropout` on either representation."""


class Identity(_Pointwise, nn.Identity):
    """`torch.nn.Identity` on either representation."""
