"""Fused layers against the same modules one after the other, on the float64 reference."""

import copy

import pytest
import torch
from torch import nn

from sparsemae.kernels import (
    GELU,
    AvgPool3d,
    BlockMask,
    BlockTensor,
    Conv3d,
    InstanceNorm3d,
    LeakyReLU,
    ReLU,
    conv_norm_act,
    fused,
    set_backend,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

CI, CO = 16, 24


class Layers(nn.Module):
    """`act(norm(conv(pool(x))) + residual)` of random parameters."""

    def __init__(self, kernel=3, stride=1, *, act=None, pool=None, bias=True, channels=(CI, CO)):
        super().__init__()
        self.conv = Conv3d(*channels, kernel, stride, kernel // 2, bias=bias)
        self.norm = InstanceNorm3d(channels[1], affine=True)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self.act, self.pool = act, pool

    def forward(self, x, residual=None):
        return conv_norm_act(x, self.conv, self.norm, self.act, residual=residual, pool=self.pool)


def run(layers, x, residual, mask, backend, dtype):
    """Output and gradients; the upstream gradient spares what is near the activation's kink."""
    layers = set_backend(copy.deepcopy(layers), backend).to(dtype)
    x = x.to(dtype).requires_grad_()
    leaves = [x, *layers.parameters()]
    added = None
    if residual is not None:
        residual = residual.to(dtype).requires_grad_()
        leaves.append(residual)
        added = BlockTensor(residual, mask)
    y = layers(BlockTensor(x, mask), added).features
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    upstream = upstream * (y.detach().abs() > 1e-4)
    return [y, *torch.autograd.grad(y, leaves, upstream)]


def compare(layers, mask, block, *, residual=False, dtype=torch.float32, out_block=None):
    x = torch.randn(len(mask), *block, layers.conv.in_channels)
    added = None
    if residual:
        added = torch.randn(len(mask), *(out_block or block), layers.conv.out_channels)
    expected = run(layers, x, added, mask, "reference", torch.float64)
    values = run(layers, x, added, mask, "triton", dtype)
    names = ["y", "x", *(n for n, _ in layers.named_parameters()), "residual"]
    beside = expected[names.index("conv.weight")].abs().max()
    assert len(values) == len(expected) == len(names) - (not residual)
    for name, value, truth in zip(names, values, expected, strict=False):
        # a bias before a norm has no gradient but what rounds: measured by the weight's
        scale = beside if name == "conv.bias" or not truth.numel() else truth.abs().max()
        assert value.isfinite().all(), name
        if truth.numel():
            error = ((value.double() - truth).abs().max() / scale.clamp(min=1e-12)).item()
            assert error < (2e-5 if dtype == torch.float32 else 5e-3), (name, error)


ACTIVATIONS = {"none": None, "leaky": LeakyReLU(0.01, inplace=True), "relu": ReLU(inplace=True)}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("width", [2, 4])
def test_convolution_norm_and_activation(width, act, residual):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    compare(Layers(act=ACTIVATIONS[act]), mask, (width,) * 3, residual=residual)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 0.75, 0.9, 1.0])
def test_mask_ratios(ratio):
    compare(
        Layers(act=LeakyReLU()), BlockMask.random(1, (2, 2, 2), ratio), (2, 2, 2), residual=True
    )


def test_samples_of_unequal_size():
    visible = torch.rand(3, 2, 2, 1) < 0.5
    visible[1] = False
    compare(Layers(act=LeakyReLU()), BlockMask.from_visible(visible), (4, 4, 4), residual=True)


