"""Plans that nnU-Net 2.8.1 made, read in our axes; and what cannot be used, named by its key."""

import copy
import json
from pathlib import Path

import pytest

from sparsemae.errors import UserError
from sparsemae.planning.nnunet_plans import (
    network_axes,
    read_plans,
    to_network_axes,
    to_our_axes,
)

RECORDED = json.loads((Path(__file__).parents[1] / "interop" / "topologies.json").read_text())


@pytest.fixture
def amos():
    return copy.deepcopy(RECORDED["amos"])


def written(tmp_path, recorded):
    for name in ("plans", "dataset_json"):
        (tmp_path / f"{name}.json").write_text(json.dumps(recorded[name]))
    return tmp_path / "plans.json", tmp_path / "dataset_json.json"


@pytest.mark.parametrize("name", RECORDED)
def test_every_recorded_plan_is_read(tmp_path, name):
    recorded = RECORDED[name]
    found = read_plans(*written(tmp_path, recorded))
    theirs = recorded["plans"]["configurations"]["3d_fullres"]
    arguments = theirs["architecture"]["arch_kwargs"]
    assert list(to_network_axes(found.plan.patch_size, found.axes)) == theirs["patch_size"]
    assert list(to_network_axes(found.plan.spacing, found.axes)) == theirs["spacing"]
    for ours, key in ((found.plan.strides, "strides"), (found.plan.kernel_sizes, "kernel_sizes")):
        assert [list(to_network_axes(v, found.axes)) for v in ours] == arguments[key]
    assert list(found.plan.features_per_stage) == arguments["features_per_stage"]
    assert list(found.plan.n_blocks_per_stage) == arguments["n_blocks_per_stage"]
    assert found.plan.batch_size == theirs["batch_size"]
    assert found.num_classes == recorded["heads"]
    assert found.channels == tuple(recorded["dataset_json"]["channel_names"].values())
    total = found.plan.topology.total_stride
    assert all(p % t == 0 for p, t in zip(found.plan.patch_size, total, strict=True))


def test_thick_slices_lie_along_the_axis_they_lie_along_in_our_arrays(tmp_path):
    spacing = {}
    for name in ("amos", "sagittal", "coronal"):
        found = read_plans(*written(tmp_path, RECORDED[name]))
        spacing[name] = found.plan.spacing
        thick = found.plan.spacing.index(max(found.plan.spacing))
        assert all(k[thick] == 1 and sum(k) == 7 for k in found.plan.kernel_sizes[:1])
        assert found.plan.strides[1][thick] == 1
    assert spacing == {"amos": (0.68, 0.68, 5), "sagittal": (4, 0.6, 0.5), "coronal": (0.7, 3, 0.9)}


def test_an_order_of_axes_and_its_inverse():
    assert network_axes([0, 1, 2]) == (2, 1, 0)
    assert network_axes([2, 0, 1]) == (0, 2, 1)
    assert network_axes([1, 2, 0]) == (1, 0, 2)
    axes = network_axes([1, 2, 0])
    assert to_network_axes("xyz", axes) == ("y", "x", "z")
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        axes = network_axes(order)
        assert to_our_axes(to_network_axes("xyz", axes), axes) == ("x", "y", "z")
    for wrong in ([0, 1], [0, 1, 1], [0, 1, 3], "012", None, [0, 1, 2.0]):
        with pytest.raises(UserError, match=r"transpose_forward: .* is no order"):
            network_axes(wrong)


def test_normalisation_per_channel(tmp_path, amos):
    plan = read_plans(*written(tmp_path, amos)).plan
    (channel,) = plan.channels
    assert (channel.name, channel.normalization, channel.masked) == ("CT", "ct", False)
    values = channel.intensities
    assert (values.mean, values.std, values.low, values.high) == (100, 120, -20, 800)
    configuration = amos["plans"]["configurations"]["3d_fullres"]
    configuration |= {
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [True],
        "batch_dice": True,
    }
    plan = read_plans(*written(tmp_path, amos)).plan
    assert (plan.channels[0].normalization, plan.channels[0].masked) == ("zscore", True)
    assert plan.batch_dice


def test_plans_of_a_checkpoint_need_no_files(amos):
    found = read_plans(amos["plans"])
    assert found.channels == ("0",)
    assert found.num_classes is None


def test_a_configuration_inherits(amos):
    plans = amos["plans"]
    plans["configurations"]["big"] = {"inherits_from": "3d_fullres", "batch_size": 7}
    plans["configurations"]["bigger"] = {"inherits_from": "big", "batch_dice": True}
    found = read_plans(plans, configuration="bigger").plan
    assert (found.batch_size, found.batch_dice) == (7, True)
    assert found.patch_size == read_plans(plans).plan.patch_size
    plans["configurations"]["big"]["inherits_from"] = "bigger"
    with pytest.raises(UserError, match=r"inherits_from: leads in a circle"):
        read_plans(plans, configuration="big")


