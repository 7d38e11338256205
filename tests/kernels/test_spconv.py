"""The spconv backend: parity, its rulebooks, its refusals; GPU paths by signature only."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemae.kernels import BlockMask, BlockTensor, ops

NEEDED = "spconv is not installed: pip install spconv-cu120, from Python 3.12 on spconv-cu126"
pytest.importorskip("spconv", reason=NEEDED)
rules = pytest.importorskip("sparsemae.kernels.spconv_rules")
backend = pytest.importorskip("sparsemae.kernels.spconv_backend")

pytestmark = pytest.mark.usefixtures("one_thread")

RATIOS = [0.0, 0.25, 0.6, 0.75, 0.9, 1.0]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 1e-2}
CAUGHT = 1e-2  # what a mutant must exceed; float64 is within 1e-10

channels = st.integers(1, 7)
upto_three = st.tuples(*[st.integers(1, 3)] * 3)
ones_and_threes = st.tuples(*[st.sampled_from([1, 3])] * 3)
ones_and_twos = st.tuples(*[st.integers(1, 2)] * 3)


def shaped(**shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=generator) for k, s in shapes.items() if s is not None}


def conv(stride=(1, 1, 1)):
    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p.get("bias"), stride, backend=backend)

    return op


def transposed(x, p, backend):
    return ops.conv_transpose3d(x, p["weight"], p.get("bias"), backend=backend)


def check(errors: dict[str, float], dtype) -> None:
    assert max(errors.values()) < TOLERANCE[dtype], errors


def name(value) -> str:
    return "".join(map(str, value))


@pytest.mark.parametrize("mask_ratio", RATIOS)
@pytest.mark.parametrize(
    ("block", "kernel", "stride"),
    [
        ((1, 1, 1), (3, 3, 3), (1, 1, 1)),
        ((2, 2, 2), (3, 3, 3), (1, 1, 1)),
        ((3, 3, 3), (3, 3, 3), (1, 1, 1)),
        ((4, 4, 4), (3, 3, 3), (1, 1, 1)),
        ((1, 2, 5), (3, 3, 3), (1, 1, 1)),
        ((2, 4, 3), (1, 3, 3), (1, 1, 1)),
        ((2, 1, 3), (3, 1, 1), (1, 1, 1)),
        ((2, 2, 3), (1, 1, 1), (1, 1, 1)),
        ((4, 4, 4), (3, 3, 3), (2, 2, 2)),
        ((2, 2, 2), (3, 3, 3), (2, 2, 2)),
        ((1, 4, 6), (1, 3, 3), (1, 2, 2)),
        ((3, 2, 4), (3, 3, 3), (1, 2, 2)),
        ((2, 3, 2), (3, 1, 3), (2, 1, 1)),
        ((2, 4, 2), (1, 1, 1), (2, 2, 2)),
    ],
    ids=name,
)
def test_conv3d(parity, mask_ratio, block, kernel, stride):
    mask = BlockMask.random(3, (2, 3, 3), mask_ratio, generator=torch.Generator().manual_seed(0))
    leaves = shaped(x=(len(mask), *block, 5), weight=(7, 5, *kernel), bias=(7,))
    for dtype in (torch.float32, torch.float64):
        check(parity(conv(stride), leaves, mask, dtype, "spconv"), dtype)


@pytest.mark.parametrize("mask_ratio", RATIOS)
@pytest.mark.parametrize(
    ("block", "kernel"),
    [
        ((1, 1, 1), (2, 2, 2)),
        ((2, 1, 3), (1, 2, 2)),
        ((1, 2, 1), (3, 1, 2)),
        ((2, 2, 2), (1, 1, 1)),
        ((1, 1, 2), (4, 4, 4)),  # more taps than implicit GEMM holds
    ],
    ids=name,
)
def test_conv_transpose3d(parity, mask_ratio, block, kernel):
    mask = BlockMask.random(2, (2, 2, 3), mask_ratio, generator=torch.Generator().manual_seed(0))
    leaves = shaped(x=(len(mask), *block, 5), weight=(5, 3, *kernel), bias=(3,))
    for dtype in (torch.float32, torch.float64):
        check(parity(transposed, leaves, mask, dtype, "spconv"), dtype)


@st.composite
def masks(draw) -> BlockMask:
    """Samples of unequal counts, some of them empty or full."""
    batch, grid = draw(st.integers(1, 3)), draw(upto_three)
    share = st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.0])
    shares = torch.tensor(draw(st.lists(share, min_size=batch, max_size=batch)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    noise = torch.rand(batch, *grid, generator=generator)
    return BlockMask.from_visible(noise < shares.view(-1, 1, 1, 1))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(masks(), upto_three, ones_and_threes, ones_and_twos, channels, channels, st.booleans())
def test_any_conv3d(parity, mask, block, kernel, stride, ci, co, bias):
    block = tuple(b * s for b, s in zip(block, stride, strict=True))
    leaves = shaped(
        x=(len(mask), *block, ci), weight=(co, ci, *kernel), bias=(co,) if bias else None
    )
    check(parity(conv(stride), leaves, mask, torch.float32, "spconv"), torch.float32)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(masks(), upto_three, upto_three, channels, channels, st.booleans())
def test_any_conv_transpose3d(parity, mask, block, kernel, ci, co, bias):
    leaves = shaped(
        x=(len(mask), *block, ci), weight=(ci, co, *kernel), bias=(co,) if bias else None
    )
    check(parity(transposed, leaves, mask, torch.float32, "spconv"), torch.float32)


def test_half_precision_and_autocast(parity):
    mask = BlockMask.random(2, (3, 3, 3), 0.5)
    leaves = shaped(x=(len(mask), 2, 2, 2, 4), weight=(6, 4, 3, 3, 3), bias=(6,))
    check(parity(conv(), leaves, mask, torch.float16, "spconv"), torch.float16)
    x = BlockTensor(leaves["x"], mask)
    with torch.autocast("cpu", torch.float16):
        assert conv()(x, leaves, "spconv").dtype == torch.float16


def test_inputs_may_be_views(parity):
    """Transposed and expanded memory, upstream gradients too."""
    mask = BlockMask.random(2, (2, 3, 3), 0.4)
    leaves = shaped(x=(len(mask), 2, 2, 2, 4), value=(4,), weight=(4, 6, 3, 3, 3))

    def op(x, p, backend):
        weight = p["weight"].transpose(0, 1)
        turned = x.with_values(x.features.transpose(1, 3))
        flat = BlockTensor.full(p["value"], mask, x.block)
        return torch.cat([ops.conv3d(v, weight, backend=backend) for v in (turned, flat)], 1)

    check(parity(op, leaves, mask, torch.float64, "spconv"), torch.float64)


def test_norm_and_pools_run(parity):
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    leaves = shaped(x=(len(mask), 2, 4, 2, 3), weight=(3,), bias=(3,))

    def op(x, p, backend):
        x = ops.instance_norm(x, p["weight"], p["bias"], backend=backend)
        pools = ops.avg_pool3d, ops.max_pool3d
        return torch.cat([pool(x, (2, 2, 1), backend=backend) for pool in pools], 1)

    check(parity(op, leaves, mask, torch.float64, "spconv"), torch.float64)


def mirrored_taps(monkeypatch):
    convolve = rules.convolve
    monkeypatch.setattr(
        rules, "convolve", lambda rows, filters, book: convolve(rows, filters.flip(1, 2, 3), book)
    )


def axes_swapped(monkeypatch):
    convolve = rules.convolve

    def swapped(rows, filters, book):
        return convolve(rows, filters.transpose(1, 3).contiguous(), book)

    monkeypatch.setattr(rules, "convolve", swapped)


def spconv_order_kept(monkeypatch):
    """Neither filtered nor reordered: the first of what spconv computes."""
    monkeypatch.setattr(
        rules,
        "_positions",
        lambda active, mask, block: torch.arange(len(rules.voxels(mask, block))),
    )


def voxels_by_column(monkeypatch):
    """The right values in the memory layout of `torch.nonzero`."""
    voxels = rules.voxels
    monkeypatch.setattr(rules, "voxels", lambda m, b: voxels(m, b).t().contiguous().t())


@pytest.mark.parametrize(
    ("mutate", "stride"),
    [
        (mirrored_taps, (1, 1, 1)),
        (mirrored_taps, (2, 2, 2)),
        (axes_swapped, (1, 1, 1)),
        (axes_swapped, (2, 2, 2)),
        (spconv_order_kept, (2, 2, 2)),
        (voxels_by_column, (1, 1, 1)),  # with a stride an assertion sees it
    ],
)
def test_mutants_are_caught(parity, monkeypatch, mutate, stride):
    visible = BlockMask.random(
        2, (3, 3, 3), 0.5, generator=torch.Generator().manual_seed(0)
    ).visible
    leaves = shaped(x=(int(visible.sum()), 2, 2, 2, 4), weight=(4, 4, 3, 3, 3), bias=(4,))

    def errors():
        mask = BlockMask.from_visible(visible)  # without rulebooks
        return parity(conv(stride), leaves, mask, torch.float64, "spconv")

    check(errors(), torch.float64)
    mutate(monkeypatch)
    found = errors()
    assert min(found["y"], found["x"], found["weight"]) > CAUGHT


def test_a_strided_result_is_filtered_to_the_visible_cells():
    visible = torch.zeros(1, 3, 3, 3, dtype=torch.bool)
    visible[0, 1, 1, 1] = True
    mask = BlockMask.from_visible(visible)
    leaves = shaped(x=(1, 4, 4, 4, 2), weight=(3, 2, 3, 3, 3))
    y = conv((2, 2, 2))(BlockTensor(leaves["x"], mask), leaves, "spconv")
    assert y.features.shape == (1, 2, 2, 2, 3)
    book = rules.rulebook(mask, (4, 4, 4), (3, 3, 3), (2, 2, 2))
    assert book.active == 3**3  # grown by one voxel per axis, past the block
    assert len(book.rows) == len(book.rows.unique()) == 2**3

    book = rules.rulebook(mask, (4, 4, 4), (2, 2, 2), (2, 2, 2), transposed=True)
    assert book.active == 8**3  # nothing to drop
    assert sorted(book.rows.tolist()) == list(range(8**3))


def test_a_rulebook_is_built_once_per_mask(monkeypatch):
    built, build = [], rules.ops.get_indice_pairs

    def counted(*args):
        built.append(args)
        return build(*args)

    monkeypatch.setattr(rules.ops, "get_indice_pairs", counted)
    mask = BlockMask.random(2, (3, 3, 3), 0.5)

    def step(stride, channels, kernel=(3, 3, 3)):
        p = shaped(x=(len(mask), 2, 2, 2, channels), weight=(2, channels, *kernel))
        x = BlockTensor(p["x"].requires_grad_(), mask)
        conv(stride)(x, p, "spconv").features.sum().backward()

    for channels in (2, 3):  # features, channels and weights do not matter
        step((1, 1, 1), channels)
        step((2, 2, 2), channels)
    assert len(built) == 2
    step((1, 1, 1), 2, (1, 3, 3))
    assert len(built) == 3
    mask.copy_(BlockMask.random(2, (3, 3, 3), 0.5))
    step((1, 1, 1), 2)
    assert len(built) == 4  # another pattern


def test_one_mask_serves_every_stage(parity):
    """Blocks, kernels and strides of different layers do not take each other's rulebooks."""
    mask = BlockMask.random(2, (3, 3, 3), 0.5)
    for width in (4, 2, 1):
        for kernel in ((3, 3, 3), (1, 3, 3), (1, 1, 1)):
            leaves = shaped(x=(len(mask), width, width, width, 2), weight=(2, 2, *kernel))
            for op in (conv(), conv((1, 2, 2)), transposed)[:: 2 if width == 1 else 1]:
                check(parity(op, leaves, mask, torch.float64, "spconv"), torch.float64)


