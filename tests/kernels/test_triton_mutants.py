"""The comparisons of Triton kernels have teeth: plausible mistakes are far out of tolerance."""

import pytest
import torch

from sparsemae.kernels import BlockMask, ops, tiles
from sparsemae.kernels.tiles import Tile

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="mutants are interpreted"),
]

CAUGHT = 1e-2  # tolerances are 2e-5 and 2e-3


@triton.jit
def _stays(neighbors_ptr, n, z, y, x, live, BLOCK: tl.constexpr):
    """Wraps around inside the own block."""
    z = (z + BLOCK[0]) % BLOCK[0]
    y = (y + BLOCK[1]) % BLOCK[1]
    x = (x + BLOCK[2]) % BLOCK[2]
    inside = (z * BLOCK[1] + y) * BLOCK[2] + x
    return n * (BLOCK[0] * BLOCK[1] * BLOCK[2]) + inside, live & (inside >= 0)


@triton.jit
def _transposed(neighbors_ptr, n, z, y, x, live, BLOCK: tl.constexpr):
    """The neighbour table read with d and w exchanged."""
    step_d = (z >= 0).to(tl.int32) + (z >= BLOCK[0]).to(tl.int32)
    step_h = (y >= 0).to(tl.int32) + (y >= BLOCK[1]).to(tl.int32)
    step_w = (x >= 0).to(tl.int32) + (x >= BLOCK[2]).to(tl.int32)
    direction = step_w * 9 + step_h * 3 + step_d
    block = tl.load(neighbors_ptr + n * 27 + direction, mask=live, other=-1)
    z -= (step_d - 1) * BLOCK[0]
    y -= (step_h - 1) * BLOCK[1]
    x -= (step_w - 1) * BLOCK[2]
    inside = (z * BLOCK[1] + y) * BLOCK[2] + x
    return block.to(tl.int64) * (BLOCK[0] * BLOCK[1] * BLOCK[2]) + inside, block >= 0


def errors(parity, stride, block):
    mask = BlockMask.random(2, (2, 2, 2), 0.4, generator=torch.Generator().manual_seed(3))
    leaves = {
        "x": torch.randn(len(mask), *block, 16),
        "weight": torch.randn(16, 16, 3, 3, 3),
        "bias": torch.randn(16),
    }

    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p["bias"], stride, backend=backend)

    with tiles.using({("march", "sm_90", 32, 16, 16, 4): Tile(32, 16, 16)}):
        return parity(op, leaves, mask, torch.float32, "triton")


FORMS = {
    "march": ("triton_march", (1, 1, 1), (4, 4, 4), {"y", "x"}),
    "gather": ("triton_gather", (1, 1, 1), (2, 2, 2), {"y", "x"}),
    "spread": ("triton_spread", (2, 2, 2), (2, 2, 2), {"x"}),
    "weight gradient": ("triton_wgrad", (1, 1, 1), (2, 2, 2), {"weight"}),
}


@pytest.mark.parametrize("mutant", [_stays, _transposed])
@pytest.mark.parametrize("form", FORMS)
def test_a_neighbour_that_is_not_found(parity, monkeypatch, form, mutant):
    name, stride, block, spoiled = FORMS[form]
    assert max(errors(parity, stride, block).values()) < 2e-5
    monkeypatch.setattr(f"sparsemae.kernels.{name}.locate", mutant)
    found = errors(parity, stride, block)
    assert min(found[n] for n in spoiled) > CAUGHT
    assert max(v for n, v in found.items() if n not in spoiled) < 2e-5


def test_taps_that_are_not_mirrored(parity, monkeypatch):
    from sparsemae.kernels import triton_conv

    gather = triton_conv.gather_conv

    def plain(*args, mirror=False, **options):
        return gather(*args, swapped=mirror or options.pop("swapped", False), **options)

    monkeypatch.setattr(triton_conv, "gather_conv", plain)
    found = errors(parity, (1, 1, 1), (2, 2, 2))
    assert found["x"] > CAUGHT
    assert max(found["y"], found["weight"], found["bias"]) < 2e-5


def test_a_split_that_is_forgotten(parity, monkeypatch):
    from sparsemae.kernels import triton_wgrad

    launch = triton_wgrad.launch

    def forgetful(kernel, grid, arguments, constants, **options):
        if "splits" in arguments:
            arguments = arguments | {"splits": arguments["splits"] - 1}
        launch(kernel, grid, arguments, constants, **options)

    monkeypatch.setattr(tiles, "_split", lambda kernel, found, *_: found)
    form = {("wgrad", "sm_90", 32, 16, 16, 2): Tile(16, 16, 16, splits=4)}
    with tiles.using(form):
        assert max(errors(parity, (1, 1, 1), (2, 2, 2)).values()) < 2e-5
        monkeypatch.setattr(triton_wgrad, "launch", forgetful)
        found = errors(parity, (1, 1, 1), (2, 2, 2))
    assert min(found["weight"], found["bias"]) > CAUGHT
    assert max(found["y"], found["x"]) < 2e-5
