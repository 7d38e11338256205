"""The comparisons of these tests have teeth: plausible mistakes are far out of tolerance."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from sparsemae.kernels import (
    BlockMask,
    BlockTensor,
    ops,
    torch_backend,
    torch_conv,
    torch_norm,
    torch_tables,
)

CAUGHT = 1e-2  # tolerances are 1e-10 and 2e-5


def conv(stride=(1, 1, 1)):
    def op(x, p, backend):
        return ops.conv3d(x, p["weight"], p["bias"], stride, backend=backend)

    return op


def norm(x, p, backend):
    return ops.instance_norm(x, p["bias"], p["bias"], backend=backend)


def errors(parity, op, block, edit=lambda m: m):
    visible = BlockMask.random(3, (3, 3, 3), 0.5)
    channels = 4
    leaves = {
        "x": torch.randn(len(visible), *block, channels),
        "weight": torch.randn(channels, channels, 3, 3, 3),
        "bias": torch.randn(channels),
    }
    if op is norm:
        del leaves["weight"]
    return parity(op, leaves, edit(visible), torch.float64)


def test_taps_in_the_wrong_order(parity, monkeypatch):
    assert max(errors(parity, conv(), (2, 2, 2)).values()) < 1e-10
    taps = torch_tables._taps
    monkeypatch.setattr(torch_tables, "_taps", lambda b, k: [t.flip(1) for t in taps(b, k)])
    found = errors(parity, conv(), (2, 2, 2))
    assert min(found["y"], found["x"], found["weight"]) > CAUGHT


@pytest.mark.parametrize("block", [(1, 1, 1), (4, 4, 4)], ids=["taps", "halo"])
@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize(
    "rearrange",
    [lambda n: n.flip(1), lambda n: n.view(-1, 3, 3, 3).transpose(1, 3).flatten(1)],
    ids=["mirrored", "transposed"],
)
def test_a_neighbour_table_in_the_wrong_order(parity, block, stride, rearrange):
    if block[0] < stride[0]:
        block = (2, 2, 2)
    found = errors(
        parity, conv(stride), block, lambda m: replace(m, neighbors=rearrange(m.neighbors))
    )
    assert min(found["y"], found["x"], found["weight"]) > CAUGHT


def test_a_halo_that_is_not_zeroed(parity, monkeypatch):
    """Absent rows read row 0 instead of nothing."""
    monkeypatch.setattr(
        torch_tables.Gather,
        "rows",
        lambda self, features, first, last: features.reshape(-1, features.shape[-1])[
            self.source[first * self.per_block : last * self.per_block]
        ],
    )
    for block in ((1, 1, 1), (4, 4, 4)):
        assert errors(parity, conv(), block)["y"] > CAUGHT


def test_a_halo_gradient_that_is_dropped(parity, monkeypatch):
    monkeypatch.setattr(torch_tables.Fold, "add", lambda *args: None)
    found = errors(parity, conv((2, 2, 2)), (4, 4, 4))
    assert found["x"] > CAUGHT
    assert max(found["y"], found["weight"], found["bias"]) < 1e-10


def test_a_weight_gradient_that_forgets_a_chunk(parity, monkeypatch):
    monkeypatch.setattr(torch_conv, "CHUNK_BYTES", 1)
    backward, calls = torch_conv._convolution_backward, []

    def forgetful(grad, haloed, weight, stride, wanted):
        dx, dw, db = backward(grad, haloed, weight, stride, wanted)
        calls.append(dw)
        return dx, dw * 0 if len(calls) == 3 else dw, db

    monkeypatch.setattr(torch_conv, "_convolution_backward", forgetful)
    found = errors(parity, conv(), (4, 4, 4))
    assert found["weight"] > CAUGHT
    assert max(found["y"], found["x"], found["bias"]) < 1e-10


def test_unbiased_variance(parity, monkeypatch):
    assert max(errors(parity, norm, (2, 2, 2)).values()) < 1e-10
    moments = torch_norm._moments

    def unbiased(rows):
        mean, variance = moments(rows)
        return mean, variance * len(rows) / (len(rows) - 1)

    monkeypatch.setattr(torch_norm, "_moments", unbiased)
    found = errors(parity, norm, (2, 2, 2))
    assert min(found["y"], found["x"]) > 1e-3  # of 112 rows a sample


@pytest.mark.parametrize("whose", ["every voxel of the volume", "every sample"])
def test_statistics_over_other_voxels(parity, monkeypatch, whose):
    def everywhere(x, weight, bias, eps):
        return x.pack(F.instance_norm(x.unpack(), None, None, weight, bias, eps=eps), x.mask)

    def together(x, weight, bias, eps):
        rows = x.features.flatten(0, 3)
        y = F.batch_norm(rows, None, None, weight, bias, True, 0.0, eps)
        return x.with_values(y.view_as(x.features))

    mutant = everywhere if whose == "every voxel of the volume" else together
    monkeypatch.setattr(torch_backend, "instance_norm", mutant)
    found = errors(parity, norm, (2, 2, 2))
    assert min(found["y"], found["x"]) > CAUGHT


def test_a_bias_that_leaks_to_masked_voxels():
    """Seen by the next convolution, which reads masked neighbours as zero."""
    visible = BlockMask.random(2, (3, 3, 3), 0.5)
    x = torch.randn(2, 4, 6, 6, 6, dtype=torch.float64)
    weight, bias = torch.randn(4, 4, 3, 3, 3).double(), torch.randn(4).double()
    packed = BlockTensor.pack(x, visible)
    once = ops.conv3d(packed, weight, bias)
    right = ops.conv3d(once, weight, bias).unpack()
    leaking = F.conv3d(F.conv3d(packed.unpack(), weight, bias, padding=1), weight, bias, padding=1)
    again = leaking * visible.voxels((2, 2, 2))
    exact = F.conv3d(once.unpack(), weight, bias, padding=1) * visible.voxels((2, 2, 2))
    torch.testing.assert_close(right, exact, rtol=1e-12, atol=1e-12)
    assert (again - right).abs().max() > CAUGHT * right.abs().max()
