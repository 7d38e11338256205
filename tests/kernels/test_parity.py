"""Every operator of every backend against the float64 reference: output and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemae.kernels import BlockMask, available, ops

pytestmark = pytest.mark.usefixtures("one_thread")

RATIOS = [0.0, 0.25, 0.6, 0.75, 0.9, 1.0]
# Largest difference over largest value. Sums here have up to 2e4 terms of one size and random
# sign: in float32 they round to about 1e-7 of the largest, and no cancellation is exempt.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
# triton has files of its own: it takes float32 and float16, and its interpreter is slow
BACKENDS = [b for b in available() if b not in ("reference", "triton")]

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
channels = st.integers(1, 7)
ones_and_threes = st.tuples(*[st.sampled_from([1, 3])] * 3)
ones_and_twos = st.tuples(*[st.integers(1, 2)] * 3)
upto_three = st.tuples(*[st.integers(1, 3)] * 3)


def examples(count: int):
    return settings(deadline=None, max_examples=count, derandomize=True)


@st.composite
def masks(draw) -> BlockMask:
    """One to three samples, of one mask ratio or each of its own, some of them empty."""
    batch, grid = draw(st.integers(1, 3)), draw(upto_three)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    ratio = draw(st.none() | st.sampled_from(RATIOS))
    if ratio is not None:
        return BlockMask.random(batch, grid, ratio, generator=generator)
    share = st.sampled_from([0.0, 0.3, 0.7, 1.0])
    shares = torch.tensor(draw(st.lists(share, min_size=batch, max_size=batch)))
    noise = torch.rand(batch, *grid, generator=generator)
    return BlockMask.from_visible(noise < shares.view(-1, 1, 1, 1))


def random(**shapes) -> dict[str, torch.Tensor]:
    """Float32 values, so that both precisions get the same; a shape of None is left out."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
        if shape is not None
    }


def times(block, factor):
    return tuple(b * f for b, f in zip(block, factor, strict=True))


def check(errors: dict[str, float], dtype) -> None:
    assert max(errors.values()) < TOLERANCE[dtype], errors


@every_dtype
@every_backend
@examples(150)
@given(masks(), upto_three, ones_and_threes, ones_and_twos, channels, channels, st.booleans())
def test_conv3d(parity, backend, dtype, mask, block, kernel, stride, ci, co, bias):
    shapes = {"x": (len(mask), *times(block, stride), ci), "weight": (co, ci, *kernel)}
    leaves = random(**shapes, bias=(co,) if bias else None)

    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p.get("bias"), stride, backend=backend)

    check(parity(op, leaves, mask, dtype, backend), dtype)


@every_dtype
@every_backend
@pytest.mark.parametrize("mask_ratio", RATIOS)
@pytest.mark.parametrize(
    ("block", "kernel", "stride"),
    [
        ((1, 1, 1), (3, 3, 3), (1, 1, 1)),
        ((2, 2, 2), (3, 3, 3), (1, 1, 1)),
        ((3, 3, 3), (3, 3, 3), (1, 1, 1)),
        ((4, 4, 4), (3, 3, 3), (1, 1, 1)),
        ((1, 2, 5), (3, 3, 3), (1, 1, 1)),
        ((2, 4, 4), (1, 3, 3), (1, 1, 1)),
        ((1, 1, 1), (1, 3, 3), (1, 1, 1)),
        ((4, 4, 4), (3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (3, 3, 3), (2, 2, 2)),
        ((1, 4, 6), (1, 3, 3), (1, 2, 2)),
        ((3, 2, 4), (3, 3, 3), (1, 2, 2)),
        ((2, 4, 2), (1, 1, 1), (2, 2, 2)),
        ((2, 2, 3), (1, 1, 1), (1, 1, 1)),
    ],
    ids=lambda v: "".join(map(str, v)),
)
def test_conv3d_at_every_mask_ratio(parity, backend, dtype, mask_ratio, block, kernel, stride):
    mask = BlockMask.random(3, (2, 3, 3), mask_ratio)
    leaves = random(x=(len(mask), *block, 5), weight=(7, 5, *kernel), bias=(7,))

    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p["bias"], stride, backend=backend)

    check(parity(op, leaves, mask, dtype, backend), dtype)


