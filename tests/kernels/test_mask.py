"""BlockMask: which blocks are visible, and who neighbours whom."""

import itertools

import pytest
import torch

from sparsemae.kernels import BlockMask

GRID = (2, 3, 4)


def uneven() -> BlockMask:
    """Three samples: all, some, and none of their blocks visible."""
    visible = torch.rand(3, *GRID) < 0.5
    visible[0], visible[2] = True, False
    return BlockMask.from_visible(visible)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.25, 0.6, 0.75, 0.9, 1.0])
def test_random_hides_the_same_number_in_every_sample(mask_ratio):
    mask = BlockMask.random(3, GRID, mask_ratio)
    keep = 24 - round(24 * mask_ratio)
    assert mask.counts == (keep,) * 3
    assert mask.visible.flatten(1).sum(1).tolist() == [keep] * 3
    assert len(mask) == 3 * keep
    assert (mask.batch_size, mask.grid) == (3, GRID)


def test_random_follows_its_generator_only():
    first, second = (
        BlockMask.random(2, GRID, 0.5, generator=torch.Generator().manual_seed(7)).visible
        for _ in range(2)
    )
    assert torch.equal(first, second)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    BlockMask.random(2, GRID, 0.5, generator=torch.Generator())
    assert torch.equal(torch.rand(1), expected)


def test_samples_of_a_batch_and_successive_masks_differ():
    mask = BlockMask.random(2, (4, 4, 4), 0.5)
    assert not torch.equal(mask.visible[0], mask.visible[1])
    assert not torch.equal(mask.visible, BlockMask.random(2, (4, 4, 4), 0.5).visible)


def test_random_reaches_every_block_equally_often():
    share = BlockMask.random(2000, (2, 2, 2), 0.75).visible.float().mean(0)
    assert share == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.01, float("nan")])
def test_impossible_ratio(mask_ratio):
    with pytest.raises(ValueError, match=r"mask_ratio must lie in \[0, 1\], got"):
        BlockMask.random(1, GRID, mask_ratio)


@pytest.mark.parametrize("visible", [torch.ones(1, 2, 2, 2), torch.ones(2, 2, 2).bool()])
def test_visible_is_a_boolean_batch(visible):
    with pytest.raises(ValueError, match=r"visible must be bool \[batch, d, h, w\], got torch\."):
        BlockMask.from_visible(visible)


def test_coords_are_in_the_order_of_nonzero():
    mask = uneven()
    assert torch.equal(mask.coords.long(), mask.visible.nonzero())
    assert mask.counts == (24, mask.counts[1], 0)
    assert 0 < mask.counts[1] < 24


def test_neighbors_against_a_loop():
    mask = uneven()
    position = {tuple(c): n for n, c in enumerate(mask.coords.tolist())}
    steps = list(itertools.product((-1, 0, 1), repeat=3))  # in the order of a kernel's taps
    expected = [
        [position.get((b, d + i, h + j, w + k), -1) for i, j, k in steps]
        for b, d, h, w in mask.coords.tolist()
    ]
    assert mask.neighbors.tolist() == expected
    assert mask.neighbors.dtype == torch.int32
    assert mask.neighbors[:, 13].tolist() == list(range(len(mask)))


def test_hidden_is_the_complement():
    mask = uneven()
    hidden = mask.hidden()
    assert torch.equal(hidden.visible, ~mask.visible)
    assert hidden.counts == tuple(24 - n for n in mask.counts)
    assert torch.equal(hidden.hidden().neighbors, mask.neighbors)


@pytest.mark.parametrize("fraction", [0.01, 1 / 3, 0.5, 1.0])
def test_sample_takes_a_fraction_of_the_visible(fraction):
    mask = uneven()
    part = mask.sample(fraction)
    assert not (part.visible & ~mask.visible).any()
    assert part.counts == tuple(min(n, max(1, round(n * fraction))) for n in mask.counts)
    again = mask.sample(fraction, generator=torch.Generator().manual_seed(3))
    same = mask.sample(fraction, generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.visible, same.visible)


@pytest.mark.parametrize("fraction", [0.0, -1.0, 1.5])
def test_impossible_fraction(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\], got"):
        uneven().sample(fraction)


def test_voxels_widen_every_axis_by_its_own_width():
    mask, (bd, bh, bw) = uneven(), (1, 2, 3)
    voxels = mask.voxels((bd, bh, bw))
    assert voxels.shape == (3, 1, 2, 6, 12)
    assert voxels.dtype == torch.bool
    for b, d, h, w in itertools.product(range(3), range(2), range(6), range(12)):
        assert voxels[b, 0, d, h, w] == mask.visible[b, d // bd, h // bh, w // bw]


def test_block_of():
    mask = uneven()
    assert mask.block_of((3, 5, 2, 6, 12)) == (1, 2, 3)
    for size in ((3, 6, 12), (1, 6, 12), (0, 6, 12)):
        with pytest.raises(ValueError, match=r"voxels does not tile onto a grid of \(2, 3, 4\)"):
            mask.block_of((3, 5, *size))


def test_to():
    mask = uneven()
    mask.tables["built"] = "here"
    assert mask.to("cpu") is mask
    moved = mask.to("meta")
    assert {t.device.type for t in (moved.visible, moved.coords, moved.neighbors)} == {"meta"}
    assert moved.counts == mask.counts
    assert moved.tables == {}
    assert moved.to("meta") is moved