def test_plans_from_before_architectures(amos):
    plans = amos["plans"]
    configuration = plans["configurations"]["3d_fullres"]
    expected = read_plans(plans).plan
    arguments = configuration.pop("architecture")["arch_kwargs"]
    configuration |= {
        "UNet_class_name": "ResidualEncoderUNet",
        "UNet_base_num_features": 32,
        "unet_max_num_features": 320,
        "n_conv_per_stage_encoder": arguments["n_blocks_per_stage"],
        "n_conv_per_stage_decoder": arguments["n_conv_per_stage_decoder"],
        "pool_op_kernel_sizes": arguments["strides"],
        "conv_kernel_sizes": arguments["kernel_sizes"],
    }
    assert read_plans(plans).plan == expected
    configuration["UNet_class_name"] = "PlainConvUNet"
    with pytest.raises(UserError, match=r"UNet_class_name: 'PlainConvUNet', but only Residual"):
        read_plans(plans)


def test_outputs_are_counted_as_nnunet_does(tmp_path, amos):
    amos["dataset_json"]["labels"] = {"background": 0, "a": 1, "b": 2, "ignore": 3}
    assert read_plans(*written(tmp_path, amos)).num_classes == 3
    amos["dataset_json"]["labels"] = {"background": 0, "a": [1, 2], "b": [2], "ignore": 3}
    assert read_plans(*written(tmp_path, amos)).num_classes == 2


CONFIGURATION = "configurations.3d_fullres."
ARGUMENTS = f"{CONFIGURATION}architecture.arch_kwargs."
WRONG = [  # key, value (None: missing), message
    ("transpose_forward", None, "plans: transpose_forward: missing; plan again"),
    ("configurations", None, "plans: configurations: missing"),
    ("configurations.3d_fullres", None, "3d_fullres: missing; there are "),
    (f"{CONFIGURATION}spacing", None, "3d_fullres.spacing: missing"),
    (f"{CONFIGURATION}spacing", [1.0, 1.0], "spacing: a 2D configuration; take 3d_fullres"),
    (f"{CONFIGURATION}patch_size", "big", "patch_size: text where a list is expected"),
    (f"{CONFIGURATION}patch_size", [0, 8, 8], "config key patch_size"),
    (f"{CONFIGURATION}batch_size", None, "batch_size: missing"),
    (f"{CONFIGURATION}previous_stage", "3d_lowres", "the second half of a cascade"),
    (f"{CONFIGURATION}use_mask_for_norm", [], "use_mask_for_norm: 0 entries for 1 channels"),
    (
        f"{CONFIGURATION}normalization_schemes", ["RGBTo01Normalization"],
        "normalization_schemes: 'RGBTo01Normalization' of channel 0 is none of ZScore",
    ),
    ("foreground_intensity_properties_per_channel", None, r"channel.0: missing, and CTNorm"),
    (
        "foreground_intensity_properties_per_channel.0.std", None,
        "foreground_intensity_properties_per_channel.0.std: missing",
    ),
    (f"{CONFIGURATION}architecture", None, "3d_fullres.architecture: missing"),
    (
        f"{CONFIGURATION}architecture.network_class_name", "dna.PlainConvUNet",
        r"network_class_name: 'dna.PlainConvUNet', but only .* -pl nnUNetPlannerResEncL",
    ),
    (f"{ARGUMENTS}strides", None, "architecture: strides: missing"),
    (f"{ARGUMENTS}norm_op", "torch.nn.BatchNorm3d", "norm_op: 'torch.nn.BatchNorm3d', but this"),
    (f"{ARGUMENTS}norm_op_kwargs", {"eps": 1e-3}, "norm_op_kwargs: "),
    (f"{ARGUMENTS}conv_bias", False, "conv_bias: False, but this network has True"),
    (f"{ARGUMENTS}squeeze_excitation", True, "squeeze_excitation: True, a network of another"),
    (f"{ARGUMENTS}kernel_sizes", [[5, 5, 5]] * 7, "kernel_sizes: each stage takes 1 or 3"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=[f"{w[0]}={w[1]}" for w in WRONG])
def test_what_cannot_be_used_is_named(amos, key, value, message):
    *sections, leaf = key.split(".")
    node = amos["plans"]
    for section in sections:
        node = node[section]
    if value is None:
        node.pop(leaf)
    else:
        node[leaf] = value
    with pytest.raises(UserError, match=message) as error:
        read_plans(amos["plans"])
    assert str(error.value).startswith("plans: ")
    assert "\n" not in str(error.value)


def test_two_files_of_different_data_sets(tmp_path, amos):
    amos["dataset_json"]["channel_names"]["1"] = "PET"
    with pytest.raises(UserError, match=r"channel_names: 2, but .*plans.json has 1 normali"):
        read_plans(*written(tmp_path, amos))
    amos["dataset_json"]["channel_names"] = ["CT"]
    with pytest.raises(UserError, match=r'channel_names: write \{"0": NAME'):
        read_plans(*written(tmp_path, amos))
    (tmp_path / "plans.json").write_text("{")
    with pytest.raises(UserError, match=r"plans.json: not valid JSON"):
        read_plans(tmp_path / "plans.json")
    with pytest.raises(UserError, match=r"missing\.json"):
        read_plans(tmp_path / "missing.json")
