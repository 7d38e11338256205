"""The oracle itself: `reference` against formulas on dense tensors and plain autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked, ops

GRID, CI, CO = (2, 2, 3), 3, 4
KINDS = [BlockTensor, DenseMasked]


@pytest.fixture
def mask():
    """Three samples: some, all, and one of their blocks visible."""
    visible = torch.rand(3, *GRID) < 0.5
    visible[0, 0, 0], visible[1], visible[2] = True, True, False
    visible[2, 1, 1, 1] = True
    return BlockMask.from_visible(visible)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def volume(block, channels=CI):
    return randn(3, channels, *(g * b for g, b in zip(GRID, block, strict=True)))


def compare(formula, operator, leaves) -> None:
    """Equal outputs and gradients, with one random upstream gradient."""
    results = []
    for fn in (formula, operator):
        inputs = [t.clone().requires_grad_() for t in leaves]
        y = fn(*inputs)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        results.append([y.detach(), *(t.grad for t in inputs)])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)


def coarse(block, stride):
    return tuple(b // s for b, s in zip(block, stride, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("block", "kernel", "stride"),
    [
        ((2, 2, 2), (3, 3, 3), (1, 1, 1)),
        ((1, 2, 3), (3, 3, 3), (1, 1, 1)),
        ((2, 4, 2), (3, 3, 3), (2, 2, 2)),
        ((1, 2, 4), (1, 3, 3), (1, 2, 2)),
        ((2, 2, 2), (1, 1, 1), (2, 1, 2)),
    ],
)
def test_conv3d(kind, block, kernel, stride, mask):
    fine, out = mask.voxels(block), mask.voxels(coarse(block, stride))
    padding = tuple(k // 2 for k in kernel)

    def formula(x, w, b):
        return F.conv3d(x * fine, w, b, stride, padding) * out

    def operator(x, w, b):
        return ops.conv3d(kind.pack(x, mask), w, b, stride, backend="reference").unpack()

    compare(formula, operator, [volume(block), randn(CO, CI, *kernel), randn(CO)])
    compare(
        lambda x, w: formula(x, w, None),
        lambda x, w: operator(x, w, None),
        [volume(block), randn(CO, CI, *kernel)],
    )


def test_conv3d_voxel_by_voxel(mask):
    """No library convolution on either side: a sum over the visible voxels under the taps."""
    x, w, bias = volume((2, 1, 2)), randn(CO, CI, 3, 1, 3), randn(CO)
    visible = mask.voxels((2, 1, 2))[:, 0]
    y = ops.conv3d(BlockTensor.pack(x, mask), w, bias, backend="reference").unpack()
    size = tuple(x.shape[2:])
    for b, *voxel in itertools.product(range(3), *map(range, size)):
        expected = torch.zeros(CO, dtype=torch.float64)
        if visible[b, *voxel]:
            expected += bias
            for tap in itertools.product(range(3), range(1), range(3)):
                source = tuple(
                    v + t - k // 2 for v, t, k in zip(voxel, tap, (3, 1, 3), strict=True)
                )
                inside = all(0 <= s < n for s, n in zip(source, size, strict=True))
                if inside and visible[b, *source]:
                    expected += w[:, :, *tap] @ x[b, :, *source]
        torch.testing.assert_close(y[b, :, *voxel], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", [(2, 2, 2), (1, 2, 3)])
def test_conv_transpose3d(kind, kernel, mask):
    block = (2, 1, 3)
    fine = mask.voxels(block)
    out = mask.voxels(tuple(b * k for b, k in zip(block, kernel, strict=True)))
    compare(
        lambda x, w, b: F.conv_transpose3d(x * fine, w, b, kernel) * out,
        lambda x, w, b: ops.conv_transpose3d(
            kind.pack(x, mask), w, b, backend="reference"
        ).unpack(),
        [volume(block), randn(CI, CO, *kernel), randn(CO)],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", [(ops.avg_pool3d, F.avg_pool3d), (ops.max_pool3d, F.max_pool3d)])
def test_pooling(kind, pool, mask):
    block, window = (2, 4, 3), (1, 2, 3)
    fine, out = mask.voxels(block), mask.voxels(coarse(block, window))
    operator, dense = pool
    compare(
        lambda x: dense(x * fine, window) * out,
        lambda x: operator(kind.pack(x, mask), window, backend="reference").unpack(),
        [volume(block)],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_instance_norm(kind, affine, mask):
    """Sample by sample over its visible voxels: biased variance, eps inside the root."""
    block, eps = (2, 1, 3), 0.1
    visible = mask.voxels(block)[:, 0]

    def formula(x, w=None, b=None):
        rows = []
        for sample, shown in zip(x, visible, strict=True):
            seen = sample[:, shown]  # [C, voxels]
            mean = seen.mean(1, keepdim=True)
            y = (seen - mean) / (((seen - mean) ** 2).mean(1, keepdim=True) + eps).sqrt()
            y = y if w is None else y * w[:, None] + b[:, None]
            rows.append(torch.zeros_like(sample).masked_scatter(shown.expand_as(sample), y))
        return torch.stack(rows)

    def operator(x, w=None, b=None):
        return ops.instance_norm(kind.pack(x, mask), w, b, eps, backend="reference").unpack()

    compare(formula, operator, [volume(block) + 1, *([randn(CI), randn(CI)] if affine else [])])


@pytest.mark.parametrize("kind", KINDS)
def test_with_nothing_masked_it_is_the_dense_operator(kind):
    everything, x = BlockMask.random(3, GRID, 0.0), volume((2, 2, 2))
    y = ops.instance_norm(kind.pack(x, everything), backend="reference").unpack()
    torch.testing.assert_close(y, F.instance_norm(x))


def test_an_empty_sample_is_no_number_nowhere():
    """Division by zero voxels must not reach the output or the gradients of other samples."""
    visible = torch.zeros(2, *GRID, dtype=torch.bool)
    visible[0, 0] = True
    x = volume((2, 2, 2))[:2].requires_grad_()
    for backend in ("reference", "torch"):
        x.grad = None
        y = ops.instance_norm(
            BlockTensor.pack(x, BlockMask.from_visible(visible)), backend=backend
        ).unpack()
        y.square().sum().backward()
        assert y.isfinite().all()
        assert x.grad.isfinite().all()
        assert not x.grad[1].any()