@every_dtype
@every_backend
@examples(40)
@given(masks(), upto_three, upto_three, channels, channels, st.booleans())
def test_conv_transpose3d(parity, backend, dtype, mask, block, kernel, ci, co, bias):
    leaves = random(
        x=(len(mask), *block, ci), weight=(ci, co, *kernel), bias=(co,) if bias else None
    )

    def op(x, p, backend):
        return ops.conv_transpose3d(x, p["weight"], p.get("bias"), backend=backend)

    check(parity(op, leaves, mask, dtype, backend), dtype)


@every_dtype
@every_backend
@examples(100)
@given(masks(), upto_three, channels, st.booleans(), st.booleans(), st.sampled_from([1e-5, 0.1]))
def test_instance_norm(parity, backend, dtype, mask, block, channels, weight, bias, eps):
    leaves = random(
        x=(len(mask), *block, channels),
        weight=(channels,) if weight else None,
        bias=(channels,) if bias else None,
    )
    leaves["x"] += 1.0  # a mean, so that it matters

    def op(x, p, backend):
        return ops.instance_norm(x, p.get("weight"), p.get("bias"), eps, backend=backend)

    # Where few voxels are normalised both results cancel, with one voxel to zero. What rounds are
    # the terms: voxel and mean, and the upstream gradient (within 5), times the slope.
    slope = steepest(leaves["x"], mask, eps) * largest(leaves.get("weight", torch.ones(1)))
    floors = {"y": largest(leaves["x"]) * slope, "x": 5 * slope}
    check(parity(op, leaves, mask, dtype, backend, floors=floors), dtype)


def largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def steepest(x: torch.Tensor, mask: BlockMask, eps: float) -> float:
    """The largest 1 / sqrt(variance + eps) of a sample and channel."""
    samples = [s.flatten(0, 3) for s in x.double().split(mask.counts) if len(s)]
    return max(((s.var(0, correction=0) + eps).rsqrt().max().item() for s in samples), default=0)


@every_dtype
@every_backend
@pytest.mark.parametrize("pool", [ops.avg_pool3d, ops.max_pool3d], ids=lambda f: f.__name__)
@examples(30)
@given(masks(), upto_three, upto_three, channels)
def test_pooling(parity, backend, dtype, pool, mask, block, window, channels):
    leaves = random(x=(len(mask), *times(block, window), channels))

    def op(x, p, backend):
        return pool(x, window, backend=backend)

    check(parity(op, leaves, mask, dtype, backend), dtype)


@every_dtype
@every_backend
@examples(20)
@given(masks(), upto_three)
def test_a_chain_of_operators(parity, backend, dtype, mask, block):
    """As in a residual block: strided convolution, norm, activation, sum with a pooled shortcut."""
    leaves = random(x=(len(mask), *times(block, (2, 2, 2)), 3), weight=(5, 3, 3, 3, 3), skip=(5, 3))

    def op(x, p, backend):
        y = ops.conv3d(x, p["weight"], None, (2, 2, 2), backend=backend)
        y = torch.nn.functional.gelu(ops.instance_norm(y, eps=1.0, backend=backend))
        skip = p["skip"][..., None, None, None]
        pooled = ops.avg_pool3d(x, (2, 2, 2), backend=backend)
        return torch.cat([y, y + ops.conv3d(pooled, skip, backend=backend)], 1)

    # with one visible voxel the norm's output, and with it the weight's gradient, is zero
    check(parity(op, leaves, mask, dtype, backend, floors={"weight": 1.0}), dtype)
