"""Streamed logits are those of a dense sliding window: MONAI's, and a loop written out here."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparsemae.errors import UserError
from sparsemae.predicting.stream import predict_logits, sums_bytes
from sparsemae.predicting.windows import Windows, importance

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(channels, shape, seed=1):
    return np.random.default_rng(seed).standard_normal((channels, *shape)).astype(np.float32)


def gathered(stream):
    """All planes of a stream as one volume [K, D, H, W]."""
    return torch.stack(list(stream.planes), 1).movedim(1, stream.axis + 1)


def dense(volume, networks, patch, starts, subsets=((),)):
    """The definition, in float64: pad, weigh by a Gaussian, average over windows and the rest."""
    x = torch.from_numpy(volume).double()
    missing = [max(0, p - n) for n, p in zip(x.shape[1:], patch, strict=True)]
    before = [m // 2 for m in missing]
    pads = [n for m, b in zip(missing[::-1], before[::-1], strict=True) for n in (b, m - b)]
    padded = F.pad(x, pads)
    weight = torch.ones((), dtype=torch.float64)
    for n in patch:
        at = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (at / (n / 8)) ** 2)
    weight = weight.clamp(min=1e-3)
    sums = weights = 0
    for corner in itertools.product(*starts):
        box = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
        window = padded[:, *box][None]
        logits = 0
        for network in networks:
            for subset in subsets:
                flipped = network.double()(torch.flip(window, [a + 2 for a in subset]))
                logits = logits + torch.flip(flipped, [a + 2 for a in subset])
        full = torch.zeros(logits.shape[1], *padded.shape[1:], dtype=torch.float64)
        full[:, *box] = weight * logits[0] / len(networks) / len(subsets)
        sums, count = sums + full, torch.zeros(padded.shape[1:], dtype=torch.float64)
        count[box] = weight
        weights = weights + count
    for network in networks:
        network.float()
    inside = tuple(slice(b, b + n) for b, n in zip(before, x.shape[1:], strict=True))
    return (sums / weights)[:, *inside]


ALL_SUBSETS = [s for n in range(4) for s in itertools.combinations((0, 1, 2), n)]


@pytest.mark.parametrize(
    ("shape", "patch", "channels", "classes"),
    [
        ((24, 12, 16), (8, 8, 8), 1, 2),
        ((8, 12, 40), (8, 8, 8), 2, 3),
        ((12, 30, 12), (8, 12, 4), 2, 5),
        ((5, 20, 7), (8, 8, 12), 1, 4),  # smaller than the patch, odd padding
        ((3, 5, 7), (8, 8, 8), 1, 2),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_monai(network, shape, patch, channels, classes, batch_size):
    """Where its windows are nnU-Net's: volume and patch differ by whole half patches."""
    from monai.inferers import sliding_window_inference

    volume, net = noise(channels, shape), network(channels, classes)
    expected = sliding_window_inference(
        *(torch.from_numpy(volume)[None], patch, 1, net),
        overlap=0.5,
        mode="gaussian",
        sigma_scale=0.125,
    )[0]
    stream = predict_logits(volume, net, patch, mirror_axes=(), batch_size=batch_size)
    planes = gathered(stream)
    assert stream.shape == shape
    assert planes.shape == (classes, *shape)
    torch.testing.assert_close(planes, expected, atol=1e-5, rtol=1e-5)


def test_importance_is_monais():
    from monai.data.utils import compute_importance_map

    for patch in [(8, 8, 8), (5, 16, 33), (1, 2, 96)]:
        expected = compute_importance_map(patch, mode="gaussian", sigma_scale=0.125)
        torch.testing.assert_close(importance(patch), expected, atol=1e-7, rtol=1e-5)
        assert importance(patch).min() > 0


@pytest.mark.parametrize(
    ("size", "patch", "step", "starts"),
    [  # by nnunetv2 2.8.1
        (110, 64, 0.5, [0, 23, 46]),
        (64, 64, 0.5, [0]),
        (65, 64, 0.5, [0, 1]),
        (97, 64, 0.5, [0, 16, 33]),
        (13, 8, 0.5, [0, 2, 5]),
        (15, 8, 0.5, [0, 4, 7]),
        (512, 128, 0.5, [0, 64, 128, 192, 256, 320, 384]),
        (300, 128, 0.5, [0, 57, 115, 172]),
        (50, 20, 1.0, [0, 15, 30]),
        (30, 10, 0.3, [0, 3, 6, 9, 11, 14, 17, 20]),
    ],
)
def test_windows_begin_where_nnunet_s_do(size, patch, step, starts):
    windows = Windows.cover((size, patch, 1), (patch, patch, 1), step)
    assert windows.starts == (starts, [0], [0])
    assert windows.count == len(starts)
    assert windows.axis == 0


CASES = [
    ((13, 9, 10), (8, 8, 8), 0.5, 1, 3),
    ((9, 15, 31), (8, 8, 16), 0.5, 2, 2),
    ((8, 27, 11), (8, 6, 8), 0.3, 1, 4),
    ((29, 6, 10), (8, 8, 7), 1.0, 1, 2),
    ((5, 6, 7), (8, 9, 8), 0.5, 2, 5),
]


