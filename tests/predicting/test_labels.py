"""Labels on the grid as read are those of dense logits, resampled as a whole by SciPy."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from sparsemae.predicting.labels import crop_planes, to_labels
from sparsemae.predicting.placement import place
from sparsemae.predicting.stream import LogitPlanes, predict_logits

pytestmark = pytest.mark.usefixtures("one_thread")


def stream_of(logits, axis):
    """Given logits [K, D, H, W] as a stream."""
    planes = iter(torch.from_numpy(logits).movedim(axis + 1, 0))
    return LogitPlanes(axis, tuple(logits.shape[1:]), planes)


def at_positions(logits, placement, nearest=()):
    """The logits on the crop's grid, by SciPy in float64."""
    where = []
    for axis, n in enumerate(placement.crop):
        x = (np.arange(n) - placement.grid.origin[axis]) / placement.grid.step[axis]
        where.append(np.floor(x + 0.5) if axis in nearest else x)
    grid = np.meshgrid(*where, indexing="ij")
    return np.stack(
        [ndimage.map_coordinates(k.astype(float), grid, order=1, mode="nearest") for k in logits]
    )


# shape as read, voxel sizes as read, crop, plan's spacing, axis that is not interpolated
CASES = {
    "up and down": ((20, 17, 15), (1.0, 1.5, 0.8), ((2, 0, 3), (19, 17, 15)), (1.3, 0.9, 0.8), ()),
    "all finer": ((12, 14, 11), (2.0, 2.2, 2.4), ((0, 1, 0), (12, 12, 9)), (1.1, 0.9, 1.0), ()),
    "all coarser": ((30, 28, 26), (0.5, 0.6, 0.7), ((3, 4, 5), (29, 27, 25)), (1.7, 1.7, 1.7), ()),
    "as read": ((12, 14, 11), (1.0, 1.0, 1.0), ((1, 2, 3), (12, 13, 10)), (1.0, 1.0, 1.0), ()),
    "thick z": ((20, 18, 9), (0.7, 0.7, 5.0), ((1, 1, 1), (20, 17, 9)), (1.0, 1.0, 3.5), (2,)),
    "thick x, more": (
        (7, 18, 20),
        (4.0, 0.9, 0.9),
        ((0, 0, 2), (7, 18, 20)),
        (1.9, 0.6, 0.6),
        (0,),
    ),
    "thick in the plan": (
        (16, 9, 16),
        (1.0, 2.9, 1.0),
        ((0,) * 3, (16, 9, 16)),
        (1.0, 3.1, 1.0),
        (1,),
    ),
    "two thick": ((16, 9, 9), (1.0, 4.0, 4.0), ((0,) * 3, (16, 9, 9)), (1.0, 3.5, 3.5), ()),
    "one voxel": ((6, 6, 6), (1.0, 1.0, 1.0), ((2, 2, 2), (4, 4, 4)), (9.0, 1.5, 1.0), (0,)),
}


def setting(case, turn=0):
    """A placement with axes rolled by `turn`, and the axes taken from the nearest slice."""
    shape, sizes, crop, spacing, nearest = CASES[case]
    roll = [(a + turn) % 3 for a in range(3)]
    pick = lambda values: tuple(values[a] for a in roll)  # noqa: E731
    start, stop = crop
    affine = np.diag([*pick(sizes), 1.0])
    # turned in the world: spacing is all that counts
    affine[:3, :3] = np.array([[0, -0.8, 0.6], [1, 0, 0], [0, 0.6, 0.8]]) @ affine[:3, :3]
    placed = place(pick(shape), affine, (pick(start), pick(stop)), pick(spacing))
    return placed, tuple(roll.index(a) for a in nearest)


