"""The state dict that nnU-Net asks for: keys and shapes of the networks it built from its plans."""

import json
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from sparsemae.exporting.nnunet import architecture, state_dict
from sparsemae.planning.nnunet_plans import in_network_axes, read_plans
from sparsemae.planning.plan import build_network

INTEROP = Path(__file__).parents[1] / "interop"
RECORDED = json.loads((INTEROP / "topologies.json").read_text())


def digest(shapes):
    """As `tests/interop/record_topologies.py` has it."""
    import hashlib

    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("name", RECORDED)
def test_keys_and_shapes_are_those_nnunet_builds(tmp_path, name):
    recorded = RECORDED[name]
    for key in ("plans", "dataset_json"):
        (tmp_path / f"{key}.json").write_text(json.dumps(recorded[key]))
    planned = read_plans(tmp_path / "plans.json", tmp_path / "dataset_json.json")
    with torch.device("meta"):
        network = build_network(planned.plan, planned.num_classes, deep_supervision=True)
        state = state_dict(network, planned.axes)
        theirs = recorded["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        classes = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU}
        peer = ResidualEncoderUNet(
            input_channels=len(planned.channels),
            num_classes=recorded["heads"],
            deep_supervision=True,
            **(theirs | classes),
        ).state_dict()
    found = {key: list(tensor.shape) for key, tensor in state.items()}
    assert found == {key: list(tensor.shape) for key, tensor in peer.items()}
    assert (len(found), digest(found)) == (recorded["keys"], recorded["digest"])
    assert architecture(in_network_axes(planned.plan.topology, planned.axes)) == theirs


def test_the_recorded_networks_are_of_many_kinds():
    stages, kernels, strides, channels = set(), set(), set(), set()
    for recorded in RECORDED.values():
        found = recorded["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        stages.add(found["n_stages"])
        kernels.add(tuple(found["kernel_sizes"][0]))
        strides |= {tuple(stride) for stride in found["strides"]}
        channels.add(len(recorded["dataset_json"]["channel_names"]))
    assert stages == {4, 6, 7}
    assert kernels == {(3, 3, 3), (1, 3, 3)}
    assert strides == {(1, 1, 1), (1, 2, 2), (2, 2, 2)}
    assert channels == {1, 2, 4}
    assert RECORDED["brain"]["keys"] == 956