def test_two_masks_in_flight():
    """Two forward passes, then both backward passes, the second first."""
    masks = [BlockMask.random(2, (3, 3, 3), 0.5) for _ in range(2)]
    weight = shaped(weight=(3, 2, 3, 3, 3))["weight"].double()

    def run(name):
        generator = torch.Generator().manual_seed(1)
        shapes = [(len(m), 2, 2, 2, 2) for m in masks]
        xs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        xs = [x.requires_grad_() for x in xs]
        w = weight.clone().requires_grad_()
        pairs = zip(xs, masks, strict=True)
        ys = [ops.conv3d(BlockTensor(x, m), w, backend=name).features for x, m in pairs]
        for y in reversed(ys):
            y.square().sum().backward()
        return [*ys, *(x.grad for x in xs), w.grad]

    for found, expected in zip(run("spconv"), run("reference"), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        ("cuda", torch.bfloat16),
        ("cuda", torch.float64),
        ("mps", torch.float32),
    ],
    ids=str,
)
def test_what_spconv_cannot_compute_is_refused(device, dtype):
    x = SimpleNamespace(device=torch.device(device), dtype=dtype)
    with pytest.raises(ValueError, match=rf"no {dtype} on {device}: use backend='torch'"):
        backend._check(x, None, None)


def test_what_spconv_would_misread_is_refused():
    mask = BlockMask.random(1, (2, 2, 2), 0.5)
    p = shaped(x=(4, 2, 2, 2, 2), weight=(3, 2, 3, 3, 3), bias=(3,))
    x = BlockTensor(p["x"], mask)
    half = {"weight": torch.zeros(2, 2, 3, 3, 3, dtype=torch.float16)}
    for operator in (conv(), transposed):
        with pytest.raises(ValueError, match=r"weight is torch.float16 on cpu: cast"):
            operator(x, half, "spconv")
    with pytest.raises(ValueError, match=r"bias is torch.float64 on cpu: cast"):
        conv()(x, {**p, "bias": p["bias"].double()}, "spconv")
    with pytest.raises(ValueError, match=r"weight is torch.float32 on meta"):
        conv()(x, {**p, "weight": p["weight"].to("meta")}, "spconv")
    with pytest.raises(ValueError, match=r"its mask on meta: use mask.to"):
        conv()(BlockTensor(p["x"], mask.to("meta")), p, "spconv")
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"no torch.bfloat16 on cpu"):
        conv()(x, p, "spconv")