@pytest.mark.parametrize("bias", [True, False])
def test_strided(bias):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    layers = Layers(stride=2, act=LeakyReLU(), bias=bias)
    compare(layers, mask, (4, 4, 4), residual=True, out_block=(2, 2, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [2, (1, 2, 2), 1])
def test_pooled_shortcut(window, bias):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    compare(Layers(1, pool=AvgPool3d(window, window), bias=bias), mask, (4, 4, 4))


def test_half_precision():
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    compare(Layers(act=LeakyReLU()), mask, (4, 4, 4), residual=True, dtype=torch.float16)


@pytest.mark.parametrize(
    ("block", "stride", "channels"),
    [((4, 8, 16), 1, (16, 16)), ((8, 8, 4), 1, (5, 7)), ((16, 8, 8), 2, (8, 16))],
    ids=["march", "gather", "strided"],
)
def test_statistics_come_from_the_convolution(monkeypatch, block, stride, channels):
    """Where tiles lie in single blocks, nothing reads the result again to take its moments."""
    from sparsemae.kernels import triton_backend, triton_norm

    calls = []
    statistics = triton_norm._statistics
    monkeypatch.setattr(triton_norm, "_statistics", lambda *a: calls.append(a) or statistics(*a))
    for module in (triton_norm, triton_backend):
        monkeypatch.setattr(module, "fits_one_launch", lambda longest: False)
    mask = BlockMask.random(1, (1, 1, 2), 0.0)
    layers = Layers(stride=stride, act=LeakyReLU(), channels=channels)
    compare(layers, mask, block)
    assert not calls
    compare(Layers(act=LeakyReLU()), mask, (2, 2, 2))
    assert len(calls) == 1


def test_moments_of_a_mean_that_dwarfs_the_deviations(monkeypatch):
    """They are merged from tile to tile, not taken as a difference of large sums."""
    from sparsemae.kernels import triton_backend, triton_norm

    for module in (triton_norm, triton_backend):
        monkeypatch.setattr(module, "fits_one_launch", lambda longest: False)
    mask = BlockMask.random(1, (1, 1, 2), 0.0)
    layers = Layers(act=None, channels=(16, 16))
    nn.init.constant_(layers.conv.bias, 1e4)
    x = torch.randn(len(mask), 4, 8, 16, 16)
    values, expected = (
        run(layers, x, None, mask, backend, dtype)[0]
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    # rows and means of 1e4 are each rounded to 5e-4, deviations of 0.6 stretched to 1
    assert (values - expected).abs().max() < 1e-2


def fuses(layers, x) -> bool:
    return fused._fuses(x, layers.conv, layers.norm, layers.act, layers.pool)


def test_what_is_fused():
    mask = BlockMask.random(1, (1, 2, 2), 0.5)
    x = BlockTensor(torch.randn(len(mask), 2, 2, 2, CI), mask)
    assert fuses(set_backend(Layers(act=LeakyReLU()), "triton"), x)
    other = set_backend(Layers(act=LeakyReLU()), "triton")
    other.norm.backend = "torch"
    refused = [
        set_backend(Layers(act=LeakyReLU()), "torch"),
        set_backend(Layers(act=GELU()), "triton"),
        set_backend(Layers(act=LeakyReLU(-0.1)), "triton"),
        set_backend(Layers(3, pool=AvgPool3d(2)), "triton"),
        set_backend(Layers(stride=2), "triton"),  # to voxels of the dense bottleneck
        other,
    ]
    refused[-2].to(torch.float32)
    coarse = BlockTensor(x.features[:, :1, :1, :1], mask)
    assert not fuses(refused[-2], coarse)
    assert not any(fuses(layers, x) for layers in refused if layers is not refused[-2])
    assert not fuses(set_backend(Layers(), "triton"), x.unpack())


def test_a_layer_that_is_not_fused_means_the_same():
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    compare(Layers(act=GELU()), mask, (2, 2, 2), residual=True)
    compare(Layers(act=LeakyReLU(-0.1)), mask, (2, 2, 2))


def test_settings_without_a_sparse_form():
    mask = BlockMask.random(1, (1, 1, 1), 0.0)
    x = BlockTensor(torch.randn(1, 2, 2, 2, CI), mask)
    layers = set_backend(Layers(act=LeakyReLU()), "triton")
    layers.conv.padding_mode = "reflect"
    with pytest.raises(ValueError, match="padding_mode must be 'zeros'"):
        layers(x)
    layers = set_backend(Layers(channels=(CI + 1, CO)), "triton")
    with pytest.raises(ValueError, match="x has 16 channels, weight takes 17"):
        layers(x)
