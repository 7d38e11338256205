"""Plans equal those that nnU-Net's own planners made of the same fingerprints, axis by axis."""

import json
from pathlib import Path

import pytest
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from sparsemae.errors import UserError
from sparsemae.models.topology import PRESETS, Topology
from sparsemae.planning.cost import feature_map_size
from sparsemae.planning.fingerprint import CaseFingerprint, ChannelFingerprint, Fingerprint
from sparsemae.planning.planner import network_axes, plan_nnunet
from sparsemae.planning.pooling import pool
from sparsemae.planning.rules import median_spacing
from sparsemae.segmentation.dataset import Classes, Dataset, SegCase

RECORDED = json.loads(Path(__file__).with_name("nnunet_plans.json").read_text())
SCHEMES = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale",
}


def fingerprint(spacings, shapes, relative_size=1.0, channels=1):
    cases = [
        CaseFingerprint(id=f"c{i}", spacing=tuple(mm), shape=tuple(n), relative_size=relative_size)
        for i, (mm, n) in enumerate(zip(spacings, shapes, strict=True))
    ]
    channel = ChannelFingerprint(
        mean=50.0, std=20.0, median=48.0, low=-5.0, high=150.0, minimum=-9.0, maximum=200.0
    )
    return Fingerprint(cases=tuple(cases), channels=(channel,) * channels)


def dataset(channels=("T1w",), labels=2, cases=20, ignore=None):
    names = tuple(f"class{i}" for i in range(labels))
    training = tuple(SegCase(f"c{i}", ()) for i in range(cases))
    return Dataset(Path("D"), "Dataset001_D", tuple(channels), Classes(names, ignore), training)


def recorded(name):
    """Fingerprint, data set and preset of a record; its axes z, y, x turned to ours."""
    given = RECORDED[name]["given"]
    turned = [[row[::-1] for row in given[key]] for key in ("spacings", "shapes")]
    channels = given["channels"]
    found = fingerprint(*turned, given["relative_size"], len(channels))
    return found, dataset(channels, given["labels"], len(turned[0])), given["preset"]


@pytest.mark.parametrize("name", RECORDED)
def test_plans_are_nnunets(name):
    found, data, preset = recorded(name)
    plan = plan_nnunet(found, data, preset=preset)
    planned = RECORDED[name]["planned"]
    axes = tuple(2 - axis for axis in planned["transpose_forward"])
    assert network_axes(plan.spacing) == axes

    def theirs(triple):
        return [triple[axis] for axis in axes]

    assert theirs(plan.patch_size) == planned["patch_size"]
    assert theirs(plan.spacing) == pytest.approx(planned["spacing"], rel=1e-12)
    assert list(map(theirs, plan.strides)) == planned["strides"]
    assert list(map(theirs, plan.kernel_sizes)) == planned["kernel_sizes"]
    for key in ("features_per_stage", "n_blocks_per_stage", "n_conv_per_stage_decoder"):
        assert list(getattr(plan, key)) == planned[key]
    assert plan.batch_size == planned["batch_size"]
    assert plan.batch_dice == planned["batch_dice"] == planned["lowres"]
    schemes = [SCHEMES[scheme] for scheme in planned["normalization_schemes"]]
    assert [channel.normalization for channel in plan.channels] == schemes
    assert [channel.masked for channel in plan.channels] == planned["use_mask_for_norm"]
    assert [channel.name for channel in plan.channels] == list(data.channels)
    assert all(channel.intensities.high == 150 for channel in plan.channels)


def test_the_records_cover_what_varies():
    planned = [record["planned"] for record in RECORDED.values()]
    assert {len(p["strides"]) for p in planned} >= {4, 5, 6, 7}
    assert {tuple(p["kernel_sizes"][0]) for p in planned} >= {(3, 3, 3), (1, 3, 3)}
    assert {p["lowres"] for p in planned} == {True, False}
    turned = {tuple(p["transpose_forward"]) for p in planned}
    assert turned == {(0, 1, 2), (1, 0, 2), (2, 0, 1)}
    assert {s for p in planned for s in p["normalization_schemes"]} == set(SCHEMES)
    assert {m for p in planned for m in p["use_mask_for_norm"]} == {True, False}


