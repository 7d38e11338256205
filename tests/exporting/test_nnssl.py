"""The adaptation plan beside nnssl's weights: what its readers look for, in their types."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsemae.export import export
from sparsemae.exporting.nnssl import adaptation_plan
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import PRESETS, Topology
from sparsemae.transfer import Pretrained, read_pretrained

STEM = "encoder.stem.convs.0.conv.weight"
L = Topology.parse(*PRESETS["L"].values(), 3, 1)
ODD = Topology.parse((4, 6, 8), (1, (1, 2, 2), 2), (1, 2, 1), ((1, 3, 3), 3, 3), 1)


@pytest.fixture
def source():
    def make(topology, **facts):
        return Pretrained(
            Path("run"), "sparsemae run", {STEM: torch.zeros(4, 1, 3, 3, 3)}, topology, **facts
        )

    return make


def test_resenc_l_has_a_name(source):
    plan = adaptation_plan(
        source(L, spacing=(1.0, 1.0, 1.0), patch_size=(160, 128, 96)), L, (2, 1, 0)
    )
    assert plan["architecture_plans"] == {
        "arch_class_name": "ResEncL",
        "arch_kwargs": None,
        "arch_kwargs_requiring_import": None,
    }
    assert plan["pretrain_num_input_channels"] == 1
    assert plan["recommended_downstream_patchsize"] == [96, 128, 160]
    pretraining = plan["pretrain_plan"]
    ((name, used),) = pretraining["configurations"].items()
    assert name == used["spacing_style"] == "onemmiso"
    assert (used["spacing"], used["patch_size"]) == ([1.0, 1.0, 1.0], [96, 128, 160])
    assert used["normalization_schemes"] == ["ZScoreNormalization"]
    assert pretraining["transpose_forward"] == [0, 1, 2]


def test_other_networks_are_described(source):
    facts = {"spacing": (0.5, 1.0, 2.0), "patch_size": (8, 16, 24), "normalization": "ct"}
    plan = adaptation_plan(source(ODD, **facts), ODD, (1, 0, 2))
    architecture = plan["architecture_plans"]
    assert architecture["arch_class_name"] == "ResidualEncoderUNet"
    kwargs = architecture["arch_kwargs"]
    assert kwargs["strides"] == [[1, 1, 1], [2, 1, 2], [2, 2, 2]]
    assert kwargs["kernel_sizes"][0] == [3, 1, 3]
    assert set(architecture["arch_kwargs_requiring_import"]) <= kwargs.keys()
    pretraining = plan["pretrain_plan"]
    ((_, used),) = pretraining["configurations"].items()
    assert (used["spacing"], used["patch_size"]) == ([1.0, 0.5, 2.0], [16, 8, 24])
    assert used["spacing_style"] == "median"
    assert used["normalization_schemes"] == ["CTNormalization"]
    forward, backward = pretraining["transpose_forward"], pretraining["transpose_backward"]
    assert forward == [1, 2, 0]
    assert [forward[i] for i in backward] == [0, 1, 2]


def test_voxels_of_various_sizes_are_said_to_be(source):
    ((name, used),) = adaptation_plan(source(L), L, (2, 1, 0))["pretrain_plan"][
        "configurations"
    ].items()
    assert (name, used["spacing"]) == ("noresample", None)
    assert used["patch_size"] == [160, 160, 160]


def test_the_keys_lead_to_tensors_and_the_file_loads_without_code(tmp_path, source):
    network = ResEncUNet(1, 1, ODD.features, ODD.strides, ODD.blocks, ODD.kernels)
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    torch.save({f"x.{n}": t for n, t in tensors.items()}, tmp_path / "x.pth")
    pretrained = read_pretrained(tmp_path / "x.pth")
    export(tmp_path / "x.pth", "nnssl", tmp_path / "hub")
    assert sorted(p.name for p in (tmp_path / "hub").iterdir()) == [
        "adaptation_plan.json",
        "checkpoint_final.pth",
        "config.json",
    ]
    content = torch.load(tmp_path / "hub" / "checkpoint_final.pth", weights_only=True)
    plan, state = content["nnssl_adaptation_plan"], content["network_weights"]
    assert json.loads((tmp_path / "hub" / "adaptation_plan.json").read_text()) == plan
    assert any(name.startswith(plan["key_to_encoder"]) for name in state)
    assert any(name.startswith(plan["key_to_stem"]) for name in state)
    assert all(f"{key}.weight" in state for key in plan["keys_to_in_proj"])
    told = plan["architecture_plans"]["arch_kwargs"]["kernel_sizes"]
    stages = [state[f"encoder.stages.{s}.blocks.0.conv1.conv.weight"].shape[2:] for s in range(3)]
    assert [list(shape) for shape in stages] == told
    del content["sparsemae"]  # what others' files lack
    torch.save(content, tmp_path / "theirs.pth")
    found = read_pretrained(tmp_path / "theirs.pth")
    assert found.topology == pretrained.topology
    assert all(torch.equal(t, pretrained.tensors[n]) for n, t in found.tensors.items())
    assert replace(found, notes=()).kind == "nnssl"
