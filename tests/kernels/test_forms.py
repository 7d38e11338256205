"""The forms of the torch backend, forced: each is exact, whatever would have been chosen."""

import pytest
import torch

from sparsemae.kernels import BlockMask, BlockTensor, ops, rows, torch_conv, torch_norm

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}
CI, CO = 5, 7

every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def leaves(mask, block, kernel=(3, 3, 3)):
    shapes = {"x": (len(mask), *block, CI), "weight": (CO, CI, *kernel), "bias": (CO,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def conv(stride=(1, 1, 1)):
    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p["bias"], stride, backend=backend)

    return op


def forms(mask) -> set[str]:
    """Which tables the operators asked for."""
    return {key[0] for key in mask.tables}


@every_dtype
@pytest.mark.parametrize("block", [(1, 1, 1), (2, 2, 2), (4, 4, 4), (1, 2, 3)])
@pytest.mark.parametrize(("threshold", "form"), [(0.0, "taps"), (float("inf"), "halo")])
def test_taps_and_halo(parity, monkeypatch, dtype, block, threshold, form):
    monkeypatch.setattr(torch_conv, "TAPS_FROM", threshold)
    mask = BlockMask.random(3, (2, 2, 2), 0.5)
    errors = parity(conv(), leaves(mask, block), mask, dtype)
    assert forms(mask) == {form}
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_small_blocks_take_taps_and_large_ones_halo():
    mask = BlockMask.random(1, (2, 2, 2), 0.5)
    for width, form in ((1, "taps"), (2, "taps"), (4, "halo"), (16, "halo")):
        mask.tables.clear()
        x = BlockTensor(torch.randn(len(mask), *(width,) * 3, CI), mask)
        ops.conv3d(x, torch.randn(CO, CI, 3, 3, 3))
        assert forms(mask) == {form}, width


@every_dtype
@pytest.mark.parametrize(
    (
        "blocks_at_once",
        "runs",
    ),  # of 11 blocks: as few runs as fit, equal and even, but for the rest
    [(1, [2, 2, 2, 2, 2, 1]), (2, [2, 2, 2, 2, 2, 1]), (5, [4, 4, 3]), (11, [11])],
)
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_chunks(parity, monkeypatch, dtype, blocks_at_once, runs, stride):
    grown = 6 if stride == (1, 1, 1) else 5
    size = 4 if dtype == torch.float32 else 8
    monkeypatch.setattr(torch_conv, "CHUNK_BYTES", blocks_at_once * grown**3 * CI * size)
    visible = torch.zeros(3, 2, 2, 2, dtype=torch.bool)
    visible.view(-1)[torch.randperm(24)[:11]] = True
    mask = BlockMask.from_visible(visible)
    pieces = list(
        torch_conv._chunks(
            torch.randn(11, 4, 4, 4, CI, dtype=dtype), mask, (1, 1, 1), (grown - 5,) * 3
        )
    )
    assert [last - first for first, last, _ in pieces] == runs
    errors = parity(conv(stride), leaves(mask, (4, 4, 4)), mask, dtype)
    assert max(errors.values()) < TOLERANCE[dtype], errors


@every_dtype
@pytest.mark.parametrize("rows_at_once", [1, 7, 8, 10**6])  # of blocks of 8
def test_chunks_of_a_norm(parity, monkeypatch, dtype, rows_at_once):
    size = 4 if dtype == torch.float32 else 8
    monkeypatch.setattr(torch_norm, "CHUNK_BYTES", rows_at_once * CI * size)
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    values = {"x": torch.randn(len(mask), 2, 2, 2, CI), "w": torch.randn(CI), "b": torch.randn(CI)}

    def op(x, p, backend):
        return ops.instance_norm(x, p["w"], p["b"], backend=backend)

    errors = parity(op, values, mask, dtype)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_a_block_larger_than_a_chunk(parity, monkeypatch):
    monkeypatch.setattr(torch_conv, "CHUNK_BYTES", 1)
    mask = BlockMask.random(2, (2, 2, 2), 0.5)
    errors = parity(conv(), leaves(mask, (4, 4, 4)), mask, torch.float32)
    assert max(errors.values()) < 2e-5, errors


@every_dtype
@pytest.mark.parametrize("few", [0, 10**9, rows.FEW_ROWS])
@pytest.mark.parametrize("blocks", [1, 31, 32, 33])  # of 8 voxels: around 256 rows
@pytest.mark.parametrize("kernel", [(1, 1, 1), (3, 3, 3)])
def test_row_counts(parity, monkeypatch, dtype, few, blocks, kernel):
    monkeypatch.setattr(rows, "FEW_ROWS", few)
    visible = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    visible.view(-1)[torch.randperm(64)[:blocks]] = True
    mask = BlockMask.from_visible(visible)
    errors = parity(conv(), leaves(mask, (2, 2, 2), kernel), mask, dtype)
    assert max(errors.values()) < TOLERANCE[dtype], errors


def test_rows_go_through_a_convolution_in_float32_only(monkeypatch):
    calls = []
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(rows.F, "conv2d", lambda *args: calls.append(args) or conv2d(*args))
    for dtype, expected in ((torch.float64, 0), (torch.float32, 1)):
        weight = torch.randn(CO, CI, dtype=dtype)
        rows.linear(torch.randn(300, CI, dtype=dtype), weight, None)
        assert len(calls) == expected


OPERATORS = {
    "taps": ((1, 1, 1), conv()),
    "halo": ((4, 4, 4), conv()),
    "strided": ((4, 4, 4), conv((2, 2, 2))),
    "1x1": ((2, 2, 2), lambda x, p, b: ops.conv3d(x, p["weight"][..., :1, :1, :1], p["bias"])),
    "transposed": (
        (2, 2, 2),
        lambda x, p, b: ops.conv_transpose3d(x, p["weight"].transpose(0, 1), p["bias"]),
    ),
    "norm": ((2, 2, 2), lambda x, p, b: ops.instance_norm(x, p["weight"][0, :, 0, 0, 0], None)),
}


@every_dtype
@pytest.mark.parametrize(
    "trained", [{"x"}, {"weight"}, {"bias"}, {"x", "bias"}, {"weight", "bias"}]
)
@pytest.mark.parametrize("name", OPERATORS)
def test_frozen_leaves(name, trained, dtype):
    """Gradients do not depend on which other leaves ask for theirs."""
    block, op = OPERATORS[name]
    mask = BlockMask.random(3, (2, 2, 2), 0.5)
    values = leaves(mask, block)
    results = []
    for wanted in (set(values), trained):
        given = {k: v.to(dtype, copy=True).requires_grad_(k in wanted) for k, v in values.items()}
        y = op(BlockTensor(given["x"], mask), given, "torch").features
        if not y.requires_grad:
            assert (name, trained) == ("norm", {"bias"})
            return
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, dtype=y.dtype))
        results.append({k: v.grad for k, v in given.items()})
    for key in trained:
        torch.testing.assert_close(results[1][key], results[0][key], rtol=1e-4, atol=1e-4)
    assert all(v is None for k, v in results[1].items() if k not in trained)


