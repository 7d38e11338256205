"""Whatever a file calls the tensors of a network, they are found, once and the right ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

from sparsemae.errors import UserError
from sparsemae.transfer.names import canonical

FILE = Path("some.pth")


@pytest.fixture
def network(trained):
    return trained()


def prefixed(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def encoder_only(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("encoder.")}


def without_aliases(state):
    """Names as in `named_parameters`."""
    return {k: v for k, v in state.items() if "all_modules" not in k and ".encoder." not in k}


def only_all_modules(state):
    return {k: v for k, v in state.items() if ".conv." not in k and ".norm." not in k}


LAYOUTS = {  # how published code stores a network
    "nnU-Net, MAE, Models Genesis": lambda s: s,
    "DDP": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "compiled in DDP": lambda s: prefixed(s, "module._orig_mod."),
    "no aliases": without_aliases,
    "only all_modules": only_all_modules,
    "GVSL": lambda s: {**prefixed(s, "backbone."), "aff_conv.weight": torch.zeros(3)},
    "S3D's training state": lambda s: {
        **s,
        **prefixed(s, "architecture."),
        "mask_tokens.0": torch.zeros(1, 4, 1, 1, 1),
        "densify_projs.1.weight": torch.zeros(6, 6, 3, 3, 3),
    },
    "PCRLv2": lambda s: {**prefixed(s, "network."), **encoder_only(s)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_whole_networks(network, unique, layout):
    found = canonical(LAYOUTS[layout](network.state_dict()), FILE)
    expected = unique(network)
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


ENCODERS = {
    "encoder.": lambda s: s,
    "VoCo, SimCLR": lambda s: {**s, "projector.layer1.0.weight": torch.zeros(2, 2)},
    "top level": lambda s: {name.removeprefix("encoder."): t for name, t in s.items()},
    "BYOL's": lambda s: {f"online_{name}": tensor for name, tensor in s.items()},
    "second reference": lambda s: prefixed(s, "decoder."),
}


@pytest.mark.parametrize("layout", ENCODERS)
def test_layouts_of_encoders(network, unique, layout):
    found = canonical(ENCODERS[layout](encoder_only(network.state_dict())), FILE)
    expected = encoder_only(unique(network))
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_of_two_encoders_the_file_or_the_user_decides(network, unique, trained):
    online = prefixed(encoder_only(network.state_dict()), "online_")
    target = prefixed(encoder_only(trained().state_dict()), "target_")
    with pytest.raises(UserError, match=r"several encoders: online_encoder, target_encoder; save"):
        canonical(online | target, FILE)
    found = canonical(online | target, FILE, encoder="online_encoder")
    assert all(torch.equal(found.tensors[n], t) for n, t in encoder_only(unique(network)).items())
    assert "target_encoder" in found.notes[-1]


def converted_as_s3d_does(network):
    """Every layer replaced, `conv` and `all_modules.0` apart; the first of the two untrained."""
    for module in list(network.encoder.modules()):
        if hasattr(module, "all_modules"):
            for name, index in (("conv", 0), ("norm", 1)):
                old = getattr(module, name)
                trained = type(old).__new__(type(old))
                nn.Module.__init__(trained)
                trained.__dict__ |= {k: v for k, v in old.__dict__.items() if k[0] != "_"}
                for key, tensor in old.named_parameters():
                    trained.register_parameter(key, nn.Parameter(tensor + 1))
                module.all_modules[index] = trained
    return network


def test_where_s3d_trained_one_of_two_copies_that_one_is_taken(network, unique):
    before = unique(network)
    state = converted_as_s3d_does(network).state_dict()
    found = canonical(state, FILE)
    for name, tensor in before.items():
        expected = tensor + 1 if name.startswith("encoder.") else tensor
        assert torch.equal(found.tensors[name], expected), name
    encoder = sum(name.startswith("encoder.") for name in before)
    assert found.notes[0].startswith(f"{encoder} tensors stood there twice with different values")


def test_the_encoder_that_runs_counts_before_the_decoders_reference_to_it(network, unique):
    state = {
        k: t + 1 if k.startswith("decoder.encoder.") else t for k, t in network.state_dict().items()
    }
    found = canonical(state, FILE)
    assert all(torch.equal(found.tensors[name], t) for name, t in unique(network).items())
    assert "twice with different values" in found.notes[0]


def test_what_was_done_is_noted(network):
    state = {**prefixed(network.half().state_dict(), "module."), "projector.w": torch.zeros(1)}
    notes = canonical(state, FILE).notes
    assert notes == (
        "removed module. from names",
        "left out 1 tensors of other parts: projector",
        "converted to float32",
    )


def test_a_decoder_of_another_kind_is_left_out(network, unique):
    state = encoder_only(network.state_dict())
    state |= {"decoder.blocks.0.weight": torch.zeros(3), "decoder.stages.0.convs.0.conv.bias": 0}
    state["decoder.stages.0.convs.0.conv.bias"] = torch.zeros(8)
    found = canonical(state, FILE)
    assert found.tensors.keys() == encoder_only(unique(network)).keys()
    assert found.notes == ("left out a decoder of another kind",)


OTHERS = {
    "eva.blocks.0.attn.qkv.weight": r"of a transformer, by their names \(eva.blocks.*\); only 3D",
    "encoder.stages.0.0.convs.0.conv.weight": r"plain U-Net \(PlainConvUNet\)",
    "layer1.0.conv1.weight": "a ResNet",
    "foo\nbar.weight": r"no residual-encoder U-Net, by the names .*foo\\nbar",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_are_called_by_their_name(name):
    with pytest.raises(UserError, match=OTHERS[name]) as error:
        canonical({name: torch.zeros(1)}, FILE)
    assert "\n" not in str(error.value)


def test_variants_of_the_network_are_refused(network):
    state = network.state_dict()
    flat = {n: t[..., 0] if t.ndim == 5 else t for n, t in state.items()}
    with pytest.raises(UserError, match="a 2D network"):
        canonical(flat, FILE)
    norm = "encoder.stages.0.blocks.0.conv1.norm.running_mean"
    with pytest.raises(UserError, match=f"a variant of the network, with {norm[8:]} in it"):
        canonical(state | {norm: torch.zeros(4)}, FILE)
    with pytest.raises(UserError, match="wrapped and not, with different values"):
        canonical(state | {f"module.{n}": t + 1 for n, t in state.items()}, FILE)
