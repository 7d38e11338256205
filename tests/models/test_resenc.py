"""ResEncUNet against dynamic-network-architectures (DNA): equal to the last bit, keys included."""

import copy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import Tensor, nn

from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked
from sparsemae.models.blocks import ResidualBlock
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import PRESETS

THIN = (4, 8, 12, 16, 20, 20)  # the widths of nnU-Net's presets, scaled down
CUBE = (64, 64, 64)


def preset(name):
    """A preset's own blocks and strides on few channels."""
    numbers = PRESETS[name]
    return numbers | {"features_per_stage": THIN[: len(numbers["strides"])]}


FLAT_START = {  # as nnU-Net plans thick slices: no work across slices in the first stages
    "features_per_stage": (4, 8, 12, 12),
    "strides": ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2)),
    "n_blocks_per_stage": (1, 2, 2, 1),
    "kernel_sizes": ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)),
}
ODD_PLAN = {  # every way to change shape: channels only, stride only, one axis only
    "features_per_stage": (3, 5, 5, 5, 7),
    "strides": (1, (2, 1, 1), 1, (1, 1, 2), 1),
    "n_blocks_per_stage": (2, 1, 2, 1, 1),
    "kernel_sizes": (3, 1, (3, 1, 3), 3, (3, 3, 1)),
    "n_conv_per_stage_decoder": (1, 2, 1, 3),
}
# plan, input size, input channels, classes, deep supervision
CASES = {
    "S": (preset("S"), CUBE, 1, 1, False),
    "M": (preset("M"), CUBE, 3, 2, True),
    "L": (preset("L"), CUBE, 1, 1, False),
    "XL": (preset("XL"), (96, 64, 64), 3, 2, False),
    "tiny": (preset("tiny"), (16, 24, 32), 1, 2, True),
    "flat-start": (FLAT_START, (6, 32, 24), 1, 2, True),
    "flat-start, 3 channels": (FLAT_START, (6, 32, 24), 3, 1, False),
    "odd plan": (ODD_PLAN, (10, 7, 8), 2, 2, True),
}


def dna(plan, input_channels, num_classes, deep_supervision=False):
    """The peer, with the constants nnU-Net's planners give it."""
    n = len(plan["features_per_stage"])
    return ResidualEncoderUNet(
        input_channels=input_channels,
        n_stages=n,
        features_per_stage=plan["features_per_stage"],
        conv_op=nn.Conv3d,
        kernel_sizes=plan.get("kernel_sizes", 3),
        strides=plan["strides"],
        n_blocks_per_stage=plan["n_blocks_per_stage"],
        num_classes=num_classes,
        n_conv_per_stage_decoder=plan.get("n_conv_per_stage_decoder", 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=deep_supervision,
    )


def randomise(network):
    """Give every weight a value: norms of weight zero would hide the residual branches."""
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.1)


def aliases(key):
    """Other names of the tensor called `key`."""
    names = {key, key.replace(".all_modules.0.", ".conv.").replace(".all_modules.1.", ".norm.")}
    return names | {name.removeprefix("decoder.") for name in names if ".encoder." in name}


def assert_aliases_share_storage(network):
    state = network.state_dict(keep_vars=True)
    for key, tensor in state.items():
        for alias in aliases(key):
            assert state[alias].data_ptr() == tensor.data_ptr(), (key, alias)
    assert len({t.data_ptr() for t in state.values()}) == len(list(network.parameters()))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def network():
    network = ResEncUNet(1, 2, **FLAT_START)
    randomise(network)
    return network


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_dna(case):
    plan, size, channels, classes, deep_supervision = CASES[case]
    ours = ResEncUNet(channels, classes, **plan, deep_supervision=deep_supervision)
    theirs = dna(plan, channels, classes, deep_supervision)
    randomise(ours)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(2, channels, *size)
    xs = x.clone().requires_grad_(), x.clone().requires_grad_()
    pair = ours(xs[0]), theirs(xs[1])
    assert isinstance(pair[0], list) == deep_supervision
    outputs, expected = pair if deep_supervision else ([pair[0]], [pair[1]])
    assert outputs[0].shape == (2, classes, *size)
    assert len(outputs) == len(expected) == (len(plan["strides"]) - 1 if deep_supervision else 1)
    upstream = [torch.randn_like(y) for y in outputs]
    for y, y_dna in zip(outputs, expected, strict=True):
        assert torch.equal(y, y_dna)
    torch.autograd.backward(outputs, upstream)
    torch.autograd.backward(expected, upstream)
    assert torch.equal(xs[0].grad, xs[1].grad)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        g = grads.pop(name)
        assert (p.grad is None) == (g is None), name
        assert p.grad is None or torch.equal(p.grad, g), name
    assert not grads


