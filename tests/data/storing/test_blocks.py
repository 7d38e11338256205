import itertools

import numpy as np
import pytest

from sparsemae.data.storing.blocks import decode_blocks, encode_blocks


def naive(foreground):
    """At least half of a block's own voxels; any, where no block has that many."""
    grid = [-(-n // 16) for n in foreground.shape]
    half, some = np.zeros(grid, bool), np.zeros(grid, bool)
    for i, j, k in itertools.product(*map(range, grid)):
        block = foreground[i * 16 :, j * 16 :, k * 16 :][:16, :16, :16]
        half[i, j, k], some[i, j, k] = block.mean() >= 0.5, block.any()
    return half if half.any() else some


@pytest.mark.parametrize("shape", [(16, 16, 16), (33, 20, 47), (5, 64, 1), (70, 48, 31)])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_a_map_survives_its_text(shape, share):
    rng = np.random.default_rng(0)
    coarse = rng.random([-(-n // 8) for n in shape]) < share
    foreground = np.kron(coarse, np.ones((8, 8, 8), bool))[tuple(map(slice, shape))]
    text = encode_blocks(foreground)
    assert np.array_equal(decode_blocks(text, shape), naive(foreground))
    assert text == encode_blocks(foreground.copy(order="F"))
    assert text.isascii()
    assert not set(text) & set("\"'\\\n, ")


def test_exactly_half_is_enough_and_one_voxel_less_is_not():
    foreground = np.zeros((32, 16, 16), bool)
    foreground[:8] = True
    foreground[16:25] = True
    assert decode_blocks(encode_blocks(foreground), (32, 16, 16)).ravel().tolist() == [True, True]
    foreground[0, 0, 0] = False
    assert decode_blocks(encode_blocks(foreground), (32, 16, 16)).ravel().tolist() == [False, True]


def test_no_foreground_is_no_block():
    assert not decode_blocks(encode_blocks(np.zeros((20, 20, 20), bool)), (20, 20, 20)).any()


def test_a_head_takes_few_characters():
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in (182, 218, 182)), indexing="ij")
    assert len(encode_blocks(sum(x * x for x in grid) < 0.8)) < 200


@pytest.mark.parametrize("text", ["", "x", "not a map", encode_blocks(np.ones((64, 64, 64), bool))])
def test_another_volumes_map_is_refused(text):
    with pytest.raises(ValueError, match=r"not a map of blocks of a volume of \(160, 20, 20\)"):
        decode_blocks(text, (160, 20, 20))
