"""Weights from our runs and from other people's files: what is known of them, and their axes."""

import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from sparsemae.checkpoint import Snapshot, write_checkpoint
from sparsemae.config import load_config
from sparsemae.errors import UserError
from sparsemae.planning.nnunet_plans import in_network_axes, network_axes, to_network_axes
from sparsemae.planning.plan import ChannelPlan, Plan
from sparsemae.pretrain import PretrainConfig, load_run, pretrain
from sparsemae.transfer import read_pretrained
from sparsemae.transfer.kernels import into_network_axes
from sparsemae.transfer.shapes import topology_of

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = {
    "dataset": "D", "channels": ["T1", "T2"], "classes": ["a", "b"], "path": "/secret/D",
    "train": ["case_7"], "val": [],
}  # fmt: skip
ORDERS = [(0, 1, 2), (2, 0, 1), (1, 0, 2)]  # the middle one is no involution


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """Of two steps, with averaged weights."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = ["data.patch_size=16", "data.workers=0", "data.validation=0", "train.steps=2"]
    config = load_config(PretrainConfig, "tiny", [*overrides, "train.ema=0.5"])
    pretrain(store, folder, config, console=Console(file=io.StringIO()))
    return folder


def arguments(topology):
    """nnU-Net's `arch_kwargs`."""
    return {
        "n_stages": len(topology.features),
        "features_per_stage": list(topology.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(k) for k in topology.kernels],
        "strides": [list(s) for s in topology.strides],
        "n_blocks_per_stage": list(topology.blocks),
        "n_conv_per_stage_decoder": list(topology.decoder_convs),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


def foreign(network, order):
    """The state dict of a network in nnU-Net's axes, and its topology there."""
    axes = network_axes(order)
    state = into_network_axes(network.state_dict(), axes)
    return state, in_network_axes(network.topology, axes), axes


def nnunet_plans(topology, order, axes):
    return {
        "dataset_name": "Dataset501_Heads",
        "transpose_forward": list(order),
        "configurations": {
            "3d_fullres": {
                "spacing": list(to_network_axes((0.5, 1.0, 2.0), axes)),
                "patch_size": list(to_network_axes((8, 12, 16), axes)),
                "architecture": {
                    "network_class_name": "dynamic_network_architectures.architectures.unet."
                    "ResidualEncoderUNet",
                    "arch_kwargs": arguments(topology),
                },
            }
        },
    }


def assert_holds(found, expected):
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_a_pretraining_run_gives_its_averaged_weights(run):
    found = read_pretrained(run)
    folder = max((run / "checkpoints").iterdir())
    averaged = load_file(folder / "ema.safetensors")
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, averaged[f"network.{name}"])
    assert set(found.tensors) == {
        n.removeprefix("network.") for n in averaged if n.startswith("network.")
    }
    assert found.kind == "sparsemae run"
    assert found.topology == load_run(run).mae.network.topology
    assert (found.spacing, found.patch_size) == (None, (16, 16, 16))  # voxels kept as they were
    assert found.normalization == "zscore"
    assert found.recipe["step"] == 2
    assert found.recipe["pretraining"]["model"]["preset"] == "tiny"
    assert [note.split(",")[0] for note in found.notes] == [
        "left out 4 mask tokens",
        "left out 3 densify layers",
    ]


def test_a_finetuning_run_gives_weights_and_plan(tmp_path, trained, odd, unique):
    network = trained(odd, input_channels=2, num_classes=3)
    plan = Plan(
        planner="nnunet",
        spacing=(0.5, 1.0, 2.0),
        patch_size=(8, 12, 16),
        batch_size=2,
        channels=(ChannelPlan(name="T1"), ChannelPlan(name="T2")),
        features_per_stage=network.topology.features,
        strides=network.topology.strides,
        n_blocks_per_stage=network.topology.blocks,
        kernel_sizes=network.topology.kernels,
        n_conv_per_stage_decoder=network.topology.decoder_convs,
    )
    run = tmp_path / "run"
    tensors = {"model.safetensors": unique(network), "optimizer.safetensors": {}}
    write_checkpoint(run / "checkpoints", Snapshot(7, tensors, {"task": TASK}), keep=1, best=None)
    (run / "plan.json").write_text(plan.model_dump_json())
    found = read_pretrained(run)
    assert_holds(found, unique(network))
    assert (found.kind, found.topology) == ("sparsemae run", network.topology)
    assert (found.spacing, found.patch_size) == ((0.5, 1, 2), (8, 12, 16))
    assert found.input_channels == 2
    assert found.recipe["task"] == {"dataset": "D", "channels": ["T1", "T2"], "classes": ["a", "b"]}
    assert "case_7" not in json.dumps(found.recipe)
    other = plan.model_copy(update={"features_per_stage": (4, 6, 8, 9)})
    (run / "plan.json").write_text(other.model_dump_json())
    with pytest.raises(UserError, match=r"plan.json: not the plan of the run's checkpoints"):
        read_pretrained(run)
    (run / "plan.json").write_text('{"planner": "nnunet"}')
    with pytest.raises(UserError, match=r"plan.json: config key spacing: missing"):
        read_pretrained(run)


