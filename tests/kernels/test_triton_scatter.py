"""Triton's pack and unpack: bit for bit what torch's indexing does, and the token's gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemae.kernels import BlockMask, BlockTensor, scatter, triton_rows, triton_scatter

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    ((1, 1, 1), 5),
    ((2, 2, 2), 8),
    ((3, 3, 3), 3),
    ((1, 2, 5), 1),
    ((4, 4, 4), 40),
    ((8, 4, 2), 1),
]
every_shape = pytest.mark.parametrize(
    ("block", "channels"), SHAPES, ids=[f"{'x'.join(map(str, b))}-{c}" for b, c in SHAPES]
)


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch):
    monkeypatch.setattr(triton_scatter, "COPY_ELEMENTS", 1024)
    monkeypatch.setattr(triton_scatter, "TOKEN_ELEMENTS", 1024)
    monkeypatch.setattr(triton_rows, "PARTS", 4)
    monkeypatch.setattr(triton_rows, "STEPS", 2)


@pytest.fixture
def mask():
    """Samples of some blocks, none, and all."""
    visible = torch.zeros(3, 2, 1, 2, dtype=torch.bool)
    visible[0, 1] = visible[0, 0, 0, 1] = visible[2] = True
    return BlockMask.from_visible(visible).to(DEVICE)


LAYOUTS = {
    "channels last": lambda s: torch.randn(s).contiguous(memory_format=torch.channels_last_3d),
    "contiguous": lambda s: torch.randn(s),
    "sliced": lambda s: torch.randn(s[0], s[1] + 2, *(n + 1 for n in s[2:]))[:, 1:-1, 1:, :-1, 1:],
    "sliced channels": lambda s: LAYOUTS["channels last"]((s[0], s[1] + 3, *s[2:]))[:, 1:-2],
    "expanded": lambda s: torch.randn(1, s[1], 1, 1, s[4]).expand(s),
    "transposed": lambda s: torch.randn(s[0], s[1], s[4], s[3], s[2]).transpose(2, 4),
}


def size(mask, block, channels):
    return mask.batch_size, channels, *(g * b for g, b in zip(mask.grid, block, strict=True))


def token_definition(grad, mask, block):
    """Sum over masked voxels, in float64."""
    return (grad.double() * ~mask.voxels(block)).sum((0, 2, 3, 4))


@every_shape
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(mask, block, channels, layout):
    """Of what is packed, and of the upstream gradient of what was unpacked."""
    dense = LAYOUTS[layout](size(mask, block, channels)).to(DEVICE)
    assert dense.is_contiguous() == (layout == "contiguous") or channels == 1
    packed = scatter._Pack.apply(dense, mask, block)
    assert torch.equal(triton_scatter.pack_blocks(dense, mask, block), packed)
    features = torch.randn_like(packed, requires_grad=True)
    token = torch.randn(channels, device=DEVICE, requires_grad=True)
    triton_scatter.unpack_blocks(features, mask, token).backward(dense)
    assert torch.equal(features.grad, packed)
    expected = token_definition(dense, mask, block)
    assert (token.grad - expected).abs().max() <= 2e-6 * dense.abs().sum((0, 2, 3, 4)).max()


@every_shape
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filling", ["token", "number"])
def test_unpack_and_the_gradient_of_pack(mask, block, channels, dtype, filling):
    features = torch.randn(len(mask), *block, channels).to(DEVICE, dtype)
    fill = -1.5
    if filling == "token":  # of values that bf16 has: the interpreter cuts off what it has not
        fill = torch.randn(channels, device=DEVICE).bfloat16().float()
    expected = scatter._scatter(features, mask, fill)
    found = triton_scatter.unpack_blocks(features, mask, fill)
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    dense = torch.zeros_like(found, requires_grad=True)
    triton_scatter.pack_blocks(dense, mask, block).backward(features)
    assert torch.equal(dense.grad, scatter._scatter(features, mask, 0.0))


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.6, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("block", [(1, 1, 2), (2, 4, 4)], ids=str)
def test_every_mask_ratio(mask_ratio, block):
    mask = BlockMask.random(2, (2, 3, 2), mask_ratio).to(DEVICE)
    dense = torch.randn(size(mask, block, 4), device=DEVICE)
    features = triton_scatter.pack_blocks(dense, mask, block).requires_grad_()
    token = torch.randn(4, device=DEVICE, requires_grad=True)
    again = triton_scatter.unpack_blocks(features, mask, token)
    visible = mask.voxels(block)
    assert torch.equal(again, torch.where(visible, dense, token.view(-1, 1, 1, 1)))
    upstream = torch.randn_like(again)
    again.backward(upstream)
    assert torch.equal(features.grad, scatter._gather(upstream, mask, block))
    expected = token_definition(upstream, mask, block)
    assert torch.allclose(token.grad.double(), expected, rtol=0, atol=1e-5)


def test_the_tiles_that_are_shipped(monkeypatch):
    monkeypatch.undo()
    mask = BlockMask.random(1, (2, 2, 2), 0.5).to(DEVICE)
    for block, channels in (((8, 8, 8), 72), ((16, 8, 8), 1), ((2, 2, 2), 320)):
        dense = torch.randn(size(mask, block, channels), device=DEVICE)
        features = triton_scatter.pack_blocks(dense, mask, block)
        assert torch.equal(features, scatter._gather(dense, mask, block))
        token = torch.randn(channels, device=DEVICE, requires_grad=True)
        found = triton_scatter.unpack_blocks(features, mask, token)
        assert torch.equal(found, scatter._scatter(features, mask, token.detach()))
        found.backward(dense)
        expected = token_definition(dense, mask, block)
        assert torch.allclose(token.grad.double(), expected, rtol=0, atol=1e-4)


def test_masked_voxels_are_never_read(mask):
    block = (2, 2, 4)
    dense = torch.randn(size(mask, block, 4), device=DEVICE)
    visible = mask.voxels(block)
    for poison in (math.nan, math.inf):
        dirty = torch.where(visible, dense, poison)
        packed = triton_scatter.pack_blocks(dirty, mask, block)
        assert torch.equal(packed, scatter._gather(dense, mask, block))
        features = torch.randn_like(packed, requires_grad=True)
        token = torch.zeros(4, device=DEVICE, requires_grad=True)
        triton_scatter.unpack_blocks(features, mask, token).backward(dirty)
        assert features.grad.isfinite().all()
        assert not token.grad.isfinite().any()
        triton_scatter.unpack_blocks(features, mask, token).backward(
            torch.where(visible, poison, 1.0).expand(dense.shape)
        )
        hidden = (~visible).sum()
        token.grad = None
        triton_scatter.unpack_blocks(features, mask, token).backward(
            torch.where(visible, poison, 1.0).expand(dense.shape)
        )
        assert token.grad.tolist() == [hidden] * 4


def test_more_elements_than_an_int32_counts(monkeypatch):
    """4 GB, of which only what is touched takes memory."""
    monkeypatch.undo()
    visible = torch.zeros(1, 33000, 1, 1, dtype=torch.bool)
    visible[0, -1] = True
    dense = torch.empty(1, 1, 33000, 256, 256, dtype=torch.float16)
    dense[:, :, -1] = torch.randn(256, 256)
    assert dense.numel() > 2**31
    mask = BlockMask.from_visible(visible).to(DEVICE)
    packed = triton_scatter.pack_blocks(dense.to(DEVICE), mask, (1, 256, 256))
    assert torch.equal(packed[0, 0, ..., 0].cpu(), dense[0, 0, -1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_token_keeps_its_precision(mask, dtype):
    """It is rounded like the features; its gradient, a long sum, is not."""
    block = (4, 4, 4)
    features = torch.randn(len(mask), *block, 8).to(DEVICE, dtype)
    token = torch.randn(8, device=DEVICE, requires_grad=True)
    y = triton_scatter.unpack_blocks(features, mask, token)
    if DEVICE == "cuda" or dtype == torch.float16:  # the interpreter cuts off instead
        assert torch.equal(y, scatter._scatter(features, mask, token.detach().to(dtype)))
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected = token_definition(upstream, mask, block)
    assert token.grad.dtype == torch.float32
    assert (token.grad - expected).abs().max() < 1e-6 * upstream.abs().double().sum()
    double = token.detach().double().requires_grad_()
    triton_scatter.unpack_blocks(features, mask, double).backward(upstream)
    assert double.grad.dtype == torch.float64


def test_two_runs_are_bitwise_equal(mask):
    upstream = torch.randn(size(mask, (4, 4, 4), 8), device=DEVICE)
    grads = []
    for _ in range(2):
        features = torch.ones(len(mask), 4, 4, 4, 8, device=DEVICE, requires_grad=True)
        token = torch.ones(8, device=DEVICE, requires_grad=True)
        triton_scatter.unpack_blocks(features, mask, token).backward(upstream)
        grads.append((features.grad, token.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_frozen_leaves(mask):
    upstream = torch.randn(size(mask, (2, 2, 2), 4), device=DEVICE)
    features = torch.randn(len(mask), 2, 2, 2, 4, device=DEVICE)
    token = torch.randn(4, device=DEVICE)
    for leaf in (features, token):
        leaf.requires_grad_()
        triton_scatter.unpack_blocks(features, mask, token).backward(upstream)
        assert [t.grad is not None for t in (features, token)] == [leaf is features, leaf is token]
        leaf.grad = None
        leaf.requires_grad_(False)
    assert not triton_scatter.unpack_blocks(features, mask, token).requires_grad


def test_features_of_any_layout_and_activations_in_place(mask):
    wide = torch.randn(len(mask), 2, 2, 2, 9, device=DEVICE)
    expected = scatter._scatter(wide[..., 2:6], mask, 0.5)
    leaf = wide.requires_grad_()
    found = triton_scatter.unpack_blocks(leaf[..., 2:6], mask, 0.5)
    assert torch.equal(found, expected)
    F.leaky_relu_(found, 0.1)
    F.leaky_relu_(triton_scatter.pack_blocks(found, mask, (2, 2, 2)), 0.1).sum().backward()
    assert torch.allclose(leaf.grad[..., 2:6], torch.where(wide[..., 2:6] > 0, 1.0, 0.01))
    same = wide.detach()[:1, :1, :1, :1, :3].expand(len(mask), 2, 2, 2, 3)  # BlockTensor.full
    expected = scatter._scatter(same, mask, 0.0)
    assert torch.equal(triton_scatter.unpack_blocks(same, mask, 0.0), expected)


def test_what_is_asked_of_triton(monkeypatch, mask):
    """On a GPU the precisions it has; everything else stays with torch."""
    block, calls = (2, 2, 2), []
    dense = torch.randn(size(mask, block, 3), device=DEVICE)
    expected = scatter._gather(dense, mask, block)
    for name in ("pack_blocks", "unpack_blocks"):
        fn = getattr(triton_scatter, name)
        monkeypatch.setattr(
            triton_scatter, name, lambda *a, fn=fn, name=name: (calls.append(name), fn(*a))[1]
        )
    choose = scatter.choose
    monkeypatch.setattr(
        scatter, "choose", lambda b, _, dtype: choose(b, torch.device("cuda"), dtype)
    )
    packed = BlockTensor.pack(dense, mask)
    assert torch.equal(packed.features, expected)
    assert torch.equal(packed.unpack(2.0), scatter._scatter(expected, mask, 2.0))
    assert calls == ["pack_blocks", "unpack_blocks"]
    for other in (dense.double(), dense > 0):
        scatter.unpack_blocks(scatter.pack_blocks(other, mask, block), mask, 0)
    assert len(calls) == 2
    monkeypatch.setattr(scatter, "choose", choose)
    if DEVICE == "cpu":
        BlockTensor.pack(dense, mask)
        assert len(calls) == 2


def test_what_does_not_fit_is_refused(mask):
    dense = torch.randn(size(mask, (1, 1, 1), 2), device=DEVICE)
    features = torch.randn(len(mask), 1, 1, 1, 2, device=DEVICE)
    for call in (
        lambda: triton_scatter.pack_blocks(dense.double(), mask, (1, 1, 1)),
        lambda: triton_scatter.unpack_blocks(features.double(), mask, 0.0),
    ):
        with pytest.raises(
            ValueError, match=r"pack: .*not float64: convert, or use backend='torch"
        ):
            call()
    with pytest.raises(ValueError, match=r"mask is on .*, the tensor on meta: .*mask.to\('meta'\)"):
        triton_scatter.pack_blocks(dense.to("meta"), mask, (1, 1, 1))


def test_shapes_without_storage(mask):
    """What torch.compile sees."""
    shape = size(mask, (2, 1, 4), 6)
    with FakeTensorMode(allow_non_fake_inputs=True):
        dense = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        token = torch.empty(6, device=DEVICE, requires_grad=True)
        packed = triton_scatter.pack_blocks(dense, mask, (2, 1, 4))
        y = triton_scatter.unpack_blocks(packed, mask, token)
        y.sum().backward()
    assert (y.shape, y.dtype, token.grad.dtype) == (shape, torch.bfloat16, torch.float32)
    assert dense.grad.shape == dense.shape


@triton.jit
def _swapped(cell, Gd, Gh, Gw):
    """The grid walked along another axis first."""
    cell = cell.to(tl.int32)
    line = cell // Gd
    plane = line // Gh
    return plane // Gw, cell % Gd, line % Gh, plane % Gw


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are cached")
def test_mutants_are_caught(monkeypatch, mask):
    with monkeypatch.context() as patch:
        patch.setattr(triton_scatter, "_cell", _swapped)
        with pytest.raises(AssertionError):
            test_unpack_and_the_gradient_of_pack(mask, (2, 2, 2), 8, torch.float32, "token")
    with monkeypatch.context() as patch:
        add = triton_rows.add_partials
        patch.setattr(triton_scatter, "add_partials", lambda p: add(p[:, 1:].contiguous()))
        with pytest.raises(AssertionError):
            test_every_layout(mask, (2, 2, 2), 8, "contiguous")
    with monkeypatch.context() as patch:
        strides = triton_scatter._strides
        patch.setattr(
            triton_scatter, "_strides", lambda d: (strides(d)[0], {"UNIT": 1, "INNER": "none"})
        )
        with pytest.raises(AssertionError):
            test_every_layout(mask, (2, 2, 2), 8, "contiguous")
