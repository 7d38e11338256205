"""Convolutions of the triton backend, in Triton's interpreter or on a GPU, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemae.kernels import BlockMask, BlockTensor, ops, tiles
from sparsemae.kernels.tiles import Tile

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

RATIOS = [0.0, 0.25, 0.6, 0.75, 0.9, 1.0]
# Largest difference over largest value; inputs are rounded to the precision first, sums are float32
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3}
CHIP = "sm_90"  # whose tiles the interpreter uses

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
widths = st.tuples(*[st.integers(1, 3)] * 3)
ones_and_threes = st.tuples(*[st.sampled_from([1, 3])] * 3)
ones_and_twos = st.tuples(*[st.integers(1, 2)] * 3)
channels = st.integers(1, 9)


def times(block, factor):
    return tuple(b * f for b, f in zip(block, factor, strict=True))


def conv(stride=(1, 1, 1)):
    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p.get("bias"), stride, backend=backend)

    return op


def transposed(x, p, backend):
    return ops.conv_transpose3d(x, p["weight"], p.get("bias"), backend=backend)


def check(parity, op, shapes, mask, dtype=torch.float32):
    """Output and every gradient against the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    leaves = {name: torch.randn(s, generator=generator).to(dtype) for name, s in shapes.items()}
    errors = parity(op, leaves, mask, dtype, "triton")
    assert set(errors) == {"y", *shapes}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def conv_shapes(mask, block, ci, co, kernel=(3, 3, 3), bias=True):
    shapes = {"x": (len(mask), *block, ci), "weight": (co, ci, *kernel)}
    return shapes | ({"bias": (co,)} if bias else {})


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    st.integers(1, 2), widths, widths, ones_and_threes, ones_and_twos, channels, channels,
    st.sampled_from(RATIOS), st.booleans(),
)  # fmt: skip
def test_any_convolution(parity, batch, grid, block, kernel, stride, ci, co, ratio, bias):
    mask = BlockMask.random(batch, grid, ratio, generator=torch.Generator().manual_seed(1))
    check(parity, conv(stride), conv_shapes(mask, times(block, stride), ci, co, kernel, bias), mask)


@settings(deadline=None, max_examples=15, derandomize=True)
@given(widths, widths, widths, channels, channels, st.sampled_from(RATIOS), st.booleans())
def test_any_transposed_convolution(parity, grid, block, kernel, ci, co, ratio, bias):
    mask = BlockMask.random(2, grid, ratio, generator=torch.Generator().manual_seed(1))
    shapes = {"x": (len(mask), *block, ci), "weight": (ci, co, *kernel)}
    check(parity, transposed, shapes | ({"bias": (co,)} if bias else {}), mask)


FORMS = {  # kernel, stride, block of the input, channels, the launches forward and backward
    "march": ((3, 3, 3), (1, 1, 1), (4, 4, 4), (16, 24)),
    "march of two chunks": ((3, 3, 3), (1, 1, 1), (4, 4, 4), (48, 16)),
    "march of odd blocks": ((3, 3, 3), (1, 1, 1), (4, 5, 4), (17, 19)),
    "gather": ((3, 3, 3), (1, 1, 1), (2, 2, 2), (16, 16)),
    "gather of single voxels": ((3, 3, 3), (1, 1, 1), (1, 1, 1), (24, 16)),
    "taps side by side": ((3, 3, 3), (1, 1, 1), (4, 4, 4), (1, 32)),
    "anisotropic": ((1, 3, 3), (1, 2, 2), (2, 4, 4), (8, 16)),
    "strided": ((3, 3, 3), (2, 2, 2), (4, 4, 4), (8, 16)),
    "strided to single voxels": ((3, 3, 3), (2, 2, 2), (2, 2, 2), (16, 8)),
    "point": ((1, 1, 1), (1, 1, 1), (2, 2, 2), (16, 8)),
    "strided point": ((1, 1, 1), (2, 2, 2), (2, 2, 2), (16, 8)),
}


@pytest.mark.parametrize(
    ("dtype", "ratio"), [*((torch.float32, r) for r in RATIOS), (torch.float16, 0.6)], ids=str
)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_at_every_mask_ratio(parity, form, ratio, dtype):
    kernel, stride, block, (ci, co) = FORMS[form]
    mask = BlockMask.random(2, (1, 2, 2), ratio)
    check(parity, conv(stride), conv_shapes(mask, block, ci, co, kernel), mask, dtype)


@pytest.mark.parametrize(
    "block", [(1, 1, 32), (32, 1, 2), (16, 2, 1), (5, 7, 3), (8, 8, 4), (1, 6, 1)], ids=str
)
def test_block_widths(parity, block):
    mask = BlockMask.random(2, (1, 2, 1), 0.5)
    check(parity, conv(), conv_shapes(mask, block, 3, 5), mask)


@pytest.mark.parametrize("planes", [2, 4])
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("rows", [16, 32])
@every_dtype
def test_marches(parity, resident, planes, rows, dtype):
    """Weights resident or streamed; the whole depth or segments of it; tiles over two blocks."""
    mask = BlockMask.random(1, (2, 1, 2), 0.25)
    form = Tile(rows, 16, 16, planes=planes, resident=resident)
    bits = torch.finfo(dtype).bits
    with tiles.using({("march", CHIP, bits, 16, 16, 4): form}):
        check(parity, conv(), conv_shapes(mask, (4, 4, 4), 16, 16), mask, dtype)


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_gathers(parity, monkeypatch, splits, taps):
    """Several tiles of rows, columns and depth; partial sums of up to 16 splits."""
    monkeypatch.setattr(tiles, "_split", lambda kernel, found, *_: found)
    form = Tile(16, 16, 16, taps=taps, splits=splits)
    mask = BlockMask.random(1, (2, 2, 1), 0.25)
    with tiles.using({("gather", CHIP, 32, k, n, 2): form for k, n in ((20, 36), (36, 20))}):
        check(parity, conv(), conv_shapes(mask, (2, 2, 2), 20, 36), mask)