@pytest.mark.parametrize("name", OPERATORS)
def test_any_layout_of_the_upstream_gradient(name):
    """`y.sum()` expands one number; a concatenation hands back slices of channels."""
    block, op = OPERATORS[name]
    mask = BlockMask.random(3, (2, 2, 2), 0.5)
    values = leaves(mask, block)

    def gradients(loss):
        given = {k: v.clone().requires_grad_() for k, v in values.items()}
        loss(op(BlockTensor(given["x"], mask), given, "torch")).backward()
        return [v.grad for v in given.values() if v.grad is not None]

    plain = gradients(lambda y: (y.features * torch.ones_like(y.features)).sum())
    expanded = gradients(lambda y: y.features.sum())
    sliced = gradients(lambda y: torch.cat([y, y], 1).features[..., y.channels :].sum())
    for a, b, c in zip(plain, expanded, sliced, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(c, a, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_two_runs_give_the_same_bits(name):
    block, op = OPERATORS[name]
    mask = BlockMask.random(3, (2, 2, 2), 0.5)
    values, results = leaves(mask, block), []
    for _ in range(2):
        given = {k: v.clone().requires_grad_() for k, v in values.items()}
        y = op(BlockTensor(given["x"], mask), given, "torch").features
        y.square().sum().backward()
        results.append([y, *(v.grad for v in given.values() if v.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
