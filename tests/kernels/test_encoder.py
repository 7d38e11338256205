"""A whole ResEnc encoder on visible blocks against the same encoder, dense and masked."""

import copy

import pytest
import torch
from torch import nn

from sparsemae.kernels import GELU, BlockMask, BlockTensor, DenseMasked
from sparsemae.models.resenc import ResEncUNet

pytestmark = pytest.mark.usefixtures("one_thread")

# The L topology at small widths: six stages, five strides of 2. Block widths at the input:
CELLS = {
    "32": ((96, 64, 64), (32, 32, 32)),  # sparse down to blocks of 1
    "16": ((64, 64, 64), (16, 16, 16)),  # the last stage is coarser than the grid
    "anisotropic": ((64, 96, 64), (16, 32, 8)),  # coarser on one axis, later on all
}
PLANS = {
    "L": {"strides": (1, 2, 2, 2, 2, 2)},
    "anisotropic": {
        "strides": (1, (1, 2, 2), 2, 2, (2, 1, 2), 2),
        "kernel_sizes": ((1, 3, 3), (1, 3, 3), 3, 3, 3, 3),
    },
}
MASK_RATIO = 0.6


def encoder(plan: str, dtype) -> nn.Module:
    """Norms and biases get random values: nnU-Net starts some of them at zero."""
    net = ResEncUNet(
        2,
        1,
        features_per_stage=(4, 6, 8, 10, 12, 12),
        n_blocks_per_stage=(1, 2, 1, 2, 1, 1),
        **PLANS[plan],
    ).encoder
    for module in net.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.Conv3d) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.5)
    return net.to(dtype)


def scene(cells: str, dtype=torch.float32, mask_ratio=MASK_RATIO) -> tuple[torch.Tensor, BlockMask]:
    size, cell = CELLS[cells]
    grid = tuple(s // c for s, c in zip(size, cell, strict=True))
    return torch.randn(2, 2, *size, dtype=dtype), BlockMask.random(2, grid, mask_ratio)


def dense(skip) -> torch.Tensor:
    return skip if isinstance(skip, torch.Tensor) else skip.unpack()


def run(net, x) -> tuple[list, dict[str, torch.Tensor]]:
    """The skips, and the gradients of all parameters for a random upstream gradient."""
    net.zero_grad()
    skips = net(x)
    generator = torch.Generator().manual_seed(1)
    values = [dense(s) for s in skips]
    upstream = [torch.randn(v.shape, generator=generator).to(v.dtype) for v in values]
    torch.autograd.backward(values, upstream)
    return skips, {name: p.grad.clone() for name, p in net.named_parameters()}


def distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value - expected).norm() / expected.norm()).item()


def differences(net, x, other) -> tuple[list, list[float], dict[str, float]]:
    """Skips on `x`, the distances of skips and of gradients to those on `other`."""
    skips, gradients = run(net, x)
    expected_skips, expected = run(net, other)
    outputs = [distance(dense(a), dense(b)) for a, b in zip(skips, expected_skips, strict=True)]
    distances = {}
    for name, gradient in gradients.items():
        weight = name.replace("conv.bias", "conv.weight")
        if weight == name:
            distances[name] = distance(gradient, expected[name])
        else:  # a norm follows, the true gradient is zero: how small beside that of the weight?
            both = torch.stack([gradient, expected[name]])
            distances[name] = (both.norm() / expected[weight].norm()).item()
    return skips, outputs, distances