@pytest.mark.parametrize(("taps", "groups"), [(1, 1), (1, 5), (2, 3), (4, 7), (32, 1)])
@pytest.mark.parametrize("splits", [1, 3])
def test_weight_gradients(parity, monkeypatch, taps, groups, splits):
    """Taps side by side, groups of them, several chunks of channels and splits of rows."""
    monkeypatch.setattr(tiles, "_split", lambda kernel, found, *_: found)
    form = Tile(16, 16, 16, taps=taps, groups=groups, splits=splits)
    mask = BlockMask.random(1, (2, 2, 1), 0.25)
    with tiles.using({("wgrad", CHIP, 32, 20, 36, 2): form}):
        check(parity, conv(), conv_shapes(mask, (2, 2, 2), 20, 36), mask)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_unequal_samples(parity, ratio):
    """Samples of all, some and no visible blocks in one batch."""
    visible = torch.rand(3, 2, 2, 1) >= ratio
    visible[1] = False
    mask = BlockMask.from_visible(visible)
    check(parity, conv(), conv_shapes(mask, (2, 2, 2), 4, 8), mask)
    check(parity, conv((2, 2, 2)), conv_shapes(mask, (2, 2, 2), 4, 8), mask)


def test_wide_channels_take_several_tiles(parity):
    mask = BlockMask.random(1, (2, 1, 1), 0.0)
    check(parity, conv(), conv_shapes(mask, (1, 1, 1), 136, 144), mask)


def results(op, leaves, mask):
    given = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    y = op(BlockTensor(given["x"], mask), given, "triton").features
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape).to(y))
    return {"y": y.detach()} | {k: v.grad for k, v in given.items()}


def random(shapes):
    return {name: torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits(form):
    kernel, stride, block, (ci, co) = FORMS[form]
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    leaves = random(conv_shapes(mask, block, ci, co, kernel))
    first, second = (results(conv(stride), leaves, mask) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("trained", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}])
@pytest.mark.parametrize("op", [conv(), conv((2, 2, 2)), transposed])
def test_frozen_leaves(op, trained):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    leaves = random(conv_shapes(mask, (2, 2, 2), 8, 8))
    every, given = results(op, leaves, mask), {}
    for name, value in leaves.items():
        given[name] = value.clone().requires_grad_(name in trained)
    y = op(BlockTensor(given["x"], mask), given, "triton").features
    torch.manual_seed(1)
    y.backward(torch.randn(y.shape))
    assert all(torch.equal(given[name].grad, every[name]) for name in trained)
    assert all(v.grad is None for name, v in given.items() if name not in trained)


@pytest.mark.parametrize("op", [conv(), conv((2, 2, 2)), transposed])
def test_any_layout_of_input_and_upstream_gradient(op):
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    leaves = random(conv_shapes(mask, (2, 2, 2), 8, 8))

    def gradients(loss, x=lambda t: t):
        given = {k: v.clone().requires_grad_() for k, v in leaves.items()}
        loss(op(BlockTensor(x(given["x"]), mask), given, "triton")).backward()
        return [v.grad for v in given.values()]

    plain = gradients(lambda y: (y.features * torch.ones_like(y.features)).sum())
    expanded = gradients(lambda y: y.features.sum())
    sliced = gradients(lambda y: torch.cat([y, y], 1).features[..., y.channels :].sum())
    permuted = gradients(
        lambda y: y.features.sum(),
        lambda t: t.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0),
    )
    for a, *others in zip(plain, expanded, sliced, permuted, strict=True):
        assert all(torch.equal(a, other) for other in others)


def test_rows_beyond_an_int32_are_refused():
    mask = BlockMask.random(1, (1, 1, 1), 0.0).to("meta")
    x = torch.empty(1, 2**11, 2**10, 2**10, 16, device="meta")
    with pytest.raises(ValueError, match=r"2147483648 voxels in one call.*split the batch"):
        ops.conv3d(
            BlockTensor(x, mask), torch.empty(16, 16, 3, 3, 3, device="meta"), backend="triton"
        )


def test_precisions_that_kernels_lack():
    mask = BlockMask.random(1, (1, 1, 1), 0.0)
    x = BlockTensor(torch.randn(1, 2, 2, 2, 4).double(), mask)
    weight = torch.randn(4, 4, 3, 3, 3)
    with pytest.raises(ValueError, match="float64: convert, or use backend='torch'"):
        ops.conv3d(x, weight.double(), backend="triton")
    with pytest.raises(ValueError, match=r"float32 on cpu, a parameter is torch.float16"):
        ops.conv3d(x.to(torch.float32), weight.half(), backend="triton")


def test_tensors_on_the_cpu_without_the_interpreter(monkeypatch):
    import triton

    mask = BlockMask.random(1, (1, 1, 1), 0.0)
    x = BlockTensor(torch.randn(1, 2, 2, 2, 4), mask)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ValueError, match="'triton' runs on a GPU, these tensors are on cpu: move"):
        ops.conv3d(x, torch.randn(4, 4, 3, 3, 3), backend="triton")
