"""Fused instance norm of the triton backend: against the float64 definition, and its promises."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemae.kernels import BlockMask, BlockTensor, ops, triton_norm, triton_norm_grad
from sparsemae.kernels import triton_rows as rows
from sparsemae.kernels.triton_norm import instance_norm, norm_act

pytestmark = pytest.mark.usefixtures("one_thread")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# fp16 and bf16 hold 11 and 8 digits. The upstream gradient is rounded to them, and so is every
# result; the interpreter cuts bf16 off, which counts twice.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-8}
CAUGHT = 1e-2
FORMS = ["one launch", "passes"]
needs_interpreter = pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels are cached")


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """One program per sample in several steps, or passes of several tiles, merged in groups."""
    use(monkeypatch, request.param)
    return request.param


def use(monkeypatch, form: str) -> None:
    monkeypatch.setattr(triton_norm, "SAMPLE_BYTES", 512)
    monkeypatch.setattr(triton_norm_grad, "SAMPLE_ELEMENTS", 128)
    if form == "passes":
        monkeypatch.setattr(triton_norm_grad, "SMALL_ROWS", 0)
        elements = {"STATISTICS": 128, "APPLY": 512, "SUMS": 128, "INPUT": 256}
        for name, count in elements.items():
            module = triton_norm if name in ("STATISTICS", "APPLY") else triton_norm_grad
            monkeypatch.setattr(module, f"{name}_ELEMENTS", count)
        for name, value in {"PARTS": 2, "STEPS": 2, "LINE": 32}.items():
            monkeypatch.setattr(rows, name, value)


def unequal() -> BlockMask:
    """Samples of many blocks, none, all but one, and one."""
    visible = torch.zeros(4, 1, 3, 2, dtype=torch.bool)
    visible[0, :, :, 0] = visible[2] = visible[3, 0, 1, 1] = True
    visible[2, 0, 0, 0] = False
    return BlockMask.from_visible(visible)


def leaves_for(mask, block, channels, *, weight=True, bias=True, residual=False):
    wide, narrow = (len(mask), *block, channels), (channels,)
    shapes = (
        {"x": wide} | ({"weight": narrow} if weight else {}) | ({"bias": narrow} if bias else {})
    )
    shapes |= {"residual": wide} if residual else {}
    leaves = {name: torch.randn(shape) for name, shape in shapes.items()}
    leaves["x"] += 1.0  # a mean, so that it matters
    return leaves


def kernels(x, mask, weight=None, bias=None, residual=None, slope=None, moments=None):
    added = None if residual is None else BlockTensor(residual, mask)
    return norm_act(BlockTensor(x, mask), weight, bias, EPS, slope, added, moments).features


def definition(x, mask, weight=None, bias=None, residual=None, slope=None):
    y = ops.instance_norm(BlockTensor(x, mask), weight, bias, EPS, backend="reference").features
    y = y if residual is None else y + residual
    return y if slope is None else F.leaky_relu(y, slope)


def run(fn, leaves, mask, dtype=torch.float32, upstream=None, **options):
    """Result and gradients of all leaves, by name."""
    mask = mask.to(DEVICE)
    leaves = {k: v.to(DEVICE, dtype, copy=True).requires_grad_() for k, v in leaves.items()}
    y = fn(mask=mask, **leaves, **options)
    if upstream is None:
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream.to(y))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def difference(values, expected, floors=None) -> dict[str, float]:
    """The largest difference of each result, relative to its largest value or its floor."""
    found = {}
    for name, exact in expected.items():
        assert values[name].shape == exact.shape
        worst = (values[name].double() - exact.double()).abs().flatten()
        scale = max([*exact.abs().flatten().tolist(), (floors or {}).get(name, 0.0), 1e-30])
        found[name] = worst.max().item() / scale if worst.numel() else 0.0
        assert not worst.isnan().any(), f"{name} is NaN"
    return found


def compare(leaves, mask, dtype=torch.float32, **options) -> dict[str, float]:
    """Of the kernels in `dtype` and the definition in float64, on values that `dtype` has."""
    leaves = {k: v.to(dtype).float() for k, v in leaves.items()}
    expected = run(definition, leaves, mask, torch.float64, **options)
    values = run(kernels, leaves, mask, dtype, **options)
    samples = [s.flatten(0, 3) for s in leaves["x"].double().split(mask.counts) if len(s)]
    # of few voxels the norm cancels, of one to zero: what rounds then is x times the slope
    slope = max(((s.var(0, correction=0) + EPS).rsqrt().max().item() for s in samples), default=0)
    slope *= max(leaves.get("weight", torch.ones(1)).abs().tolist())
    largest = leaves["x"].abs().max().item() if leaves["x"].numel() else 0.0
    return difference(values, expected, {"y": largest * slope, "x": 5 * slope})


CASES = [
    *itertools.product([torch.float32], [None, 0.0, 0.01], [False, True]),
    *itertools.product([torch.float16, torch.bfloat16], [0.01], [False, True]),
]


@pytest.mark.parametrize(("dtype", "slope", "residual"), CASES, ids=str)
def test_output_and_gradients(form, dtype, slope, residual):
    leaves = leaves_for(unequal(), (2, 2, 2), 16, residual=residual)
    found = compare(leaves, unequal(), dtype, slope=slope)
    assert max(found.values()) < TOLERANCE[dtype], found


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.6, 0.75, 0.9, 1.0])
def test_every_mask_ratio(form, mask_ratio):
    mask = BlockMask.random(2, (2, 3, 2), mask_ratio)
    leaves = leaves_for(mask, (2, 1, 2), 3, weight=False, bias=False, residual=True)
    found = compare(leaves, mask, slope=0.1)
    assert max(found.values()) < TOLERANCE[torch.float32], found


@pytest.mark.parametrize("channels", [1, 5, 40])
@pytest.mark.parametrize(
    "block", [(1, 1, 1), (3, 3, 3), (4, 4, 4), (1, 2, 5)], ids=lambda b: "".join(map(str, b))
)
def test_blocks_and_channels(form, monkeypatch, block, channels):
    monkeypatch.setattr(triton_norm, "STATISTICS_ELEMENTS", 512)
    monkeypatch.setattr(triton_norm_grad, "SUMS_ELEMENTS", 512)
    mask = BlockMask.random(2, (1, 2, 2), 0.5)
    leaves = leaves_for(mask, block, channels, weight=channels != 5, bias=channels != 1)
    found = compare(leaves, mask, slope=0.01)
    assert max(found.values()) < TOLERANCE[torch.float32], found


def test_the_tiles_that_are_shipped():
    mask = BlockMask.random(1, (2, 2, 2), 0.25)
    leaves = leaves_for(mask, (8, 8, 8), 40, residual=True)
    found = compare(leaves, mask, slope=0.01)
    leaves = leaves_for(mask, (16, 8, 8), 9)  # more rows than one program takes
    assert triton_norm_grad.SMALL_ROWS < 6 * 1024
    found |= {f"passes {k}": v for k, v in compare(leaves, mask, slope=0.01).items()}
    assert max(found.values()) < TOLERANCE[torch.float32], found


def test_sums_over_many_rows():
    """196608 rows of one sample: nothing lost, in either direction."""
    mask = BlockMask.random(1, (4, 4, 4), 0.25)
    leaves = leaves_for(mask, (16, 16, 16), 3)
    found = compare(leaves, mask)
    assert max(found["y"], found["x"]) < 1e-6, found
    # of random sign: they cancel to 1/500 of their terms' sum; NumPy adds 2048 one by one
    assert max(found["weight"], found["bias"]) < 1e-5, found


@pytest.mark.parametrize("form", FORMS)
def test_a_mean_that_dwarfs_the_deviations(monkeypatch, form):
    """By 10^4: digits below its own 2^-10 are lost of means, but not of deviations."""
    if form == "passes":
        monkeypatch.setattr(triton_norm_grad, "SMALL_ROWS", 0)
        monkeypatch.setattr(triton_norm, "STATISTICS_ELEMENTS", 2048)
    mask, channels = BlockMask.random(2, (1, 3, 2), 0.5), 4
    x = (torch.randn(len(mask), 8, 8, 8, channels) + 1e4).float().double()
    y, expected = (
        fn(x.to(DEVICE, dtype), mask.to(DEVICE)).cpu().double()
        for fn, dtype in ((kernels, torch.float32), (definition, torch.float64))
    )
    largest = expected.abs().max()
    # the stored mean is half a unit off; in passes, so are those of tiles
    assert (y - expected).abs().max() < 1.1 * (1 if form == "one launch" else 2) * 2**-11
    for value, right in zip(y.split(mask.counts), expected.split(mask.counts), strict=True):
        spread, exact = value.std((0, 1, 2, 3)), right.std((0, 1, 2, 3))
        assert (spread / exact - 1).abs().max() < 3e-5
        value, right = value - value.mean((0, 1, 2, 3)), right - right.mean((0, 1, 2, 3))
        assert (value - right).abs().max() < 3e-5 * largest


@triton.jit
def naive(x, first, live, count):
    """Mean of squares minus square of the mean."""
    x = x.to(tl.float32)
    mean = tl.sum(tl.where(live[:, None], x, 0.0), 0) / count
    square = tl.sum(tl.where(live[:, None], x * x, 0.0), 0) / count
    return mean - first, (square - mean * mean) * count


def tiles_of(x, size):
    """Mean and squared deviations of every `size` rows, [P, 2, C], computed in float64."""
    runs = x.double().view(-1, size, x.shape[-1])
    mean = runs.mean(1)
    return torch.stack([mean, (runs - mean[:, None]).square().sum(1)], 1).float().to(DEVICE), size


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("parts", [2, 512])
def test_moments_that_are_given(monkeypatch, size, parts):
    """As those computed, and without another pass over x."""
    use(monkeypatch, "passes")
    monkeypatch.setattr(rows, "PARTS", parts)
    mask = unequal()
    leaves = leaves_for(mask, (4, 2, 2), 8, residual=True)
    computed = run(kernels, leaves, mask, slope=0.01)
    monkeypatch.setattr(triton_norm, "_statistics", None)
    moments = tiles_of(leaves["x"], size)
    given = run(kernels, leaves, mask, slope=0.01, moments=moments)
    assert max(difference(given, computed).values()) < 2e-6


FROZEN = [(), ("x",), ("weight", "bias"), ("residual",), ("x", "residual"), ("x", "weight", "bias")]


@pytest.mark.parametrize("frozen", FROZEN, ids=str)
def test_frozen_leaves_get_no_gradient_and_change_no_other(form, frozen):
    """With none frozen: two runs are bitwise equal."""
    slope = None if frozen == ("x",) else 0.1
    mask = unequal().to(DEVICE)
    values = {k: v.to(DEVICE) for k, v in leaves_for(mask, (1, 2, 2), 4, residual=True).items()}
    expected = run(kernels, values, mask, slope=slope)
    leaves = {k: v.clone().requires_grad_(k not in frozen) for k, v in values.items()}
    y = kernels(mask=mask, **leaves, slope=slope)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, expected[name]), name


UPSTREAM = {
    "expanded": lambda shape: torch.randn(1).expand(shape),
    "sliced": lambda shape: torch.randn(*shape[:-1], shape[-1] + 3)[..., 2:-1],
    "transposed": lambda shape: torch.randn(*shape[:3], shape[4], shape[3]).transpose(3, 4),
}


@pytest.mark.parametrize("layout", UPSTREAM)
@pytest.mark.parametrize("slope", [None, 0.1])
def test_upstream_gradients_of_any_layout(form, layout, slope):
    mask = unequal()
    leaves = leaves_for(mask, (1, 2, 2), 4, residual=True)
    upstream = UPSTREAM[layout](leaves["x"].shape)
    found = run(kernels, leaves, mask, upstream=upstream, slope=slope)
    expected = run(kernels, leaves, mask, upstream=upstream.contiguous(), slope=slope)
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_inputs_of_any_layout(form):
    mask = unequal().to(DEVICE)
    wide = torch.randn(2, len(mask), 1, 2, 2, 12).to(DEVICE)
    x, residual = wide[..., 3:8].unbind()
    expected = kernels(x.contiguous(), mask, residual=residual.contiguous(), slope=0.1)
    none = torch.empty(0, 2, 5, device=DEVICE), 4  # moments of no tiles are none
    assert torch.equal(kernels(x, mask, None, None, residual, 0.1, none), expected)
    same = torch.randn(5, device=DEVICE).expand(len(mask), 1, 2, 2, 5)
    assert kernels(same, mask).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_samples_and_channels_do_not_see_each_other(form):
    mask = unequal()
    leaves = leaves_for(mask, (2, 2, 2), 4, weight=False, bias=False, residual=True)
    clean = run(kernels, leaves, mask, slope=0.1)
    poisoned = torch.zeros(leaves["x"].shape, dtype=torch.bool)
    poisoned[: mask.counts[0], ..., 1:3] = True
    leaves["x"][0, 0, 0, 0, 1] = math.nan
    leaves["residual"][: mask.counts[0], ..., 2] = math.inf
    leaves["x"][0, 0, 0, 0, 2] = -math.inf
    dirty = run(kernels, leaves, mask, slope=0.1)
    assert dirty["y"][poisoned].isnan().all()
    for name in clean:
        assert torch.equal(dirty[name][~poisoned], clean[name][~poisoned]), name


@pytest.mark.parametrize("residual", [False, True])
def test_the_slope_at_exactly_zero_is_that_of_torch(form, residual):
    """Of constant channels the norm is zero, and so is a zero residual."""
    mask = unequal()
    leaves = leaves_for(mask, (1, 2, 2), 3, weight=False, bias=False, residual=residual)
    leaves = {k: torch.full_like(v, 2.0 if k == "x" else 0.0) for k, v in leaves.items()}
    expected = run(definition, leaves, mask, torch.float64, slope=0.1)
    found = run(kernels, leaves, mask, slope=0.1)
    assert (found["y"] == 0).all()
    assert max(difference(found, expected).values()) < 1e-5


def test_parameters_and_residual_of_another_precision(form):
    """As in the dense layer under autocast: weights stay float32, and a sum promotes."""
    mask = unequal()
    leaves = {k: v.half().to(DEVICE) for k, v in leaves_for(mask, (1, 2, 2), 8).items()}
    y = kernels(mask=mask.to(DEVICE), **leaves)
    mixed = {k: v if k == "x" else v.float().requires_grad_() for k, v in leaves.items()}
    assert torch.equal(kernels(mask=mask.to(DEVICE), **mixed), y.half())
    residual = torch.randn(y.shape, device=DEVICE, requires_grad=True)
    x = mixed.pop("x").requires_grad_()
    total = kernels(x, mask.to(DEVICE), residual=residual, slope=0.1, **mixed)
    assert total.dtype == torch.float32
    total.sum().backward()
    grads = x.grad, residual.grad, mixed["weight"].grad
    assert [g.dtype for g in grads] == [torch.float16, torch.float32, torch.float32]
    expected = F.leaky_relu(y + residual, 0.1)
    assert (total - expected).abs().max() < 4 * 2**-11 * expected.abs().max()


def test_in_place_activation_afterwards(form):
    mask = unequal().to(DEVICE)
    x = torch.randn(len(mask), 1, 2, 2, 4, device=DEVICE)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, inplace in zip(leaves, (False, True), strict=True):
        y = instance_norm(BlockTensor(leaf, mask), None, None, EPS).features
        F.leaky_relu(y, 0.1, inplace=inplace).square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_what_does_not_fit_is_refused():
    mask = unequal().to(DEVICE)
    x = BlockTensor(torch.randn(len(mask), 1, 1, 1, 2, device=DEVICE), mask)
    with pytest.raises(ValueError, match=r"takes float32, .*, not float64: .*backend='torch'"):
        instance_norm(x.to(torch.float64), None, None, EPS)
    with pytest.raises(ValueError, match=r"slope must be at least 0, got -0.1"):
        norm_act(x, None, None, EPS, -0.1)
    with pytest.raises(ValueError, match="two different masks"):
        norm_act(x, None, None, EPS, 0.1, BlockTensor(x.features, unequal().to(DEVICE)))
    with pytest.raises(ValueError, match="x has 2 channels, residual has 1"):
        norm_act(x, None, None, EPS, 0.1, x.with_values(x.features[..., :1]))


def test_shapes_without_storage(form):
    """What torch.compile sees."""
    mask = unequal()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(len(mask), 2, 2, 2, 6, dtype=torch.bfloat16, requires_grad=True)
        y = kernels(x, mask, residual=torch.empty(x.shape), slope=0.1)
        y.sum().backward()
    assert (y.shape, y.dtype, x.grad.dtype) == (x.shape, torch.float32, torch.bfloat16)


def found_with(monkeypatch, form, residual=False):
    use(monkeypatch, form)
    leaves = leaves_for(unequal(), (4, 2, 2), 4, residual=residual)
    return compare(leaves, unequal(), slope=0.1)


@triton.jit
def unmoved(mean, squares, count, other_mean, other_squares, other_count):
    """Merged as if all tiles had one mean."""
    share = other_count / (count + other_count)
    return mean + (other_mean - mean) * share, squares + other_squares, count + other_count


@triton.jit
def other_sign(grad_ptr, y_ptr, offsets, mask, centred, scale, shift, slope):
    """Where the activation bent, read off x instead of the result."""
    g = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if slope is not None:
        g = tl.where(centred > 0, g, g * slope)
    return g


@needs_interpreter
@pytest.mark.parametrize("form", FORMS)
def test_mutants_are_caught(monkeypatch, form):
    assert max(found_with(monkeypatch, form).values()) < 2e-5
    with monkeypatch.context() as patch:
        patch.setattr(triton_norm, "_merge", unmoved)
        found = found_with(patch, form)
        assert min(found["y"], found["x"]) > 1e-3  # the means of tiles differ little
    for residual in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(triton_norm_grad, "_behind", other_sign)
            found = found_with(patch, form, residual=residual)
            assert found["y"] < 2e-5
            assert min(found["x"], found["weight"], found["bias"]) > CAUGHT


@needs_interpreter
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_lost_digits_and_partials_are_caught(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(triton_norm, "_moments", naive)
        with pytest.raises(AssertionError):
            test_a_mean_that_dwarfs_the_deviations(patch, "passes")
    with monkeypatch.context() as patch:
        add = rows.add_partials
        patch.setattr(triton_norm_grad, "add_partials", lambda p: add(p[:, :-1].contiguous()))
        found = found_with(patch, "passes")
        assert found["y"] < 2e-5
        assert min(found["x"], found["weight"], found["bias"]) > CAUGHT
