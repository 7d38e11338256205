"""Pointwise torch functions, arithmetic and channel concatenation on masked tensors."""

import operator

import pytest
import torch
import torch.nn.functional as F

from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked, LeakyReLU, ops

BLOCK, CHANNELS = (1, 2, 3), 4
KINDS = [BlockTensor, DenseMasked]
FUNCTIONS = [
    *(torch.neg, torch.abs, torch.exp, torch.square, torch.sigmoid, torch.tanh, torch.relu),
    *(F.relu, F.leaky_relu, F.gelu, F.silu, F.elu, F.mish, F.softplus, F.hardswish),
    lambda x: torch.clamp(x, min=-0.5, max=0.5),
    lambda x: F.leaky_relu(x, 0.1),
    lambda x: F.dropout(x, 0.5, training=False),
    torch.nn.GELU(),
    torch.nn.LeakyReLU(0.2),
]
ARITHMETIC = [
    *(operator.add, operator.sub, operator.mul),
    *(torch.add, torch.sub, torch.mul, torch.maximum),
    lambda x, y: torch.add(x, y, alpha=3),
    lambda x, y: torch.lerp(x, y, 0.25),
]
REVERSED = [operator.add, operator.sub, operator.mul]


@pytest.fixture
def mask():
    visible = torch.rand(2, 2, 3, 2) < 0.5
    visible[0, 0], visible[1, 1] = True, False
    return BlockMask.from_visible(visible)


def batch(channels=CHANNELS) -> torch.Tensor:
    """Away from zero, so that quotients are tame."""
    x = torch.randn(2, channels, 2, 6, 6, dtype=torch.float64)
    return x + x.sign() * 0.1


def agrees(masked, dense: torch.Tensor) -> bool:
    """Whether the visible voxels are those of `dense` and the others zero.

    But for the last bit: a vectorised exponential depends on the place in memory.
    """
    expected = dense.where(masked.mask.voxels(masked.block), 0.0)
    return torch.allclose(masked.unpack(), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: getattr(f, "__name__", type(f).__name__))