@pytest.mark.parametrize("turn", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_planes_between_the_plan_s_are_scipy_s(case, turn):
    placed, nearest = setting(case, turn)
    assert (placed.thick,) == (nearest or (None,))
    logits = np.random.default_rng(0).standard_normal((3, *placed.grid.shape)).astype(np.float32)
    expected = at_positions(logits, placed, nearest)
    for axis in range(3):
        planes = torch.stack(list(crop_planes(stream_of(logits, axis), placed)), 1)
        found = planes.movedim(1, axis + 1).numpy()
        np.testing.assert_allclose(found, expected, atol=1e-5)
        labels = to_labels(stream_of(logits, axis), placed)
        assert (labels.dtype, labels.shape) == (np.uint8, placed.shape)
        box = tuple(map(slice, placed.start, placed.stop))
        second, best = np.sort(expected, 0)[-2:]
        clear = best - second > 1e-4
        np.testing.assert_array_equal(labels[box][clear], expected.argmax(0)[clear])
        assert clear.mean() > 0.99
        labels[box] = 0
        assert not labels.any()


@pytest.mark.parametrize("case", ["up and down", "thick z", "all finer"])
def test_from_volume_to_labels(network, case):
    """The whole way, with patches, mirrors and two networks, against MONAI and SciPy."""
    from monai.inferers import sliding_window_inference

    placed, nearest = setting(case)
    patch = tuple(n - n % 2 if n < 12 else 8 for n in placed.grid.shape)
    # MONAI's windows are ours where the rest is a whole number of half patches
    pairs = zip(placed.grid.shape, patch, strict=True)
    grid = replace(placed.grid, shape=tuple(n - (n - p) % (p // 2) for n, p in pairs))
    placed = replace(placed, grid=grid)
    volume = np.random.default_rng(0).standard_normal((2, *grid.shape)).astype(np.float32)
    nets = [network(2, 4, seed) for seed in range(2)]
    dense = sum(
        sliding_window_inference(
            *(torch.from_numpy(volume)[None], patch, 4, net), overlap=0.5, mode="gaussian"
        )[0]
        for net in nets
    )
    expected = at_positions(dense.numpy() / 2, placed, nearest)
    probabilities = {}
    stream = predict_logits(volume, nets, patch, mirror_axes=())
    labels = to_labels(stream, placed, probabilities=probabilities.__setitem__)

    box = tuple(map(slice, placed.start, placed.stop))
    second, best = np.sort(expected, 0)[-2:]
    clear = best - second > 1e-4
    np.testing.assert_array_equal(labels[box][clear], expected.argmax(0)[clear])
    assert list(probabilities) == list(range(placed.shape[stream.axis]))
    found = np.moveaxis(np.stack(list(probabilities.values()), 1), 1, stream.axis + 1)
    softmax = np.zeros((4, *placed.shape))
    softmax[0] = 1
    softmax[:, *box] = np.exp(expected) / np.exp(expected).sum(0)
    np.testing.assert_allclose(found, softmax, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(0), labels)


def test_many_classes_need_a_larger_type():
    placed = place((4, 4, 4), np.eye(4), ((0, 0, 0), (4, 4, 4)), (1.0, 1.0, 1.0))
    logits = np.zeros((300, 4, 4, 4), np.float32)
    logits[299, 1, 2, 3] = 1
    labels = to_labels(stream_of(logits, 1), placed)
    assert labels.dtype == np.uint16
    assert np.argwhere(labels).tolist() == [[1, 2, 3]]
    assert labels[1, 2, 3] == 299


def test_what_does_not_fit_is_refused():
    placed = place((4, 5, 6), np.eye(4), ((0, 0, 0), (4, 5, 6)), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"\(4, 6, 5\)"):
        to_labels(stream_of(np.zeros((2, 4, 6, 5), np.float32), 0), placed)
    with pytest.raises(ValueError, match="two or more"):
        to_labels(stream_of(np.zeros((1, 4, 5, 6), np.float32), 0), placed)
    for crop in (((0, 0, 0), (4, 5, 7)), ((-1, 0, 0), (4, 5, 6)), ((2, 0, 0), (2, 5, 6))):
        with pytest.raises(ValueError, match="no crop"):
            place((4, 5, 6), np.eye(4), crop, (1.0, 1.0, 1.0))


PEAKS = """
import numpy as np, torch
from sparsemae.predicting.labels import to_labels
from sparsemae.predicting.placement import place
from sparsemae.predicting.stream import predict_logits

def peak():  # unlike ru_maxrss not that of the process it was forked from
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))

def network(x):
    return x * torch.linspace(-1, 1, 32).view(1, 32, 1, 1, 1)

torch.set_num_threads(1)
for length in (200, 200, 800):
    shape = (64, 64, length)
    volume = np.random.default_rng(0).standard_normal((1, *shape), np.float32)
    placed = place(shape, np.eye(4), ((0, 0, 0), shape), (1.0, 1.0, 1.0))
    stream = predict_logits(volume, network, (32, 32, 16), mirror_axes=())
    labels = to_labels(stream, placed)
    print(peak(), volume.nbytes + labels.nbytes)
    assert all(np.array_equal(a, 31 * (b > 0)) for a, b in zip(labels, volume[0], strict=True))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_length():
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (_, _), (short, held), (long, all_held) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    # the logits would be 105 and 419 MB; their sums are 9
    assert long - short < all_held - held + 10e6
