"""Pointwise torch functions on masked tensors, through `__torch_function__`.

A function applies voxel by voxel, so it may run on whatever voxels a tensor stores. Everything
that mixes voxels has to know the mask, and is refused here with the remedy.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

POINTWISE = frozenset(
    {
        *(torch.add, torch.sub, torch.mul, torch.div, torch.pow, torch.maximum, torch.minimum),
        *(torch.neg, torch.abs, torch.exp, torch.log, torch.sqrt, torch.square, torch.clamp),
        *(torch.sigmoid, torch.tanh, torch.relu, torch.nan_to_num, torch.lerp, torch.erf),
        *(F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.elu, F.selu, F.celu, F.mish),
        *(F.softplus, F.hardswish, F.hardtanh, F.hardsigmoid, F.sigmoid, F.tanh, F.dropout),
    }
)


class Pointwise:
    """Operators and torch functions of a tensor known on the voxels of its mask only.

    A subclass has `values` (what is stored), `mask`, `block`, `channels`, `channel_dim` (where
    `values` keeps the channels) and `with_values`.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.cat, torch.concat, torch.concatenate):
            return concatenate(*args, **kwargs)
        if func not in POINTWISE:
            name = getattr(func, "__name__", str(func))
            raise TypeError(
                f"{name} is not defined on a {cls.__name__}: it is no pointwise function. "
                f"Use the operators of sparsemae.kernels, x.map(fn), or x.unpack() for a Tensor"
            )
        operands = (*args, *kwargs.values())
        like = next(a for a in operands if isinstance(a, Pointwise))
        values = [like.operand(a) for a in args]
        named = {key: like.operand(a) for key, a in kwargs.items()}
        return like.with_values(func(*values, **named))

    def operand(self, other):
        """`other` in the layout of this tensor's `values`."""
        if isinstance(other, Pointwise):
            self.require_same_voxels(other)
            return other.values
        if not isinstance(other, Tensor) or other.ndim == 0:
            return other
        if other.shape in ((1, 1, 1, 1, 1), (1, self.channels, 1, 1, 1)):
            layout = [1] * 5
            layout[self.channel_dim] = -1
            return other.reshape(layout)
        raise TypeError(
            f"a Tensor of shape {tuple(other.shape)} has no blocks to combine with a "
            f"{type(self).__name__}: pack it with {type(self).__name__}.pack(tensor, mask), "
            f"or give one value per channel as [1, {self.channels}, 1, 1, 1]"
        )

    def require_same_voxels(self, other: "Pointwise") -> None:
        if type(other) is not type(self):
            raise TypeError(f"cannot combine a {type(self).__name__} and a {type(other).__name__}")
        if other.mask is not self.mask:
            raise ValueError("tensors on two different masks: pack both with one BlockMask object")
        if other.block != self.block:
            raise ValueError(f"tensors of two resolutions: blocks {self.block} and {other.block}")

    def require_fill(self, fill) -> None:
        if isinstance(fill, Tensor) and fill.shape != (self.channels,):
            raise ValueError(f"fill has shape {tuple(fill.shape)}, expected ({self.channels},)")

    def map(self, fn: Callable[[Tensor], Tensor]):
        """Apply a pointwise function, such as an activation."""
        return self.with_values(fn(self.values))

    def to(self, *args, **kwargs):
        """Change the dtype; another device needs the mask there too, so pack there instead."""
        values = self.values.to(*args, **kwargs)
        if values.device != self.values.device:
            raise ValueError("move the mask (BlockMask.to) and the dense batch, then pack there")
        return self.with_values(values)

    def detach(self):
        return self.with_values(self.values.detach())

    @property
    def shape(self) -> torch.Size:
        """The dense shape [B, C, D, H, W] this tensor stands for."""
        size = (g * b for g, b in zip(self.mask.grid, self.block, strict=True))
        return torch.Size((self.mask.batch_size, self.channels, *size))

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def requires_grad(self) -> bool:
        return self.values.requires_grad

    def __add__(self, other):
        return self.with_values(self.values + self.operand(other))

    def __sub__(self, other):
        return self.with_values(self.values - self.operand(other))

    def __mul__(self, other):
        return self.with_values(self.values * self.operand(other))

    def __truediv__(self, other):
        return self.with_values(self.values / self.operand(other))

    def __rsub__(self, other):
        return self.with_values(self.operand(other) - self.values)

    def __neg__(self):
        return self.with_values(-self.values)

    __radd__ = __add__
    __rmul__ = __mul__


def concatenate(tensors, dim: int = 0):
    """Channel concatenation, `torch.cat(tensors, dim=1)` of the dense tensors."""
    first, *rest = tensors
    kinds = {type(t).__name__ for t in tensors}
    if len(kinds) > 1:
        raise TypeError(f"cannot concatenate {' and '.join(sorted(kinds))}: pack or unpack one")
    if dim not in (1, -4):
        raise ValueError(f"a {type(first).__name__} concatenates channels (dim=1), not dim={dim}")
    for other in rest:
        first.require_same_voxels(other)
    return first.with_values(torch.cat([t.values for t in tensors], first.channel_dim))