NETWORKS = [
    (PRESETS["L"]["features_per_stage"], PRESETS["L"]["strides"], (1, 3, 4, 6, 6, 6), 3, 1),
    ((4, 8, 8), (1, (1, 2, 2), 2), (1, 2, 1), 3, (2, 3)),
    ((8, 8, 16), (1, (1, 1, 1), (2, 1, 2)), (2, 1, 1), ((1, 3, 3), 3, 3), 2),
]


@pytest.mark.parametrize("numbers", NETWORKS)
@pytest.mark.parametrize("patch_size", [(32, 64, 96), (64, 32, 40)])
def test_cost_is_the_peers(numbers, patch_size):
    features, strides, blocks, kernels, convs = numbers
    peer = ResidualEncoderUNet(
        2, len(features), features, nn.Conv3d, kernels, strides, blocks, 7, convs,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    cost = feature_map_size(Topology.parse(*numbers), patch_size, 7)
    assert cost == peer.compute_conv_feature_map_size(patch_size)


def test_the_ignored_label_is_an_output_of_nnunets():
    found = fingerprint([[1, 1, 1]] * 3, [[64, 64, 64]] * 3)
    batches = []
    for labels, ignore in ((2, None), (2, 2), (3, None)):
        data = dataset(labels=labels, ignore=ignore, cases=9999)
        batches.append(plan_nnunet(found, data, memory_gb=2_000).batch_size)
    assert batches[1] == batches[2] < batches[0] < 9999


def test_a_given_spacing_moves_everything_and_our_axes_stay():
    found = fingerprint([[1, 1, 1]] * 4, [[120, 160, 200]] * 4)
    plan = plan_nnunet(found, dataset(), spacing=(4, 1, 1), preset="M")
    assert plan.spacing == (4, 1, 1)
    assert plan.patch_size[0] == 30 or plan.patch_size[0] == 32
    assert plan.strides[1][0] == 1
    assert plan.strides[1][1:] == (2, 2)
    assert plan.kernel_sizes[0] == (1, 3, 3)


def test_a_given_patch_decides_the_network_and_batch():
    found = fingerprint([[1, 1, 1]] * 9, [[120, 160, 200]] * 9)
    plan = plan_nnunet(found, dataset(), patch_size=(48, 64, 80))
    assert plan.patch_size == (48, 64, 80)
    assert plan.strides[1:] == ((2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2))
    assert plan.batch_size > plan_nnunet(found, dataset()).batch_size
    assert plan_nnunet(found, dataset(), batch_size=1).batch_size == 1
    assert plan_nnunet(found, dataset(cases=1), patch_size=(96, 96, 96)).batch_size == round(
        120 * 160 * 200 / 96**3
    )


def test_less_memory_gives_a_smaller_patch():
    found = fingerprint([[1, 1, 1]] * 9, [[160, 190, 160]] * 9)
    usual, small = plan_nnunet(found, dataset()), plan_nnunet(found, dataset(), memory_gb=6)
    for a, b in zip(small.patch_size, usual.patch_size, strict=True):
        assert a < b
    numbers = small.topology
    assert feature_map_size(numbers, small.patch_size, 2) <= 2_100_000_000 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "S"}, r"preset 'S': choose from M, L, XL"),
        ({"memory_gb": 0}, r"memory_gb 0: give a positive number"),
        ({"memory_gb": 1e-5}, r"larger patch_size or more memory_gb"),
        ({"spacing": (1, 1, 0)}, r"spacing \[1, 1, 0\]: give three positive numbers of mm"),
        ({"spacing": (1, 1)}, r"spacing \[1, 1\]: give three"),
        ({"spacing": (30, 30, 30)}, r"patch_size: too few voxels along the finest axis"),
        ({"patch_size": (0, 32, 32)}, r"patch_size \[0, 32, 32\]: give three positive numbers"),
        ({"patch_size": (100, 160, 96)}, r"multiples of \(16, 16, 16\).* is \(96, 160, 96\)$"),
        ({"patch_size": (40, 70, 96)}, r"multiples of \(8, 16, 16\).* is \(40, 64, 96\)$"),
        ({"batch_size": 0}, r"batch_size 0: give a whole number from 1"),
    ],
)
def test_impossible_wishes(options, message):
    found = fingerprint([[1, 1, 1]] * 3, [[120, 160, 130]] * 3)
    with pytest.raises(UserError, match=message):
        plan_nnunet(found, dataset(), **options)