def test_algorithms(monkeypatch):
    cpu, cuda, algo = torch.device("cpu"), torch.device("cuda"), rules.ConvAlgo
    assert rules._algorithm(cpu, (3, 3, 3)) is algo.Native
    monkeypatch.setattr(rules, "CPU_ONLY_BUILD", False)
    assert rules._algorithm(cuda, (3, 3, 3)) is algo.MaskImplicitGemm
    assert rules._algorithm(cuda, (4, 4, 4)) is algo.Native
    monkeypatch.setattr(rules, "CPU_ONLY_BUILD", True)
    with pytest.raises(ValueError, match="no CUDA: pip install spconv-cu120"):
        rules._algorithm(cuda, (3, 3, 3))


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2)], ids=name)
def test_implicit_gemm_is_called_as_spconv_declares_it(monkeypatch, stride):
    """No GPU here: every argument of the CUDA path under the name spconv's own signature gives it.

    Which tables stand where follows from the names that spconv's docstring gives to its result.
    """
    declared = inspect.signature(rules.functional.SparseImplicitGemmFunction.forward)
    pairing = inspect.signature(rules.ops.get_indice_pairs_implicit_gemm)
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    out = rules.voxels(mask, tuple(4 // s for s in stride))
    tables = ["pair_fwd", "pair_bwd", "pair_mask_fwd_splits", "pair_mask_bwd_splits"]
    tables += ["mask_argsort_fwd_splits", "mask_argsort_bwd_splits"]
    seen = {}

    def build(*args, **kwargs):
        seen.update(pairing.bind(*args, **kwargs).arguments)
        return (out, "num_inds_per_loc", *tables, ["taps"])

    def gemm(*args):
        seen.update(declared.bind(None, *args).arguments)
        return torch.zeros(len(out), 3)

    monkeypatch.setattr(rules, "_algorithm", lambda *_: rules.ConvAlgo.MaskImplicitGemm)
    monkeypatch.setattr(rules.ops, "get_indice_pairs_implicit_gemm", build)
    monkeypatch.setattr(rules.functional, "implicit_gemm", gemm)
    p = shaped(x=(len(mask), 4, 4, 4, 2), weight=(3, 2, 1, 3, 3))
    conv(stride)(BlockTensor(p["x"], mask), p, "spconv")

    assert (seen["batch_size"], seen["spatial_shape"]) == (2, [8, 8, 8])
    assert (seen["ksize"], seen["stride"], seen["padding"]) == ([1, 3, 3], [*stride], [0, 1, 1])
    assert (seen["dilation"], seen["out_padding"], seen["transpose"]) == ([1] * 3, [0] * 3, False)
    assert seen["subm"] == seen["is_subm"] == (stride == (1, 1, 1))
    assert {t: seen[t] for t in tables} == {t: t for t in tables}
    assert (seen["masks"], seen["num_activate_out"]) == (["taps"], len(out))
    assert seen["is_train"] is seen["fp32_accum"] is True
    assert seen["filters"].shape == (3, 1, 3, 3, 2)
