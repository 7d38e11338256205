"""Weights that leave come back bit for bit, in every form; nothing that exists is lost."""

import copy
import io
import json
from pathlib import Path

import pytest
import safetensors
import torch
from rich.console import Console

from sparsemae.config import load_config
from sparsemae.errors import UserError
from sparsemae.export import export
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import PRESETS
from sparsemae.planning.nnunet_plans import read_plans, to_network_axes
from sparsemae.pretrain import PretrainConfig, pretrain
from sparsemae.transfer import read_pretrained
from sparsemae.transfer.kernels import from_network_axes

pytestmark = pytest.mark.usefixtures("one_thread")
RECORDED = json.loads((Path(__file__).parents[1] / "interop" / "topologies.json").read_text())


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    overrides = ["data.patch_size=16", "data.workers=0", "data.validation=0", "train.steps=2"]
    config = load_config(PretrainConfig, "tiny", [*overrides, "data.patch_size=[16,24,16]"])
    pretrain(store, folder, config, console=Console(file=io.StringIO()))
    return folder


@pytest.fixture
def thin(tmp_path):
    """Files of recorded plans with `tiny`'s widths and blocks, and one block more."""

    def write(name):
        recorded = copy.deepcopy(RECORDED[name])
        found = recorded["plans"]["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        for key, more in (("features_per_stage", (16, 16, 16)), ("n_blocks_per_stage", (2, 2, 2))):
            found[key] = [*PRESETS["tiny"][key], *more][: found["n_stages"]]
        found["n_blocks_per_stage"][1] = 2
        for key in ("plans", "dataset_json"):
            (tmp_path / f"{key}.json").write_text(json.dumps(recorded[key]))
        return tmp_path / "plans.json", tmp_path / "dataset_json.json"

    return write


def assert_same_weights(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert torch.equal(found.tensors[name], tensor), name


def assert_aliases_are_one(state):
    for name, tensor in state.items():
        plain = name.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")
        plain = plain.removeprefix("decoder.") if ".encoder." in plain else plain
        assert tensor.data_ptr() == state[plain].data_ptr(), name


@pytest.mark.parametrize("format", ["nnunet", "nnssl", "safetensors"])
def test_whole_networks_come_back(tmp_path, run, format):
    before = read_pretrained(run)
    table = export(run, format, tmp_path / "new" / "weights.bin")
    found = read_pretrained(tmp_path / "new" / "weights.bin")
    assert_same_weights(found, before)
    for name in ("topology", "spacing", "patch_size", "normalization", "recipe"):
        assert getattr(found, name) == getattr(before, name), name
    kinds = {"nnunet": "nnU-Net", "nnssl": "nnssl", "safetensors": "sparsemae safetensors"}
    assert found.kind == kinds[format]
    assert (table.total("adapted"), table.total("fresh"), table.unused) == (0, 0, ())
    assert table.total("copied") == sum(t.numel() for t in before.tensors.values())
    again = export(run, format, tmp_path / "again.bin")
    assert again.summary() == table.summary()
    assert (tmp_path / "again.bin").read_bytes() == (tmp_path / "new/weights.bin").read_bytes()


def test_an_encoder_comes_back(tmp_path, run):
    before = read_pretrained(run)
    table = export(run, "encoder", tmp_path / "e.safetensors")
    found = read_pretrained(tmp_path / "e.safetensors")
    assert found.tensors.keys() == {n for n in before.tensors if n.startswith("encoder.")}
    assert all(torch.equal(tensor, before.tensors[n]) for n, tensor in found.tensors.items())
    assert found.topology == before.topology
    assert {row.part.split()[0] for row in table.rows} == {"stem", "encoder"}
    with pytest.raises(UserError, match="an encoder alone: give --plans and --dataset-json"):
        export(tmp_path / "e.safetensors", "nnunet", tmp_path / "x.pth")


def test_nnunets_file_has_its_axes_and_its_aliases_are_shared(tmp_path, run):
    export(run, "nnunet", tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    state = content["network_weights"]
    with torch.device("meta"):
        expected = ResEncUNet.from_preset("tiny").state_dict()
    assert list(state) == list(expected)
    assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in state.values())
    assert_aliases_are_one(state)
    tensors = read_pretrained(run).tensors
    name = "encoder.stages.1.blocks.0.conv1.conv.weight"
    assert torch.equal(state[name], tensors[name].permute(0, 1, 4, 3, 2))
    size = sum(t.numel() for t in tensors.values()) * 4
    assert (tmp_path / "x.pth").stat().st_size < 1.5 * size


@pytest.mark.parametrize("name", RECORDED)
def test_planned_networks_get_what_fits(tmp_path, run, thin, name):
    plans, dataset_json = thin(name)
    table = export(run, "nnunet", tmp_path / "x.pth", plans=plans, dataset_json=dataset_json)
    state = torch.load(tmp_path / "x.pth", weights_only=True)["network_weights"]
    assert_aliases_are_one(state)
    planned = read_plans(plans, dataset_json)
    with torch.device("meta"):
        topology = planned.plan.topology
        network = ResEncUNet(
            len(planned.channels), planned.num_classes, topology.features,
            [to_network_axes(s, planned.axes) for s in topology.strides], topology.blocks,
            [to_network_axes(k, planned.axes) for k in topology.kernels], topology.decoder_convs,
        )  # fmt: skip
    assert {n: t.shape for n, t in state.items()} == {
        n: t.shape for n, t in network.state_dict().items()
    }
    source = read_pretrained(run).tensors
    ours = from_network_axes(state, planned.axes)
    stage = "encoder.stages.3.blocks.1.conv2.conv.weight"  # of kernel 3x3x3 in every plan
    assert torch.equal(ours[stage], source[stage])
    stem = source["encoder.stem.convs.0.conv.weight"]
    for axis in (2, 3, 4):
        if ours["encoder.stem.convs.0.conv.weight"].shape[axis] == 1:
            stem = stem.mean(axis, keepdim=True)
    channels = len(planned.channels)
    torch.testing.assert_close(
        ours["encoder.stem.convs.0.conv.weight"], stem.repeat(1, channels, 1, 1, 1) / channels
    )
    fresh = {row.part for row in table.rows if row.fresh[0]}
    assert "heads" in fresh
    assert not fresh & {"stem", "encoder stage 0"}
    # a block that `tiny` lacks starts as nnU-Net's do
    assert not state["encoder.stages.1.blocks.1.conv2.norm.weight"].any()
    assert state["encoder.stages.1.blocks.1.conv2.conv.weight"].any()


def test_a_planned_export_is_the_same_every_time(tmp_path, run, thin):
    plans, dataset_json = thin("coronal")
    for name in ("a.pth", "b.pth"):
        torch.rand(3)  # the global generator is not what decides
        export(run, "nnunet", tmp_path / name, plans=plans, dataset_json=dataset_json)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()


def test_plans_that_little_fits_are_refused(tmp_path, run):
    for key in ("plans", "dataset_json"):
        (tmp_path / f"{key}.json").write_text(json.dumps(RECORDED["hippocampus"][key]))
    files = {"plans": tmp_path / "plans.json", "dataset_json": tmp_path / "dataset_json.json"}
    with pytest.raises(UserError, match=r"run: only \d% of the encoder's weights fit this network"):
        export(run, "nnunet", tmp_path / "x.pth", **files)
    assert not (tmp_path / "x.pth").exists()


def test_what_cannot_be_asked_for_together(tmp_path, run, thin):
    plans, dataset_json = thin("brain")
    x = tmp_path / "x.pth"
    with pytest.raises(UserError, match=r"--dataset-json: missing; plans.json and dataset.json go"):
        export(run, "nnunet", x, plans=plans)
    with pytest.raises(UserError, match="--plans: missing"):
        export(run, "nnunet", x, dataset_json=dataset_json)
    with pytest.raises(UserError, match="--plans: they are nnU-Net's, so they go with --format nn"):
        export(run, "nnssl", x, plans=plans, dataset_json=dataset_json)
    with pytest.raises(UserError, match="--trainer: it is nnU-Net's"):
        export(run, "encoder", x, trainer=True)
    with pytest.raises(UserError, match=r"--format onnx: choose from nnunet, nnssl"):
        export(run, "onnx", x)
    assert not x.exists()


def test_nothing_is_overwritten_unasked(tmp_path, run):
    x = tmp_path / "x.pth"
    x.write_text("precious")
    with pytest.raises(UserError, match=r"x.pth exists already: choose another -o, or --overwrite"):
        export(run, "encoder", x)
    assert x.read_text() == "precious"
    export(run, "encoder", x, overwrite=True)
    with pytest.raises(UserError, match="the weights themselves"):
        export(x, "encoder", x, overwrite=True)
    read_pretrained(x)
    with pytest.raises(UserError, match="inside the run's checkpoints"):
        export(run, "encoder", run / "checkpoints" / "x.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="a folder; name a file"):
        export(run, "nnunet", tmp_path / "folder", overwrite=True)


def test_safetensors_say_what_they_hold(tmp_path, run):
    export(run, "safetensors", tmp_path / "x.safetensors")
    with safetensors.safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        about = json.loads(file.metadata()["sparsemae"])
        names = set(file.keys())
    assert names == {n for n, _ in ResEncUNet.from_preset("tiny").named_parameters()}
    assert about["axes"] == [0, 1, 2]
    assert about["patch_size"] == [16, 24, 16]
    assert about["topology"]["features"] == [16, 32, 64, 96]
    assert about["normalization"] == "zscore"
    assert about["recipe"]["pretraining"]["mask"]["ratio"] == 0.75


def test_a_newer_format_and_damaged_metadata_are_refused(tmp_path, run):
    export(run, "nnunet", tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    content["sparsemae"]["format"] = 2
    torch.save(content, tmp_path / "newer.pth")
    with pytest.raises(UserError, match=r"of format 2, which this version .* update"):
        read_pretrained(tmp_path / "newer.pth")
    content["sparsemae"] |= {"format": 1, "axes": [0, 0, 1]}
    torch.save(content, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match="its metadata is damaged"):
        read_pretrained(tmp_path / "damaged.pth")
