"""Plans around a pre-trained network keep it, its spacing and its patch, as far as images allow."""

import json
from pathlib import Path

import pytest

from sparsemae.errors import UserError
from sparsemae.models.topology import PRESETS, Topology
from sparsemae.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from sparsemae.planning.like_pretrained import Reference, plan_like_pretrained
from sparsemae.planning.plan import Plan, build_network
from sparsemae.segmentation.dataset import Classes, Dataset, SegCase

TINY = Topology.parse(**PRESETS["tiny"], kernel_sizes=3, n_conv_per_stage_decoder=1)
LARGE = Topology.parse(**PRESETS["L"], kernel_sizes=3, n_conv_per_stage_decoder=1)
FLAT = Topology.parse((8, 16, 16), (1, (2, 2, 1), (2, 1, 1)), (1, 1, 1), (3, (3, 1, 3), 3), (2, 1))
OPENMIND = Reference(LARGE, (160, 160, 160), (1.0, 1.0, 1.0))


def data(shape, spacing=(1.0, 1.0, 1.0), channels=("T1w",)):
    case = CaseFingerprint(id="c", spacing=spacing, shape=shape, relative_size=0.5)
    channel = ChannelFingerprint(
        mean=50.0, std=20.0, median=48.0, low=-5.0, high=150.0, minimum=-9.0, maximum=200.0
    )
    dataset = Dataset(
        Path("D"), "Dataset001_D", channels, Classes(("background", "one")), (SegCase("c", ()),)
    )
    return Fingerprint(cases=(case,), channels=(channel,) * len(channels)), dataset


def test_the_network_is_the_pretrained_one():
    reference = Reference(FLAT, (64, 32, 40), (0.8, 1.0, 1.2))
    plan = plan_like_pretrained(*data((128, 128, 128)), reference)
    assert plan.planner == "like_pretrained"
    assert plan.topology == FLAT
    assert (plan.spacing, plan.patch_size, plan.batch_size) == ((0.8, 1, 1.2), (64, 32, 40), 2)
    assert build_network(plan, 2, deep_supervision=False).topology == FLAT
    assert Plan.model_validate_json(json.dumps(plan.model_dump(mode="json"))) == plan


@pytest.mark.parametrize(
    ("shape", "spacing", "patch_size"),
    [
        ((200, 200, 200), (1.0, 1.0, 1.0), (160, 160, 160)),
        ((140, 180, 129), (1.0, 1.0, 1.0), (160, 160, 160)),
        ((128, 97, 96), (1.0, 1.0, 1.0), (128, 128, 96)),
        ((35, 50, 65), (1.0, 1.0, 1.0), (64, 64, 96)),  # two steps of 32 at least
        ((256, 216, 10), (1.5, 1.5, 10.0), (160, 160, 128)),  # 384 x 324 x 100 at 1 mm
        ((128, 200, 200), (0.5, 1.0, 1.0), (64, 160, 160)),
    ],
)
def test_no_axis_is_longer_than_the_median_image(shape, spacing, patch_size):
    assert plan_like_pretrained(*data(shape, spacing), OPENMIND).patch_size == patch_size


def test_a_small_pretraining_patch_stays():
    reference = Reference(TINY, (8, 8, 32), (1.0, 1.0, 1.0))
    assert plan_like_pretrained(*data((9, 64, 20)), reference).patch_size == (8, 8, 24)


def test_without_a_spacing_of_its_own_the_median_is_taken():
    reference = Reference(LARGE, (160, 160, 160))
    plan = plan_like_pretrained(*data((256, 216, 10), (1.5, 1.5, 10.0)), reference)
    assert plan.spacing == (1.5, 1.5, 10)
    assert plan.patch_size == (160, 160, 64)


def test_channels_go_by_their_names():
    plan = plan_like_pretrained(*data((64, 64, 64), channels=("CT", "PET")), OPENMIND)
    assert [c.normalization for c in plan.channels] == ["ct", "zscore"]
    assert [c.masked for c in plan.channels] == [False, True]
    assert plan.channels[0].intensities.low == -5
    assert (
        build_network(plan, 2, deep_supervision=False).encoder.stem.convs[0].conv.in_channels == 2
    )


def test_batch_dice_for_large_images():
    seven, nine = ((n * 80, 160, 320) for n in (7, 9))  # an eighth is covered at 8
    assert not plan_like_pretrained(*data(seven), OPENMIND).batch_dice
    assert plan_like_pretrained(*data(nine), OPENMIND).batch_dice


def test_wishes():
    given = data((128, 128, 128))
    plan = plan_like_pretrained(
        *given, OPENMIND, spacing=(1, 1, 2), patch_size=(64, 96, 32), batch_size=5
    )
    assert (plan.spacing, plan.patch_size, plan.batch_size) == ((1, 1, 2), (64, 96, 32), 5)
    with pytest.raises(UserError, match=r"multiples of \(32, 32, 32\).*nearest is \(64, 96, 32\)"):
        plan_like_pretrained(*given, OPENMIND, patch_size=(70, 90, 3))
    with pytest.raises(UserError, match="the pre-training's patch_size"):
        plan_like_pretrained(*given, Reference(LARGE, (96, 100, 96)))
    with pytest.raises(UserError, match="batch_size 0"):
        plan_like_pretrained(*given, OPENMIND, batch_size=0)
    with pytest.raises(UserError, match="spacing"):
        plan_like_pretrained(*given, OPENMIND, spacing=(1, -1, 1))
