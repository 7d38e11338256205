"""Stages coarser than the mask grid: nothing is left to skip, so the result is a dense Tensor."""

import pytest
import torch
import torch.nn.functional as F

from sparsemae.kernels import AvgPool3d, BlockMask, BlockTensor, Conv3d, DenseMasked, MaxPool3d, ops

KINDS = [BlockTensor, DenseMasked]
CI, CO = 3, 4
CASES = [
    ((1, 1, 1), (2, 2, 2)),  # all axes
    ((1, 4, 2), (2, 2, 2)),  # only some: the mask is spent all the same
    ((4, 1, 4), (1, 2, 1)),
    ((2, 3, 1), (1, 2, 2)),  # blocks of 3 are cut in two, which is fine on a dense batch
]


def operators(stride):
    return [
        (
            lambda x, w, b: ops.conv3d(x, w, b, stride),
            lambda x, w, b: F.conv3d(x, w, b, stride, 1),
        ),
        (lambda x, w, b: ops.avg_pool3d(x, stride), lambda x, w, b: F.avg_pool3d(x, stride)),
        (lambda x, w, b: ops.max_pool3d(x, stride), lambda x, w, b: F.max_pool3d(x, stride)),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block", "stride"), CASES)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["conv3d", "avg_pool3d", "max_pool3d"])
def test_equals_the_dense_operator_on_the_zero_filled_batch(kind, block, stride, which):
    mask = BlockMask.random(3, (2, 4, 2), 0.5)
    size = (g * b for g, b in zip(mask.grid, block, strict=True))
    leaves = [torch.randn(s) for s in ((3, CI, *size), (CO, CI, 3, 3, 3), (CO,))]
    masked, dense = operators(stride)[which]
    voxels = mask.voxels(block)
    results = []
    for fn in (
        lambda x, w, b: dense(x * voxels, w, b),
        lambda x, w, b: masked(kind.pack(x, mask), w, b),
    ):
        inputs = [t.double().requires_grad_() for t in leaves]
        y = fn(*inputs)
        assert type(y) is torch.Tensor
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        results.append([y, *(t.grad for t in inputs if t.grad is not None)])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_odd_blocks_do_not_halve(kind, backend):
    mask = BlockMask.random(1, (2, 2, 2), 0.5)
    x = kind.pack(torch.randn(1, CI, 4, 6, 4), mask)
    message = (
        r"stride of \(2, 2, 2\) does not divide blocks of \(2, 3, 2\) voxels: "
        r"choose a mask block that is a multiple of the network's strides"
    )
    for operator, _ in operators((2, 2, 2)):
        with pytest.raises(ValueError, match=message):
            operator(x, torch.randn(CO, CI, 3, 3, 3), None)


@pytest.mark.parametrize("kind", KINDS)
def test_modules_go_on_densely(kind):
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    x = kind.pack(torch.randn(2, CI, 4, 4, 4), mask)
    pooled, conv = AvgPool3d(2)(x), Conv3d(CI, CO, 3, 2, 1)
    y = torch.nn.Sequential(conv, MaxPool3d(1))(pooled)
    assert type(y) is torch.Tensor
    torch.testing.assert_close(y, conv(pooled.unpack()))


def test_the_backend_is_checked_on_coarse_stages_too():
    mask = BlockMask.random(1, (2, 2, 2), 0.5)
    x = BlockTensor.pack(torch.randn(1, CI, 2, 2, 2), mask)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose from auto, reference"):
        ops.conv3d(x, torch.randn(CO, CI, 3, 3, 3), None, (2, 2, 2), backend="cuda")