def test_the_nearest_patch_is_one_that_is_taken():
    found = fingerprint([[1, 0.7, 3]] * 3, [[120, 160, 30]] * 3)
    for patch in [(47, 33, 9), (100, 101, 13), (9, 200, 17), (65, 63, 5), (24, 17, 17)]:
        with pytest.raises(UserError, match=r"the nearest is \((.*)\)$") as raised:
            plan_nnunet(found, dataset(), patch_size=patch)
        nearest = tuple(map(int, str(raised.value).rpartition("(")[2][:-1].split(",")))
        assert plan_nnunet(found, dataset(), patch_size=nearest).patch_size == nearest


def test_channels_and_their_fingerprint_belong_together():
    found = fingerprint([[1, 1, 1]], [[64, 64, 64]])
    with pytest.raises(UserError, match="2 channels, but its fingerprint has 1"):
        plan_nnunet(found, dataset(("T1", "T2")))
    with pytest.raises(UserError, match="channel_names: RGB_to_0_1 is for colour pictures"):
        plan_nnunet(found, dataset(("RGB_to_0_1",)))


def test_target_spacing_by_hand():
    thick = [[1.0, 1.2, z] for z in (10, 10, 10, 10, 10, 10, 10, 10, 8, 4, 10)]
    shape = [[190, 200, 20]] * 11
    assert median_spacing(fingerprint(thick, shape)) == (1.0, 1.2, 8)  # the tenth percentile
    assert median_spacing(fingerprint(thick, [[190, 200, 70]] * 11)) == (1.0, 1.2, 10)  # not flat
    fine = [[1.0, 1.2, z] for z in (10, 10, 10, 10, 10, 10, 10, 10, 0.5, 0.4, 10)]
    assert median_spacing(fingerprint(fine, shape)) == pytest.approx((1.0, 1.2, 1.20001), rel=1e-12)
    assert median_spacing(fingerprint([[1, 1, 1], [2, 1, 3]], shape[:2])) == (1.5, 1, 2)


def test_pooling_by_hand():
    found = pool((5.0, 1.0, 1.0), (20, 64, 50.5))
    # y and z alone, to 4 mm; all, to 10, 8 and 8 mm; x and y, since 7 voxels are too few; 5, 4, 7
    assert found.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 1))
    assert found.kernels == ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3), (3, 3, 3))
    assert found.divisor == (4, 16, 8)
    assert found.patch_size == (20, 64, 56)
    alone = pool((1.0, 3.0, 3.0), (20, 6, 6))  # one axis alone is halved from 12 voxels on
    assert alone.strides == ((1, 1, 1), (2, 1, 1))
    assert pool((1.0, 3.0, 3.0), (24, 6, 6)).strides == ((1, 1, 1), (2, 1, 1), (2, 1, 1))


def test_pooling_at_its_edges():
    # 15 voxels become 8, which can be halved again; spacings of a ratio of 2 are not alike
    assert pool((1, 1, 1), (15, 15, 15)).divisor == (4, 4, 4)
    assert pool((2, 1, 1), (16, 16, 16)).strides[1] == (1, 2, 2)
    assert pool((1.99, 1, 1), (16, 16, 16)).strides[1] == (2, 2, 2)
    # x is the finest, but short: the others are halved without it, and their kernels stay flat
    short = pool((1.0, 3.0, 3.0), (7, 16, 16))
    assert short.strides == ((1, 1, 1), (1, 2, 2), (1, 2, 2))
    assert short.kernels == ((3, 1, 1), (3, 1, 1), (3, 3, 3))
