"""Which cells are hidden and scored, and refusals of what does not fit, key and remedy named."""

import re

import pytest
import torch

from sparsemae.errors import UserError
from sparsemae.kernels import BlockMask
from sparsemae.models.mae import SparseMAE
from sparsemae.models.masking import Masks, check_grid, stage_blocks
from sparsemae.models.resenc import ResEncUNet

PLAN = {"features_per_stage": (2, 2, 2), "strides": (1, 2, 2), "n_blocks_per_stage": (1, 1, 1)}


def make(cell=4, *, channels=1, classes=1, deep_supervision=False, **options):
    network = ResEncUNet(channels, classes, **PLAN, deep_supervision=deep_supervision)
    return SparseMAE(network, cell, **options)


@pytest.mark.parametrize("ratio", [0.02, 0.3, 0.75, 0.98])
@pytest.mark.parametrize("decode", ["all", "masked", 0.34, 0.001])
def test_masks_hide_and_score_the_same_number_of_cells_in_every_sample(ratio, decode):
    masks = make(decode=decode).draw_masks(5, (16, 8, 24), ratio)
    visible, scored = masks.visible.visible, masks.scored.visible
    assert visible.shape == scored.shape == (5, 4, 2, 6)
    hidden = round(48 * ratio)
    chosen = max(1, round(hidden * decode)) if isinstance(decode, float) else hidden
    assert (~visible).flatten(1).sum(1).tolist() == [hidden] * 5
    assert scored.flatten(1).sum(1).tolist() == [chosen] * 5
    assert not (visible & scored).any()
    assert len({tuple(v.flatten().tolist()) for v in visible}) > 1  # samples differ


def test_masks_follow_the_generator_and_nothing_else():
    mae = make(decode=0.5)

    def draw(seed):
        masks = mae.draw_masks(2, (16,) * 3, 0.5, generator=torch.Generator().manual_seed(seed))
        return torch.stack([masks.visible.visible, masks.scored.visible])

    torch.manual_seed(1)
    first = draw(0)
    torch.manual_seed(2)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_every_cell_is_hidden_as_often_as_asked_and_scored_as_often():
    mae = make(decode=0.5)
    masks = mae.draw_masks(4000, (8, 8, 8), 0.75)
    hidden, scored = (~masks.visible.visible).float().mean(0), masks.scored.visible.float().mean(0)
    assert (hidden - 0.75).abs().max() < 0.04  # 6 standard deviations
    assert (scored - 0.375).abs().max() < 0.05


def test_stage_blocks_are_none_where_coarser_than_the_cell_on_any_axis():
    strides = ((1, 1, 1), (2, 2, 1), (4, 4, 2))
    assert stage_blocks((4, 4, 2), strides) == [(4, 4, 2), (2, 2, 2), (1, 1, 1)]
    assert stage_blocks((8, 4, 6), strides) == [(8, 4, 6), (4, 2, 6), (2, 1, 3)]
    assert stage_blocks((4, 2, 2), strides) == [(4, 2, 2), (2, 1, 2), None]
    assert stage_blocks((1, 1, 1), strides) == [(1, 1, 1), None, None]


