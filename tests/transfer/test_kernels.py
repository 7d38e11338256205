"""Weights of one tensor made to fit another, judged by what the network or layer then computes."""

import itertools

import pytest
import torch
from torch.nn import functional

from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.nnunet_plans import in_network_axes, network_axes, to_network_axes
from sparsemae.transfer.kernels import (
    from_network_axes,
    into_network_axes,
    resize_kernel,
    resize_upsampling,
    spread_channels,
)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_a_network_with_turned_axes_sees_a_turned_volume_the_same(trained, odd, unique, order):
    network = trained(odd).double()
    axes = network_axes(order)
    turned = ResEncUNet(1, 2, *_arguments(in_network_axes(network.topology, axes))).double()
    tensors = into_network_axes(unique(network), axes)
    for name, parameter in turned.named_parameters():
        parameter.data.copy_(tensors[name])
    x = torch.randn(1, 1, 8, 12, 16, dtype=torch.float64)
    dims = (0, 1, *(2 + axis for axis in axes))
    assert x.permute(dims).shape[2:] == to_network_axes(x.shape[2:], axes)
    torch.testing.assert_close(turned(x.permute(dims)), network(x).permute(dims))
    back = from_network_axes(tensors, axes)
    assert all(torch.equal(back[name], tensor) for name, tensor in unique(network).items())


def _arguments(topology):
    return (
        topology.features,
        topology.strides,
        topology.blocks,
        topology.kernels,
        topology.decoder_convs,
    )


@pytest.mark.parametrize(("before", "after"), [(1, 4), (3, 1), (2, 3), (3, 2)])
def test_equal_channels_give_the_response_they_gave(before, after):
    weight = torch.randn(5, before, 3, 3, 3, dtype=torch.float64)
    x = torch.randn(1, 1, 6, 6, 6, dtype=torch.float64)
    spread = spread_channels(weight, after)
    assert spread.shape == (5, after, 3, 3, 3)
    torch.testing.assert_close(
        functional.conv3d(x.expand(-1, after, -1, -1, -1), spread),
        functional.conv3d(x.expand(-1, before, -1, -1, -1), weight),
    )


def test_as_many_channels_as_before_stay_what_they_were():
    weight = torch.randn(5, 3, 3, 3, 3)
    assert torch.equal(spread_channels(weight, 3), weight)


def test_a_kernel_loses_an_axis_to_its_mean_and_gains_one_around_its_middle():
    weight = torch.randn(2, 3, 3, 3, 1)
    flat = resize_kernel(weight, (1, 3, 1))
    torch.testing.assert_close(flat, weight.mean(2, keepdim=True))
    deep = resize_kernel(weight, (3, 3, 3))
    assert torch.equal(deep[..., 1:2], weight)
    assert not deep[..., 0].any()
    assert not deep[..., 2].any()
    x = torch.randn(1, 3, 5, 5, 5)
    torch.testing.assert_close(
        functional.conv3d(x, deep, padding=1), functional.conv3d(x, weight, padding=(1, 1, 0))
    )


def test_upsampling_by_two_repeats_and_by_one_averages():
    weight = torch.randn(2, 3, 1, 2, 2)
    x = torch.randn(1, 2, 3, 3, 3)
    before = functional.conv_transpose3d(x, weight, stride=(1, 2, 2))
    doubled = functional.conv_transpose3d(x, resize_upsampling(weight, (2, 2, 2)), stride=2)
    torch.testing.assert_close(doubled, before.repeat_interleave(2, 2))
    single = functional.conv_transpose3d(x, resize_upsampling(weight, (1, 1, 2)), stride=(1, 1, 2))
    torch.testing.assert_close(single, (before[..., ::2, :] + before[..., 1::2, :]) / 2)