def smooth(net: nn.Module) -> nn.Module:
    """GELU for LeakyReLU.

    In float32 a voxel within rounding of LeakyReLU's kink has slope 1 on one side and 0.01 on the
    other: rarely, one such voxel moves gradients by 1e-3 to 2e-2, dense against dense too.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, GELU())
    return net


SCENES = [
    ("L", "32", 6),
    ("L", "16", 5),
    ("L", "anisotropic", 4),
    ("anisotropic", "anisotropic", 4),
]


@pytest.mark.parametrize(("plan", "cells", "sparse_stages"), SCENES)
def test_blocks_equal_dense_and_masked(plan, cells, sparse_stages):
    net, (x, mask) = encoder(plan, torch.float64), scene(cells, torch.float64)
    packed, simulated = BlockTensor.pack(x, mask), DenseMasked.pack(x, mask)
    skips, outputs, gradients = differences(net, packed, simulated)
    assert max(outputs) < 1e-9
    assert max(gradients.values()) < 1e-9, gradients
    kinds = [type(s) for s in skips]
    assert kinds == [BlockTensor] * sparse_stages + [torch.Tensor] * (6 - sparse_stages)


@pytest.mark.parametrize(("plan", "cells", "sparse_stages"), SCENES)
def test_blocks_equal_dense_and_masked_in_float32(plan, cells, sparse_stages):
    net, (x, mask) = encoder(plan, torch.float32), scene(cells)
    packed, simulated = BlockTensor.pack(x, mask), DenseMasked.pack(x, mask)
    _, outputs, gradients = differences(net, packed, simulated)
    assert max(outputs) < 1e-4
    assert sorted(gradients.values())[len(gradients) // 2] < 1e-4, gradients
    _, outputs, gradients = differences(smooth(net), packed, simulated)
    assert max(outputs) < 1e-4
    assert max(gradients.values()) < 1e-4, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
@pytest.mark.parametrize("cells", ["32", "16"])
def test_with_nothing_masked_it_is_the_plain_network(cells, dtype, tolerance):
    net, (x, mask) = encoder("L", dtype), scene(cells, dtype, mask_ratio=0.0)
    if dtype == torch.float32:
        net = smooth(net)
    _, outputs, gradients = differences(net, BlockTensor.pack(x, mask), x)
    assert max(outputs) < tolerance
    assert max(gradients.values()) < tolerance, gradients


@pytest.mark.parametrize("cells", CELLS)
@pytest.mark.parametrize("content", [0.0, 1e6, float("nan"), float("inf")])
def test_masked_content_changes_nothing(cells, content):
    """Bit for bit, outputs and gradients."""
    net, (x, mask) = encoder("L", torch.float32), scene(cells)
    masked = ~mask.voxels(mask.block_of(x.shape))
    before, expected = run(net, BlockTensor.pack(x, mask))
    after, gradients = run(net, BlockTensor.pack(x.masked_fill(masked, content), mask))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(dense(a), dense(b))
        assert dense(b).isfinite().all()
    assert all(torch.equal(gradients[name], g) for name, g in expected.items())


def test_one_visible_block():
    """Fewer voxels than anything is tuned for; the norms of the last stage see one voxel."""
    net, (x, _) = encoder("L", torch.float64), scene("32", torch.float64)
    visible = torch.zeros(2, 3, 2, 2, dtype=torch.bool)
    visible[0, 0, 1, 0] = visible[1, 1, 1, 1] = True
    mask = BlockMask.from_visible(visible)
    skips, expected = run(net, BlockTensor.pack(x, mask))[0], run(net, DenseMasked.pack(x, mask))[0]
    for skip, reference in zip(skips, expected, strict=True):
        assert distance(skip.unpack(), reference.unpack()) < 1e-9


def test_the_comparison_has_teeth():
    """One stage that takes its statistics over all voxels is seen."""
    net, (x, mask) = encoder("L", torch.float64), scene("32", torch.float64)
    wrong = copy.deepcopy(net)
    norm = wrong.stages[2].blocks[0].conv1.norm
    norm.forward = lambda y: y.pack(nn.InstanceNorm3d.forward(norm, y.unpack()), mask)
    skips = net(BlockTensor.pack(x, mask))
    others = wrong(BlockTensor.pack(x, mask))
    distances = [distance(a.unpack(), b.unpack()) for a, b in zip(skips, others, strict=True)]
    assert distances[:2] == [0.0, 0.0]
    assert min(distances[2:]) > 1e-2
