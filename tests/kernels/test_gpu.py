"""Compiled kernels on a GPU at the shapes of a ResEnc-L, every precision, against float64."""

import itertools

import pytest
import torch

from sparsemae.kernels import (
    AvgPool3d,
    BlockMask,
    BlockTensor,
    Conv3d,
    InstanceNorm3d,
    LeakyReLU,
    conv_norm_act,
    ops,
    set_backend,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# largest difference over largest value; a product of TF32 keeps 10 bits of its factors
TOLERANCE = {"float32": 2e-5, "tf32": 3e-3, "float16": 2e-3, "bfloat16": 1.6e-2}
STAGES = [(16, 32), (8, 64), (4, 128), (2, 256), (1, 320)]
WIDE = [(32, 32), (16, 64), (8, 128), (4, 256), (2, 320)]
RATIOS = [0.0, 0.25, 0.6, 0.75, 0.9, 1.0]

precisions = pytest.mark.parametrize("precision", TOLERANCE)


@pytest.fixture(autouse=True)
def float32_products(request):
    """Convolutions of float32 in float32, or in TF32 where a test asks for it."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    wanted = getattr(request.node, "callspec", None)
    tf32 = wanted is not None and wanted.params.get("precision") == "tf32"
    conv.fp32_precision = "tf32" if tf32 else "ieee"
    yield
    conv.fp32_precision = before


def dtype_of(precision: str) -> torch.dtype:
    return torch.float32 if precision == "tf32" else getattr(torch, precision)


def run(op, leaves, mask, dtype, backend):
    given = {k: v.to(dtype, copy=True).requires_grad_() for k, v in leaves.items()}
    y = op(BlockTensor(given["x"], mask), given, backend).features
    generator = torch.Generator(DEVICE).manual_seed(1)
    upstream = torch.randn(y.shape, generator=generator, device=DEVICE)
    y.backward(upstream.to(leaves["x"].dtype).to(dtype))
    return {"y": y.detach()} | {k: v.grad for k, v in given.items()}


def check(op, shapes, mask, precision):
    """Output and all gradients; a second run gives the same bits."""
    dtype = dtype_of(precision)
    leaves = {k: torch.randn(s, device=DEVICE).to(dtype) for k, s in shapes.items()}
    expected = run(op, leaves, mask, torch.float64, "reference")
    found, again = (run(op, leaves, mask, dtype, "triton") for _ in range(2))
    for name, truth in expected.items():
        assert torch.equal(found[name], again[name]), name
        if truth.numel():
            scale = truth.abs().max().clamp(min=1e-12)
            error = ((found[name].double() - truth).abs().max() / scale).item()
            assert error < TOLERANCE[precision], (name, error)


def conv(stride=(1, 1, 1)):
    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p["bias"], stride, backend=backend)

    return op


def shapes(mask, block, ci, co, kernel=3):
    weight = (co, ci, *((kernel,) * 3 if isinstance(kernel, int) else kernel))
    return {"x": (len(mask), *block, ci), "weight": weight, "bias": (co,)}


def cells(ratio=0.6, batch=2, grid=(3, 2, 2)) -> BlockMask:
    return BlockMask.random(batch, grid, ratio).to(DEVICE)


@precisions
@pytest.mark.parametrize(("width", "channels"), [*STAGES, *WIDE], ids=str)
def test_convolution_of_a_stage(width, channels, precision):
    mask = cells()
    check(conv(), shapes(mask, (width,) * 3, channels, channels), mask, precision)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("width", "channels"), STAGES, ids=str)
def test_mask_ratios(width, channels, ratio):
    mask = cells(ratio)
    check(conv(), shapes(mask, (width,) * 3, channels, channels), mask, "bfloat16")


@precisions
@pytest.mark.parametrize(("fine", "coarse"), list(itertools.pairwise(STAGES)), ids=str)
def test_strided(fine, coarse, precision):
    mask = cells()
    check(conv((2, 2, 2)), shapes(mask, (fine[0],) * 3, fine[1], coarse[1]), mask, precision)


@precisions
@pytest.mark.parametrize(
    ("block", "ci", "co", "kernel", "stride"),
    [
        ((16, 16, 16), 1, 32, 3, (1, 1, 1)),
        ((16, 16, 16), 3, 32, 3, (1, 1, 1)),
        ((16, 16, 16), 64, 32, 3, (1, 1, 1)),
        ((8, 8, 8), 64, 64, 1, (1, 1, 1)),
        ((4, 8, 8), 32, 40, (1, 3, 3), (1, 2, 2)),
        ((3, 5, 6), 7, 13, 3, (1, 1, 1)),
        ((16, 16, 16), 32, 1, 1, (1, 1, 1)),
    ],
    ids=str,
)
def test_other_convolutions(block, ci, co, kernel, stride, precision):
    mask = cells()
    check(conv(stride), shapes(mask, block, ci, co, kernel), mask, precision)


@precisions
@pytest.mark.parametrize(("width", "ci", "co"), [(8, 64, 32), (4, 128, 64), (2, 5, 7)], ids=str)
def test_transposed(width, ci, co, precision):
    mask = cells()

    def op(x, p, backend):
        return ops.conv_transpose3d(x, p["weight"], p["bias"], backend=backend)

    given = shapes(mask, (width,) * 3, ci, co) | {"weight": (ci, co, 2, 2, 2)}
    check(op, given, mask, precision)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("width", "channels"), STAGES[:4], ids=str)
def test_fused_layers(width, channels, pooled):
    """Convolution, norm, residual and activation, statistics from the epilogue."""
    mask = cells()
    kernel = 1 if pooled else 3
    layer = Conv3d(channels, channels, kernel, 1, kernel // 2)
    norm, act = InstanceNorm3d(channels, affine=True), LeakyReLU(0.01)
    pool = AvgPool3d(2, 2) if pooled else None
    module = torch.nn.ModuleList([layer, norm, act, *([pool] if pooled else [])]).to(DEVICE)
    half = (width // 2 if pooled else width,) * 3
    x = torch.randn(len(mask), *(width,) * 3, channels, device=DEVICE)
    residual = torch.randn(len(mask), *half, channels, device=DEVICE)
    results = []
    for backend, dtype in (("reference", torch.float64), ("triton", torch.float32)):
        set_backend(module, backend).to(dtype)
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, residual)]
        blocks, added = (BlockTensor(leaf, mask) for leaf in leaves)
        y = conv_norm_act(blocks, layer, norm, act, residual=added, pool=pool).features
        generator = torch.Generator(DEVICE).manual_seed(1)
        upstream = torch.randn(y.shape, generator=generator, device=DEVICE).to(dtype)
        upstream = upstream * (y.detach().abs() > 1e-3)
        wanted = [*leaves, layer.weight, norm.weight, norm.bias]
        results.append([y, *torch.autograd.grad(y, wanted, upstream)])
    for truth, value in zip(*results, strict=True):
        assert (value.double() - truth).abs().max() < 1e-4 * truth.abs().max()


def test_more_than_two_to_the_31_elements():
    """The last block lies beyond what 32 bits address, forward and backward."""
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of GPU memory")
    channels, grid = 64, (10, 10, 11)
    mask = BlockMask.random(1, grid, 0.0).to(DEVICE)
    x = torch.empty(len(mask), 32, 32, 32, channels, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    x.normal_()
    weight = torch.randn(channels, channels, 3, 3, 3, dtype=x.dtype, device=DEVICE)
    with torch.no_grad():
        y = ops.conv3d(BlockTensor(x, mask), weight, backend="triton").features
        norm = ops.instance_norm(BlockTensor(x, mask), backend="triton").features
    corner = torch.zeros(1, channels, 33, 33, 33, dtype=torch.float64, device=DEVICE)
    corner[..., 1:, 1:, 1:] = x[-1].permute(3, 0, 1, 2).double()
    expected = torch.nn.functional.conv3d(corner[..., 1:, 1:, 1:], weight.double(), padding=1)
    inner = expected[0, :, 1:, 1:, 1:].permute(1, 2, 3, 0)  # without the halo of other blocks
    error = (y[-1, 1:, 1:, 1:].double() - inner).abs().max() / inner.abs().max()
    assert error < TOLERANCE["bfloat16"]
    deviations = x[-1].double() - norm[-1].double()
    assert deviations.abs().max() < 0.05  # a million normal values need no normalising