@pytest.mark.parametrize("case", CASES)
def test_keys_and_shapes_are_those_of_dna_in_the_same_order(case):
    plan, _, channels, classes, _ = CASES[case]
    with torch.device("meta"):
        ours, theirs = ResEncUNet(channels, classes, **plan), dna(plan, channels, classes)
    shapes = [[(k, v.shape) for k, v in net.state_dict().items()] for net in (ours, theirs)]
    assert shapes[0] == shapes[1]


def test_state_dicts_load_strictly_both_ways_and_aliases_stay_shared(network):
    theirs = dna(FLAT_START, 1, 2)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    theirs.load_state_dict(network.state_dict(), strict=True)
    assert_aliases_share_storage(theirs)
    fresh = ResEncUNet(1, 2, **FLAT_START)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    assert_aliases_share_storage(fresh)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())


@pytest.mark.parametrize("change", [nn.Module.double, copy.deepcopy, nn.Module.half])
def test_aliases_stay_shared_through_dtype_changes_and_copies(network, change):
    names = [name for name, _ in network.named_parameters()]
    changed = change(network)
    assert_aliases_share_storage(changed)
    assert [name for name, _ in changed.named_parameters()] == names


def test_resenc_l_has_the_published_number_of_parameters():
    with torch.device("meta"):
        network = ResEncUNet.from_preset("L")
    parameters = list(network.parameters())
    assert sum(p.numel() for p in parameters) == 102_348_965
    assert sum(p.numel() for p in network.encoder.parameters()) == 90_296_576
    assert len(parameters) == 264
    keys = list(network.state_dict())
    assert len(keys) == 956
    assert sum(k.startswith("encoder.") for k in keys) == 448
    assert sum(k.startswith("decoder.encoder.") for k in keys) == 448


def test_strides_of_presets_and_anisotropic_plans():
    with torch.device("meta"):
        assert ResEncUNet.from_preset("L").total_stride == (32, 32, 32)
        assert ResEncUNet.from_preset("tiny").total_stride == (8, 8, 8)
        flat = ResEncUNet(1, 1, **FLAT_START)
    assert flat.stage_strides == ((1, 1, 1), (1, 2, 2), (1, 4, 4), (2, 8, 8))


def test_presets_take_overrides():
    with torch.device("meta"):
        network = ResEncUNet.from_preset("L", 4, 3, features_per_stage=THIN, deep_supervision=True)
    assert network.encoder.stem.convs[0].conv.weight.shape == (4, 4, 3, 3, 3)
    assert network.decoder.seg_layers[-1].weight.shape == (3, 4, 1, 1, 1)
    assert network.decoder.deep_supervision


def test_starts_as_nnunet_does():
    network = ResEncUNet.from_preset("tiny")
    blocks = [m for m in network.modules() if isinstance(m, ResidualBlock)]
    assert len(blocks) == sum(PRESETS["tiny"]["n_blocks_per_stage"])
    last = {id(b.conv2.norm) for b in blocks}
    for module in network.modules():
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()
        if isinstance(module, nn.InstanceNorm3d):
            assert (module.weight == (0 if id(module) in last else 1)).all()
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()  # of a transposed convolution too: torch's convention
            expected = (2 / (1 + 1e-4) / fan_in) ** 0.5
            torch.testing.assert_close(module.weight.std().item(), expected, rtol=0.05, atol=0)


