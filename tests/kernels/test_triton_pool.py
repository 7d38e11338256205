"""Pooling of the triton backend: against the float64 definition, and torch's rules for ties."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemae.kernels import BlockMask, BlockTensor, ops, triton_pool

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# one rounding of the result, and one of the average's upstream gradient
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2 * 2**-11, torch.bfloat16: 2 * 2**-8}
POOLS = ["avg_pool3d", "max_pool3d"]
every_pool = pytest.mark.parametrize("pool", POOLS)


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(triton_pool, "ELEMENTS", 512)  # 64 of odd channel counts


def pooled(pool, x, mask, window):
    return getattr(triton_pool, pool)(BlockTensor(x, mask), window).features


def definition(pool, x, mask, window):
    return getattr(ops, pool)(BlockTensor(x, mask), window, backend="reference").features


def run(fn, pool, x, mask, window, upstream=None):
    """Result and input gradient."""
    x = x.to(DEVICE, copy=True).requires_grad_()
    y = fn(pool, x, mask.to(DEVICE), window)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        upstream = upstream.to(torch.bfloat16).to(torch.float16)  # values that all have
    y.backward(upstream.to(y))
    return y.detach(), x.grad


def check(pool, x, mask, window):
    values = run(pooled, pool, x, mask, window)
    exact = run(definition, pool, x.double(), mask, window)
    for value, expected in zip(values, exact, strict=True):
        assert value.shape == expected.shape
        if value.numel():
            worst = (value.double() - expected).abs().max() / expected.abs().max()
            assert worst < TOLERANCE[x.dtype]


def features(mask, block, window, channels, dtype=torch.float32):
    shape = [b * w for b, w in zip(block, window, strict=True)]
    return torch.randn(len(mask), *shape, channels).to(dtype)


@every_pool
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [(2, 2, 2), (1, 2, 2), (3, 1, 2), (1, 1, 1), (3, 3, 3)], ids=str)
def test_windows(pool, dtype, window):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    check(pool, features(mask, (1, 2, 2), window, 5, dtype), mask, window)


@every_pool
@pytest.mark.parametrize("channels", [1, 3, 8, 40])
@pytest.mark.parametrize("block", [(1, 1, 1), (2, 2, 2), (1, 2, 5), (3, 1, 4)], ids=str)
def test_blocks_and_channels(pool, block, channels):
    mask = BlockMask.random(1, (1, 2, 2), 0.5)
    check(pool, features(mask, block, (2, 2, 2), channels), mask, (2, 2, 2))


@every_pool
@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.6, 0.75, 0.9, 1.0])
def test_every_mask_ratio(pool, mask_ratio):
    mask = BlockMask.random(2, (2, 3, 2), mask_ratio)
    check(pool, features(mask, (1, 1, 1), (2, 2, 2), 4), mask, (2, 2, 2))


@every_pool
def test_the_tiles_that_are_shipped(pool, monkeypatch):
    monkeypatch.undo()
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    check(pool, features(mask, (4, 4, 4), (2, 2, 2), 72), mask, (2, 2, 2))
    check(pool, features(mask, (8, 8, 8), (2, 2, 2), 1), mask, (2, 2, 2))


SPECIAL = [0.0, 1.0, -1.0, math.inf, -math.inf, math.nan]


def torch_pooled(x, window):
    """Of each block as a small image, and the gradient of the sum of 1, 2, 3, ..."""
    x = x.permute(0, 4, 1, 2, 3).contiguous().requires_grad_()  # channels-last errs on -inf
    y = F.max_pool3d(x, window)
    y.backward(numbered(y.shape, x.device).permute(0, 4, 1, 2, 3).reshape(y.shape))
    return y.detach().permute(0, 2, 3, 4, 1), x.grad.permute(0, 2, 3, 4, 1)


def numbered(shape, device):
    n, c, d, h, w = shape
    return torch.arange(1.0, n * c * d * h * w + 1, device=device).view(n, d, h, w, c)


@pytest.mark.parametrize("window", [(2, 2, 2), (3, 1, 2)], ids=str)
def test_ties_infinities_and_nan_as_in_torch(window):
    mask = BlockMask.random(1, (2, 3, 2), 0.0).to(DEVICE)
    shape = [len(mask), *(2 * w for w in window), 6]
    x = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)].to(DEVICE)
    x[0], x[1], x[2] = -math.inf, math.nan, 1.0
    expected, gradient = torch_pooled(x, window)
    leaf = x.requires_grad_()
    y = pooled("max_pool3d", leaf, mask, window)
    n, d, h, w, c = y.shape
    y.backward(numbered((n, c, d, h, w), x.device))
    assert torch.equal(y.nan_to_num(7.0, 8.0, 9.0), expected.nan_to_num(7.0, 8.0, 9.0))
    assert torch.equal(leaf.grad, gradient)


@every_pool
@pytest.mark.parametrize(
    "upstream",
    [
        lambda y: torch.randn(1).expand(y),
        lambda y: torch.randn(y[-1]).expand(y),
        lambda y: torch.randn(*y[:-1], y[-1] + 3)[..., 1:-2],
    ],
    ids=["expanded", "per channel", "sliced"],
)
def test_upstream_gradients_and_inputs_of_any_layout(pool, upstream):
    mask = BlockMask.random(1, (1, 2, 2), 0.5)
    x = torch.randn(len(mask), 2, 4, 2, 9)[..., 2:7]
    given = upstream((len(mask), 1, 2, 1, 5))
    found = run(pooled, pool, x, mask, (2, 2, 2), given)
    expected = run(pooled, pool, x.contiguous(), mask, (2, 2, 2), given.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again = run(pooled, pool, x, mask, (2, 2, 2), given)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@every_pool
def test_a_frozen_input_and_an_activation_in_place(pool):
    mask = BlockMask.random(1, (1, 2, 2), 0.5).to(DEVICE)
    x = torch.randn(len(mask), 2, 2, 2, 3, device=DEVICE)
    y = pooled(pool, x, mask, (2, 2, 2))
    assert not y.requires_grad
    y = pooled(pool, x.requires_grad_(), mask, (2, 2, 2))
    F.leaky_relu_(y, 0.1).sum().backward()
    expected = F.leaky_relu(definition(pool, x, mask, (2, 2, 2)), 0.1)
    assert torch.allclose(y, expected, atol=1e-6)


@every_pool
def test_float64_is_refused(pool):
    mask = BlockMask.random(1, (1, 2, 2), 0.5)
    x = torch.randn(len(mask), 2, 2, 2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"{pool}: .* not float64: convert, or use backend='tor"):
        pooled(pool, x, mask, (2, 2, 2))


@every_pool
def test_shapes_without_storage(pool):
    """What torch.compile sees."""
    mask = BlockMask.random(1, (1, 2, 2), 0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(len(mask), 2, 4, 6, 3, dtype=torch.bfloat16, requires_grad=True)
        y = pooled(pool, x, mask, (1, 2, 3))
        y.sum().backward()
    assert (y.shape, y.dtype, x.grad.dtype) == ((2, 2, 2, 2, 3), torch.bfloat16, torch.bfloat16)


def mirrored(tap: tl.constexpr, n, z, y, x, BLOCK: tl.constexpr, WINDOW: tl.constexpr):
    """The windows' taps walked along the other axis first."""
    z = z * WINDOW[0] + tap % WINDOW[0]
    y = y * WINDOW[1] + tap // WINDOW[0] % WINDOW[1]
    x = x * WINDOW[2] + tap // (WINDOW[0] * WINDOW[1])
    rows = (n * (BLOCK[0] * WINDOW[0]) + z) * (BLOCK[1] * WINDOW[1]) + y
    return rows * (BLOCK[2] * WINDOW[2]) + x


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are cached")
def test_another_order_of_ties_is_caught(monkeypatch):
    monkeypatch.setattr(triton_pool, "_under", triton.jit(mirrored))
    test_windows("max_pool3d", torch.float32, (2, 2, 2))  # right where there are no ties
    with pytest.raises(AssertionError):
        test_ties_infinities_and_nan_as_in_torch((2, 2, 2))
