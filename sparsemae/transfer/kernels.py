"""Weights of one tensor made to fit another: axes turned, input channels and kernels changed.

Letters: Co outputs, C inputs of a convolution; D, H, W its kernel.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemae.planning.nnunet_plans import to_our_axes
from sparsemae.triples import Triple

OURS = (0, 1, 2)


def from_network_axes(tensors: Mapping[str, Tensor], axes: Triple) -> dict[str, Tensor]:
    """Kernels of a network whose axis i is our axis `axes[i]`, in our axes; the others as is."""
    return _turned(tensors, to_our_axes(OURS, axes))


def into_network_axes(tensors: Mapping[str, Tensor], axes: Triple) -> dict[str, Tensor]:
    """Kernels in our axes, for a network whose axis i is our axis `axes[i]`."""
    return _turned(tensors, axes)


def spread_channels(weight: Float[Tensor, "Co C D H W"], channels: int) -> Tensor:
    """The first convolution of a network for another number of input channels.

    The sum over the channels, shared by all new ones: equal inputs give the response that they
    gave. So one channel is repeated and divided by `channels`, and several become their sum.
    """
    if weight.shape[1] == channels:
        return weight
    mean = weight.sum(1, keepdim=True) / channels
    return mean.expand(-1, channels, -1, -1, -1).contiguous()


def resize_kernel(weight: Float[Tensor, "Co C D H W"], size: Triple) -> Tensor:
    """A convolution's kernel along every axis: 3 -> 1 the mean of the taps, 1 -> 3 the middle."""
    for dim, taps in enumerate(size, start=2):
        if weight.shape[dim] == 3 and taps == 1:
            weight = weight.mean(dim, keepdim=True)
        elif weight.shape[dim] == 1 and taps == 3:
            none = torch.zeros_like(weight)
            weight = torch.cat((none, weight, none), dim)
    return weight


def resize_upsampling(weight: Float[Tensor, "C Co D H W"], size: Triple) -> Tensor:
    """A transposed convolution's, whose kernel is its stride: 2 -> 1 the mean, 1 -> 2 twice."""
    for dim, taps in enumerate(size, start=2):
        if weight.shape[dim] == 2 and taps == 1:
            weight = weight.mean(dim, keepdim=True)
        elif weight.shape[dim] == 1 and taps == 2:
            weight = torch.cat((weight, weight), dim)
    return weight


def _turned(tensors: Mapping[str, Tensor], order: Triple) -> dict[str, Tensor]:
    if tuple(order) == OURS:
        return dict(tensors)
    dims = (0, 1, *(2 + axis for axis in order))
    return {
        name: tensor.permute(dims).contiguous() if tensor.ndim == 5 else tensor
        for name, tensor in tensors.items()
    }