def test_float64_in_float64_out(network):
    x = torch.randn(1, 1, 6, 32, 24)
    single, double = network(x), network.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(single, double.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("input_channels", 0, "input_channels: needs positive integers"),
        ("num_classes", -1, "num_classes: needs positive integers"),
        ("features_per_stage", (16, 32, 0), "features_per_stage: needs positive integers"),
        ("features_per_stage", 16, "features_per_stage: needs a list"),
        ("features_per_stage", (16,), "features_per_stage: a U-Net needs at least 2 stages"),
        ("strides", (1, 2), "strides: 2 entries, but the 3 stages"),
        ("strides", (1, 2, 3), "strides: each stage takes 1 or 2"),
        ("strides", (1, 2, (2, 2)), "strides: each stage takes 1 or 2"),
        ("strides", (2, 2, 2), "strides: the first stage works at full resolution"),
        ("strides", "122", "strides: needs a list"),
        ("kernel_sizes", 5, "kernel_sizes: each stage takes 1 or 3"),
        ("kernel_sizes", (3, 3, (1, 3, 2)), "kernel_sizes: each stage takes 1 or 3"),
        ("kernel_sizes", (3, 3), "kernel_sizes: 2 entries"),
        ("n_blocks_per_stage", (1, 1, 1, 1), "n_blocks_per_stage: 4 entries"),
        ("n_blocks_per_stage", (1, True, 1), "n_blocks_per_stage: needs positive integers"),
        ("n_conv_per_stage_decoder", (1, 1, 1), "n_conv_per_stage_decoder: 3 entries"),
        ("n_conv_per_stage_decoder", 0, "n_conv_per_stage_decoder: needs positive integers"),
    ],
)
def test_bad_arguments_are_named(argument, value, message):
    good = {
        "input_channels": 1,
        "num_classes": 1,
        "features_per_stage": (2, 4, 8),
        "strides": (1, 2, 2),
        "n_blocks_per_stage": (1, 1, 1),
    }
    with pytest.raises(ValueError, match=message):
        ResEncUNet(**(good | {argument: value}))


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown 'XXL', choose from tiny, S, M, L, XL"):
        ResEncUNet.from_preset("XXL")


def test_input_must_divide_by_the_total_stride(network):
    with pytest.raises(ValueError, match=r"\(6, 32, 20\) voxels .* total stride \(2, 8, 8\)"):
        network(torch.randn(1, 1, 6, 32, 20))


def test_stages_coarser_than_the_mask_grid_are_dense(network):
    mask = BlockMask.random(2, (3, 4, 4), 0.5)  # cells of (2, 8, 8) voxels: the total stride
    x = torch.randn(2, 1, 6, 32, 32)
    assert all(isinstance(s, BlockTensor) for s in network.encoder(BlockTensor.pack(x, mask)))
    mask = BlockMask.random(2, (3, 8, 8), 0.5)  # half of it in two axes
    skips = network.encoder(BlockTensor.pack(x, mask))
    assert [type(s) for s in skips] == [BlockTensor] * 3 + [Tensor]
    assert [s.shape[1] for s in skips] == list(FLAT_START["features_per_stage"])
    assert all(s.mask is mask for s in skips[:3])


@pytest.mark.parametrize(
    ("plan", "size", "grid"),
    [(preset("L"), CUBE, (4, 4, 4)), (FLAT_START, (6, 32, 32), (3, 4, 8))],
    ids=["L", "flat-start"],
)
def test_sparse_encoder_equals_the_masked_dense_one(plan, size, grid):
    network = ResEncUNet(1, 1, **plan).double()
    randomise(network)
    x = torch.randn(2, 1, *size, dtype=torch.float64)
    mask = BlockMask.random(2, grid, 0.5)
    results, upstream = [], None
    for form in (BlockTensor, DenseMasked):
        skips = [
            s if isinstance(s, Tensor) else s.unpack() for s in network.encoder(form.pack(x, mask))
        ]
        upstream = upstream or [torch.randn_like(s) for s in skips]
        grads = torch.autograd.grad(skips, list(network.encoder.parameters()), upstream)
        results.append([*skips, *grads])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-7, atol=1e-7)


def test_nothing_masked_equals_the_dense_network(network):
    network.double()
    x = torch.randn(2, 1, 6, 32, 32, dtype=torch.float64)
    mask = BlockMask.random(2, (3, 4, 4), 0.0)
    torch.testing.assert_close(network(BlockTensor.pack(x, mask)).unpack(), network(x))


def test_decoder_packs_when_a_finer_skip_is_block_sparse(network):
    network.double()
    skips = network.encoder(torch.randn(2, 1, 6, 32, 32, dtype=torch.float64))
    dense = network.decoder(skips)
    for finest in (1, 2, 3):  # so many levels run in blocks
        mask = BlockMask.random(2, (3, 4, 4), 0.0)
        packed = [BlockTensor.pack(s, mask) for s in skips[:finest]]
        output = network.decoder(packed + skips[finest:])
        torch.testing.assert_close(output.unpack(), dense)
    with pytest.raises(ValueError, match=r"skips\[0\] is dense but the coarser level"):
        network.decoder([skips[0], BlockTensor.pack(skips[1], mask), *skips[2:]])
    with pytest.raises(ValueError, match="got 2 skips for 4 encoder stages"):
        network.decoder(skips[:2])