def starts_of(shape, patch, step):
    return Windows.cover(shape, patch, step).starts


@pytest.mark.parametrize(("shape", "patch", "step", "channels", "classes"), CASES)
def test_equals_the_definition_mirrored_and_ensembled(
    network, shape, patch, step, channels, classes
):
    volume = noise(channels, shape)
    nets = [network(channels, classes, seed) for seed in range(2)]
    for axes, subsets in [((0, 1, 2), ALL_SUBSETS), ((1, 0), [(), (0,), (1,), (0, 1)])]:
        found = gathered(predict_logits(volume, nets, patch, step=step, mirror_axes=axes))
        expected = dense(volume, nets, patch, starts_of(shape, patch, step), subsets)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    plain = gathered(predict_logits(volume, nets, patch, step=step, mirror_axes=()))
    assert (plain - found).abs().max() > 1e-2  # mirroring along all or some axes is seen


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_planes_leave_along_the_longest_axis_as_soon_as_they_are_done(network, axis):
    shape = [8, 8, 8]
    shape[axis] = 40
    volume, seen = noise(1, shape), []
    stream = predict_logits(
        *(volume, network(1, 2), (8, 8, 8)),
        on_window=lambda done, total: seen.append((done, total)),
    )
    assert stream.axis == axis
    assert seen == []
    counts = [len(seen) for _ in stream.planes]
    assert counts == [1 + i // 4 for i in range(36)] + [9] * 4
    assert seen == [(i + 1, 9) for i in range(9)]


def test_the_volume_may_be_read_only_and_is_left_alone(network):
    volume = noise(1, (9, 8, 8))
    before = volume.copy()
    volume.flags.writeable = False
    gathered(predict_logits(volume, lambda x: x.mul_(2).expand(-1, 2, -1, -1, -1), (8, 8, 8)))
    np.testing.assert_array_equal(volume, before)


def test_consumers_keep_their_gradient_mode(network):
    net = network(1, 2).requires_grad_(True)
    for plane in predict_logits(noise(1, (16, 8, 8)), net, (8, 8, 8)).planes:
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not plane.requires_grad


def test_low_precision_is_summed_in_fp32(network):
    volume, net = noise(1, (12, 9, 8)), network(1, 3)
    exact = gathered(predict_logits(volume, net, (8, 8, 8)))
    rough = gathered(predict_logits(volume, net, (8, 8, 8), precision="bf16"))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0.05, rtol=0.05)
    assert (rough != exact).any()


@pytest.mark.gpu
@pytest.mark.parametrize("sums_on", [None, "cpu"])
def test_a_gpu_gives_the_same(network, monkeypatch, sums_on):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    volume, net = noise(2, (9, 15, 31)), network(2, 3)
    expected = gathered(predict_logits(volume, net, (8, 8, 16)))
    stream = predict_logits(
        *(volume, net.cuda(), (8, 8, 16)), device="cuda", sums_on=sums_on, batch_size=4
    )
    found = gathered(stream)
    assert found.device.type == (sums_on or "cuda")
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_logits_that_are_not_finite_are_refused():
    volume = noise(1, (8, 8, 24))
    volume[0, 3, 3, 20] = np.inf
    stream = predict_logits(volume, lambda x: x.expand(-1, 2, -1, -1, -1), (8, 8, 8))
    assert len([next(stream.planes) for _ in range(20)]) == 20
    with pytest.raises(UserError, match=r"not finite.*precision fp32"):
        next(stream.planes)


@pytest.mark.parametrize(
    "options",
    [
        {"step": 0},
        {"step": 1.1},
        {"batch_size": 0},
        {"mirror_axes": (3,)},
        {"mirror_axes": (-1,)},
        {"patch_size": (8, 0, 8)},
        {"networks": []},
    ],
)
def test_impossible_arguments(network, options):
    given = {"networks": network(1, 2), "patch_size": (8, 8, 8)} | options
    with pytest.raises(ValueError, match="at least 1"):
        predict_logits(noise(1, (8, 8, 8)), **given)


@pytest.mark.parametrize(
    "broken", [lambda x: [x], lambda x: x[..., :4, :], lambda x: x[..., :-1], lambda x: x[0]]
)
def test_a_network_of_another_kind(broken):
    stream = predict_logits(noise(1, (8, 8, 8)), broken, (8, 8, 8))
    with pytest.raises(ValueError, match="one tensor"):
        next(stream.planes)


def test_bytes_of_a_long_scan():
    assert sums_bytes((512, 512, 800), (128, 128, 128), 8) == 4 * 9 * 128 * 512 * 512
    assert sums_bytes((800, 512, 512), (96, 128, 128), 2) == 4 * 3 * 96 * 512 * 512
    assert math.log10(sums_bytes((10**6, 10**6, 10**6), (8, 8, 8), 1)) > 13