@pytest.mark.parametrize("order", ORDERS)
def test_an_nnunet_checkpoint_comes_in_our_axes(tmp_path, trained, odd, unique, order):
    network = trained(odd)
    state, topology, axes = foreign(network, order)
    content = {
        "network_weights": state,
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.zeros(3)}}},
        "init_args": {
            "plans": nnunet_plans(topology, order, axes),
            "configuration": "3d_fullres",
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
    }
    torch.save(content, tmp_path / "checkpoint_final.pth")
    found = read_pretrained(tmp_path / "checkpoint_final.pth")
    assert_holds(found, unique(network))
    assert (found.kind, found.topology) == ("nnU-Net", network.topology)
    assert (found.spacing, found.patch_size) == ((0.5, 1, 2), (8, 12, 16))
    assert found.recipe == {"trainer": "nnUNetTrainer", "dataset": "Dataset501_Heads"}
    with pytest.raises(UserError, match=r"name the file in it, .*checkpoint_final.pth"):
        read_pretrained(tmp_path)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("decoder", [True, False])
def test_an_nnssl_checkpoint_comes_in_our_axes(tmp_path, trained, odd, unique, order, decoder):
    network = trained(odd)
    state, topology, axes = foreign(network, order)
    expected = unique(network)
    if not decoder:
        state = {name: t for name, t in state.items() if name.startswith("encoder.")}
        expected = {name: t for name, t in expected.items() if name.startswith("encoder.")}
    kwargs = arguments(topology)
    plan = {
        "dataset_name": "Dataset745_OpenMind",
        "transpose_forward": list(order),
        "configurations": {
            "onemmiso": {
                "spacing": list(to_network_axes((1.0, 1.5, 2.0), axes)),
                "patch_size": list(to_network_axes((8, 12, 16), axes)),
            }
        },
    }
    adaptation = {
        "architecture_plans": {"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": kwargs},
        "pretrain_plan": plan,
        "key_to_encoder": "encoder.stages",
    }
    file = tmp_path / "x.pth"
    torch.save({"network_weights": state, "nnssl_adaptation_plan": adaptation}, file)
    found = read_pretrained(file)
    assert_holds(found, expected)
    assert (found.kind, found.topology) == ("nnssl", network.topology)
    assert (found.spacing, found.patch_size) == ((1, 1.5, 2), (8, 12, 16))


def test_nnssl_names_its_networks(tmp_path, trained, small):
    state = trained(small).state_dict()
    file = tmp_path / "x.pth"
    for name, topology in (("ResEncL", None), ("PrimusM", "refused")):
        about = {"architecture_plans": {"arch_class_name": name}, "key_to_encoder": "eva"}
        torch.save({"network_weights": state, "nnssl_adaptation_plan": about}, file)
        if topology is None:
            assert read_pretrained(file).topology == trained(small).topology  # tensors count
        else:
            with pytest.raises(UserError, match=r"x.pth: arch_class_name: 'PrimusM'; only 3D"):
                read_pretrained(file)


def test_the_strides_of_an_encoder_alone_are_known_only_if_told(tmp_path, trained, small):
    network = trained(small)
    state = network.encoder.state_dict()
    torch.save({f"encoder.{n}": t for n, t in state.items()}, tmp_path / "x.pth")
    tensors = read_pretrained(tmp_path / "x.pth")
    assert (tensors.kind, tensors.topology) == ("state dict", None)
    told = network.topology
    assert topology_of(tensors.tensors, tmp_path, told=told) == told
    other = replace(told, blocks=(1, 1, 1))
    assert topology_of(tensors.tensors, tmp_path, told=other) is None


def test_a_state_dict_that_says_nothing_is_taken_as_nnunets(tmp_path, trained, odd, unique):
    network = trained(odd)
    state, _, _ = foreign(network, (0, 1, 2))
    torch.save(state, tmp_path / "x.pth")
    found = read_pretrained(tmp_path / "x.pth")
    assert_holds(found, unique(network))
    assert found.notes[-1] == (
        "turned kernels from axes z, y, x to x, y, z, as nnU-Net's are; the file does not say"
    )
    unshared = {k: v.clone() for k, v in state.items() if "all_modules" not in k}
    save_file({k: v for k, v in unshared.items() if ".encoder." not in k}, tmp_path / "x.bin")
    assert_holds(read_pretrained(tmp_path / "x.bin"), unique(network))


def test_a_part_of_a_network_is_no_network(tmp_path, trained):
    state = trained().state_dict()
    part = {n: t for n, t in state.items() if "stages.1.blocks.0." not in n}
    torch.save(part, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"encoder.stages.1.blocks.0 is missing: the file holds"):
        read_pretrained(tmp_path / "x.pth")


def test_parts_of_a_run_lead_to_the_run(run, tmp_path):
    step = max((run / "checkpoints").iterdir())
    with pytest.raises(UserError, match=f"a part of a checkpoint; name the run folder, {run}"):
        read_pretrained(step / "model.safetensors")
    for folder in (step, step.parent):
        with pytest.raises(UserError, match="name the run folder itself"):
            read_pretrained(folder)
    with pytest.raises(UserError, match="no run there"):
        read_pretrained(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        read_pretrained(tmp_path / "nothing")


def test_a_run_without_a_whole_checkpoint_is_an_error(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    for folder in (copy / "checkpoints").iterdir():
        (folder / "meta.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(UserError, match="no whole checkpoint"):
        read_pretrained(copy)