def test_functions(kind, fn, mask):
    x = batch()
    y = fn(kind.pack(x, mask))
    assert type(y) is kind
    assert y.mask is mask
    assert agrees(y, fn(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", ARITHMETIC, ids=lambda f: f.__name__)
def test_arithmetic_of_two(kind, fn, mask):
    x, y = batch(), batch()
    assert agrees(fn(kind.pack(x, mask), kind.pack(y, mask)), fn(x, y))


@pytest.mark.parametrize("fn", [operator.truediv, torch.div])
def test_quotient_of_two(fn, mask):
    """Of BlockTensors only: a DenseMasked would divide zero by zero where masked."""
    x, y = batch(), batch()
    assert agrees(fn(BlockTensor.pack(x, mask), BlockTensor.pack(y, mask)), fn(x, y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_scalars_and_values_per_channel(kind, fn, mask):
    x = batch()
    per_channel = torch.arange(1.0, 1 + CHANNELS, dtype=torch.float64).view(1, -1, 1, 1, 1)
    for other in (2.5, torch.tensor(2.5), per_channel, per_channel[:, :1]):
        assert agrees(fn(kind.pack(x, mask), other), fn(x, other))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fn", REVERSED)
def test_masked_tensor_on_the_right(kind, fn, mask):
    x = batch()
    per_channel = torch.arange(1.0, 1 + CHANNELS, dtype=torch.float64).view(1, -1, 1, 1, 1)
    for other in (2.5, torch.tensor(2.5), per_channel):
        assert agrees(fn(other, kind.pack(x, mask)), fn(other, x))


@pytest.mark.parametrize("kind", KINDS)
def test_one_channel_against_many(kind, mask):
    x, gate = batch(), batch(1)
    assert agrees(kind.pack(x, mask) * kind.pack(gate, mask), x * gate)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_value_per_channel(kind, mask):
    x, scale = batch(), torch.randn(1, CHANNELS, 1, 1, 1, dtype=torch.float64)
    scale.requires_grad_()
    upstream = torch.randn_like(x)
    (kind.pack(x, mask) * scale).unpack().backward(upstream)
    expected = (x * upstream * mask.voxels(BLOCK)).sum((0, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(scale.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [1, -4])
def test_concatenate_channels(kind, dim, mask):
    parts = batch(), batch(1), batch(3)
    joined = torch.cat([kind.pack(p, mask) for p in parts], dim=dim)
    assert joined.channels == CHANNELS + 4
    assert agrees(joined, torch.cat(parts, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_concatenation_errors(kind, mask):
    x = kind.pack(batch(), mask)
    for dim in (0, 2, -1):
        with pytest.raises(ValueError, match=rf"concatenates channels \(dim=1\), not dim={dim}"):
            torch.cat([x, x], dim)
    for mixed in ([x, batch()], [batch(), x]):
        with pytest.raises(TypeError, match=r"cannot concatenate .* and .*: pack or unpack one"):
            torch.cat(mixed, 1)
    with pytest.raises(ValueError, match="two different masks"):
        torch.cat([x, kind.pack(batch(), mask.hidden().hidden())], 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (torch.sum, "sum"),
        (torch.mean, "mean"),
        (lambda x: torch.softmax(x, 1), "softmax"),
        (lambda x: torch.stack([x, x]), "stack"),
        (lambda x: torch.flip(x, (2,)), "flip"),
        (lambda x: F.interpolate(x, scale_factor=2), "interpolate"),
        (lambda x: F.max_pool3d(x, 2), "max_pool3d"),
        (torch.nn.Conv3d(CHANNELS, 2, 3), "conv3d"),
        (F.instance_norm, "instance_norm"),
        (torch.nn.Dropout3d(), "dropout3d"),
    ],
)
def test_functions_that_mix_voxels_are_refused(kind, fn, name, mask):
    remedy = "Use the operators of sparsemae.kernels, x.map.fn., or x.unpack.. for a Tensor"
    with pytest.raises(
        TypeError, match=rf"^({name}) is not defined on a {kind.__name__}.*{remedy}"
    ):
        fn(kind.pack(batch(), mask))


@pytest.mark.parametrize("kind", KINDS)
def test_operands_that_do_not_fit(kind, mask):
    dense = batch()
    x = kind.pack(dense, mask)
    with pytest.raises(ValueError, match="on two different masks: pack both with one BlockMask"):
        x + kind.pack(dense, BlockMask.from_visible(mask.visible))
    with pytest.raises(ValueError, match=r"two resolutions: blocks \(1, 2, 3\) and \(2, 4, 6\)"):
        x + kind.pack(F.interpolate(dense, scale_factor=2), mask)
    with pytest.raises(TypeError, match="cannot combine a BlockTensor and a DenseMasked"):
        BlockTensor.pack(dense, mask) + DenseMasked.pack(dense, mask)
    per_sample = torch.ones(2, 1, 1, 1, 1)
    for other in (dense, dense[0], per_sample, per_sample.expand(2, 4, 1, 1, 1), torch.ones(4)):
        with pytest.raises(TypeError, match=r"or give one value per channel as \[1, 4, 1, 1, 1\]"):
            x * other


def test_one_value_per_sample_is_not_one_per_channel():
    """As many samples as channels: the shapes alone would fit."""
    mask = BlockMask.random(CHANNELS, (2, 3, 2), 0.5)
    x = BlockTensor.pack(torch.randn(CHANNELS, CHANNELS, 2, 3, 2), mask)
    with pytest.raises(TypeError, match="one value per channel"):
        x * torch.rand(CHANNELS, 1, 1, 1, 1)


OPERATORS = {
    "pack": lambda x, w: x * 1.0,
    "conv3d halo": lambda x, w: ops.conv3d(x, w[3], w[0]),
    "conv3d strided": lambda x, w: ops.conv3d(x, w[3], w[0], (2, 2, 2)),
    "conv3d 1x1": lambda x, w: ops.conv3d(x, w[1], w[0]),
    "conv_transpose3d": lambda x, w: ops.conv_transpose3d(x, w[2], w[0]),
    "instance_norm": lambda x, w: ops.instance_norm(x, w[0], w[0]),
    "avg_pool3d": lambda x, w: ops.avg_pool3d(x, (2, 2, 2)),
    "max_pool3d": lambda x, w: ops.max_pool3d(x, (2, 2, 2)),
    "add": lambda x, w: x + x * 2.0,
    "cat": lambda x, w: torch.cat([x, x], 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [(2, 2, 2), (4, 4, 4)])  # taps and halo
@pytest.mark.parametrize("name", OPERATORS)
def test_in_place_activation_after_an_operator(name, block, dtype):
    """As in ResEnc: autograd has to take it, with the gradients of the out-of-place function."""
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    dense = torch.randn(2, CHANNELS, *(2 * b for b in block), dtype=dtype)
    shapes = [(CHANNELS,), *((CHANNELS, CHANNELS, k, k, k) for k in (1, 2, 3))]
    weights = [torch.randn(s, dtype=dtype) for s in shapes]
    results = []
    for inplace in (False, True):
        leaves = [t.clone().requires_grad_() for t in (dense, *weights)]
        y = OPERATORS[name](BlockTensor.pack(leaves[0], mask), leaves[1:])
        y = LeakyReLU(0.1, inplace=inplace)(y)
        torch.manual_seed(1)
        y.features.backward(torch.randn(y.features.shape, dtype=dtype))
        results.append([y.features, *(t.grad for t in leaves if t.grad is not None)])
    for expected, value in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_in_place_activation_after_pack_and_unpack():
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    dense = torch.randn(2, CHANNELS, 4, 4, 4, requires_grad=True)
    packed = F.leaky_relu(BlockTensor.pack(dense, mask), 0.1, inplace=True)
    token = torch.full((CHANNELS,), -1.0, requires_grad=True)
    y = F.leaky_relu(packed.unpack(token), 0.5, inplace=True)
    y.sum().backward()
    slope = torch.where(dense < 0, 0.05, 1.0) * mask.voxels((2, 2, 2))
    torch.testing.assert_close(dense.grad, slope)
    hidden = (~mask.voxels((2, 2, 2))).sum()
    assert token.grad.tolist() == [0.5 * hidden] * CHANNELS