BAD_MODELS = {  # arguments: words of the message, the key first, then the remedy
    "cell cuts a voxel": ({"cell": 6}, "mask.block_size (6, 6, 6)", "use (4, 4, 4) or a multiple"),
    "odd cell": ({"cell": (4, 3, 4)}, "mask.block_size (4, 3, 4)", "multiple of it"),
    "no cell": ({"cell": 0}, "mask.block_size (0, 0, 0)", "positive number of voxels"),
    "two axes": ({"cell": (4, 4)}, "mask.block_size (4, 4)", "or three"),
    "half a voxel": ({"cell": (4, 4, 2.0)}, "mask.block_size", "positive number of voxels"),
    "decode word": ({"decode": "some"}, "decode 'some'", 'choose "all", "masked", or a fraction'),
    "decode 0": ({"decode": 0.0}, "decode 0.0", "a fraction in (0, 1)"),
    "decode 1": ({"decode": 1.0}, "decode 1.0", "a fraction in (0, 1)"),
    "decode nan": ({"decode": float("nan")}, "decode nan", "a fraction in (0, 1)"),
    "decode True": ({"decode": True}, "decode True", "a fraction in (0, 1)"),
    "no levels": ({"decode_levels": 0}, "decode_levels 0", "choose from 1 to 2"),
    "too many levels": ({"decode_levels": 3}, "decode_levels 3", "choose from 1 to 2"),
    "cell finer than a restricted level": (
        {"cell": 2, "decode": "masked"},
        "decode 'masked'",
        'use larger cells or decode = "all"',
    ),
    "deep supervision": ({"deep_supervision": True}, "deep_supervision", "turn it off"),
    "classes": ({"classes": 3}, "num_classes: the network takes 1", "not 3"),
    "channels": ({"channels": 2}, "num_classes: the network takes 2", "not 1"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_arguments_name_key_and_remedy(case):
    arguments, key, remedy = BAD_MODELS[case]
    with pytest.raises(UserError, match=re.escape(remedy)) as error:
        make(**arguments)
    assert str(error.value).startswith(key)
    assert "\n" not in str(error.value)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'cudnn'; choose from auto"):
        make(backend="cudnn")


@pytest.mark.parametrize(
    ("patch", "cell", "ratio", "key", "remedy"),
    [
        ((30, 32, 32), 8, 0.5, "data.patch_size (30, 32, 32)", "(24, 32, 32) and (32, 32, 32)"),
        ((4, 32, 32), 8, 0.5, "data.patch_size (4, 32, 32)", "(8, 32, 32) and (8, 32, 32)"),
        ((8, 8, 8), 4, 0.0, "mask.ratio 0.0", "choose one from 0.125 to 0.875"),
        ((8, 8, 8), 4, 1.0, "mask.ratio 1.0", "choose one from 0.125 to 0.875"),
        ((8, 8, 8), 4, 0.05, "mask.ratio 0.05", "or a larger patch"),
        ((8, 8, 8), 4, 0.96, "mask.ratio 0.96", "or a larger patch"),
        ((8, 8, 8), 4, float("nan"), "mask.ratio nan", "choose one from"),
        ((4, 4, 4), 4, 0.5, "data.patch_size (4, 4, 4)", "smaller mask.block_size"),
    ],
)
def test_grids_that_cannot_be_name_key_and_remedy(patch, cell, ratio, key, remedy):
    with pytest.raises(UserError, match=re.escape(remedy)) as error:
        make(cell).draw_masks(1, patch, ratio)
    assert str(error.value).startswith(key)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("patch", [(8, 4, 4), (12, 4, 4), (8, 8, 8), (28, 20, 12), (60, 60, 60)])
def test_the_ratios_a_refusal_names_are_accepted(patch):
    with pytest.raises(UserError) as error:
        check_grid(patch, (4, 4, 4), 1.0)
    low, high = re.search(r"from (\S+) to ([\d.]+)", str(error.value)).groups()
    for ratio in map(float, (low, high)):
        check_grid(patch, (4, 4, 4), ratio)


def test_more_samples_than_masks_are_refused():
    mae = make()
    masks = mae.draw_masks(2, (8, 8, 8), 0.5)
    with pytest.raises(ValueError, match="a mask of 2 samples"):
        mae(torch.zeros(3, 1, 8, 8, 8), masks)


def test_scored_cells_must_be_masked():
    visible = BlockMask.random(1, (2, 2, 2), 0.5)
    with pytest.raises(ValueError, match="scored cells must be masked"):
        Masks(visible, visible)


def test_a_cell_is_the_total_stride_unless_told():
    assert SparseMAE(ResEncUNet.from_preset("tiny")).block_size == (8, 8, 8)
