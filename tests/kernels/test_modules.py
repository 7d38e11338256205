"""The layers: torch.nn's own on a Tensor, the operators on masked tensors."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsemae import kernels
from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked, ops, set_backend

CI, CO = 4, 6
KINDS = [BlockTensor, DenseMasked]
LAYERS = [
    ("Conv3d", (CI, CO, 3, 1, 1), {}),
    ("Conv3d", (CI, CO, (1, 3, 3), (1, 2, 2), (0, 1, 1)), {"bias": False}),
    ("Conv3d", (CI, CO, 1), {}),
    ("Conv3d", (CI, CO, 5, 3), {"groups": 2}),  # dense only
    ("ConvTranspose3d", (CI, CO, 2, 2), {}),
    ("ConvTranspose3d", (CI, CO, (1, 2, 2), (1, 2, 2)), {"bias": False}),
    ("InstanceNorm3d", (CI,), {"affine": True}),
    ("InstanceNorm3d", (CI,), {"eps": 0.1}),
    ("AvgPool3d", (2,), {}),
    ("AvgPool3d", ((1, 2, 2), (1, 2, 2)), {}),
    ("MaxPool3d", (2, 2), {}),
    ("LeakyReLU", (0.01,), {}),
    ("LeakyReLU", (0.3, True), {}),
    ("ReLU", (), {}),
    ("GELU", (), {"approximate": "tanh"}),
    ("Dropout", (0.5,), {}),
    ("Identity", (), {}),
]


@pytest.fixture
def mask():
    return BlockMask.random(2, (2, 2, 2), 0.5)


def batch(width=4):
    return torch.randn(2, CI, *(2 * width,) * 3)


def build(name, args, options):
    """The layer and torch's, with one state dict of random values."""
    layer = getattr(kernels, name)(*args, **options)
    plain = getattr(nn, name)(*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    plain.load_state_dict(layer.state_dict(), strict=True)
    return layer, plain


@pytest.mark.parametrize(("name", "args", "options"), LAYERS)
def test_on_a_tensor_it_is_the_torch_layer_bit_for_bit(name, args, options):
    layer, plain = build(name, args, options)
    assert isinstance(layer, type(plain))
    assert layer.extra_repr() == plain.extra_repr()
    x, results = batch(), []
    for module in (plain, layer):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        y = module(leaf * 1.0)
        y.backward(torch.randn(y.shape))
        results.append([y, leaf.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_masked_tensor_it_is_the_operator(kind, mask):
    x = kind.pack(batch(), mask)

    def layer(name, *args, **options):
        return build(name, args, options)[0]

    conv = layer("Conv3d", CI, CO, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    up = layer("ConvTranspose3d", CI, CO, (2, 1, 2), (2, 1, 2))
    norm = layer("InstanceNorm3d", CI, eps=0.1, affine=True)
    for y, expected in (
        (conv(x), ops.conv3d(x, conv.weight, conv.bias, (1, 2, 2))),
        (up(x), ops.conv_transpose3d(x, up.weight, up.bias)),
        (norm(x), ops.instance_norm(x, norm.weight, norm.bias, 0.1)),
        (layer("AvgPool3d", (1, 2, 2))(x), ops.avg_pool3d(x, (1, 2, 2))),
        (layer("MaxPool3d", 2)(x), ops.max_pool3d(x, (2, 2, 2))),
        (layer("LeakyReLU", 0.3)(x), nn.functional.leaky_relu(x, 0.3)),
        (layer("ReLU")(x), torch.relu(x)),
        (layer("GELU")(x), nn.functional.gelu(x)),
        (layer("Identity")(x), x),
    ):
        assert type(y) is kind
        assert y.mask is mask
        assert torch.equal(y.unpack(), expected.unpack())


@pytest.mark.parametrize("kind", KINDS)
def test_the_backend_of_a_layer_is_used(kind, mask, monkeypatch):
    calls = []
    from sparsemae.kernels import reference

    for name in ("conv3d", "conv_transpose3d", "instance_norm", "avg_pool3d", "max_pool3d"):
        monkeypatch.setattr(reference, name, lambda x, *args, name=name: calls.append(name) or x)
    net = nn.Sequential(*(build(*LAYERS[i])[0] for i in (0, 4, 6, 8, 10)))
    assert set_backend(net, "reference") is net
    for layer in net:
        layer(kind.pack(batch(), mask))
    assert calls == ["conv3d", "conv_transpose3d", "instance_norm", "avg_pool3d", "max_pool3d"]


UNSUPPORTED = [
    ("Conv3d", (CI, CO, 3), {}, r"Conv3d\(4, 6, .* needs padding \(1, 1, 1\), dilation 1, groups"),
    ("Conv3d", (CI, CO, 3, 1, "same"), {}, r"needs padding \(1, 1, 1\)"),
    ("Conv3d", (CI, CO, 3, 1, 1, 2), {}, "dilation 1, groups 1"),
    ("Conv3d", (CI, CO, 3, 1, 1, 1, 2), {}, "dilation 1, groups 1"),
    ("Conv3d", (CI, CO, 3, 1, 1), {"padding_mode": "reflect"}, "padding_mode must be 'zeros'"),
    ("Conv3d", (CI, CO, 5, 1, 2), {}, r"kernel \(5, 5, 5\): block-sparse kernels are 1 or 3 wide"),
    ("Conv3d", (CI, CO, 3, 3, 1), {}, r"stride \(3, 3, 3\): block-sparse .* step by 1 or 2"),
    ("Conv3d", (CI + 1, CO, 1), {}, "x has 4 channels, weight takes 5"),
    ("ConvTranspose3d", (CI, CO, 3, 2), {}, "needs kernel = stride, no padding"),
    ("ConvTranspose3d", (CI, CO, 2, 2, 1), {}, "needs kernel = stride, no padding"),
    ("ConvTranspose3d", (CI, CO, 2, 2, 0, 1), {}, "needs kernel = stride, no padding"),
    ("ConvTranspose3d", (CI, CO, 2, 2), {"groups": 2}, "needs dilation 1, groups 1"),
    ("ConvTranspose3d", (CI + 1, CO, 2, 2), {}, "x has 4 channels, weight takes 5"),
    ("InstanceNorm3d", (CI,), {"track_running_stats": True}, "running statistics are not kept"),
    ("InstanceNorm3d", (CO,), {"affine": True}, r"weight has shape \(6,\), x has 4 channels"),
    ("AvgPool3d", (2, 1), {}, "needs stride = kernel, no padding"),
    ("AvgPool3d", (2, 2, 1), {}, "needs stride = kernel, no padding"),
    ("AvgPool3d", (2,), {"ceil_mode": True}, "needs stride = kernel, no padding"),
    ("MaxPool3d", (3, 2), {}, "needs stride = kernel, no padding"),
    ("MaxPool3d", (2,), {"dilation": 2}, "no dilation, no indices"),
    ("MaxPool3d", (2,), {"return_indices": True}, "no dilation, no indices"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "args", "options", "message"), UNSUPPORTED)
def test_settings_without_a_sparse_form(kind, name, args, options, message, mask):
    layer = getattr(kernels, name)(*args, **options)
    with pytest.raises(ValueError, match=message):
        layer(kind.pack(batch(), mask))


def test_unknown_backend():
    conv = kernels.Conv3d(CI, CO, 1)
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose from auto, reference, t"):
        set_backend(conv, "cuda")
    assert conv.backend == "auto"


def test_the_torch_backend_refuses_what_only_reference_can(mask):
    net = set_backend(nn.Sequential(kernels.Conv3d(CI, CO, 1), kernels.ReLU()), "torch")
    net(BlockTensor.pack(batch(), mask))
    with pytest.raises(ValueError, match="backend 'torch' takes a BlockTensor, not a DenseMasked"):
        net(DenseMasked.pack(batch(), mask))
    set_backend(net, "auto")(DenseMasked.pack(batch(), mask))
    assert kernels.available()[:2] == ["reference", "torch"]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind, mask):
    x = kind.pack(torch.ones(2, CI, 16, 16, 16), mask)
    dropout = kernels.Dropout(0.25)
    dropped = dropout(x).unpack()[mask.voxels((8, 8, 8)).expand(-1, CI, -1, -1, -1)]
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dropout.eval()(x).unpack(), x.unpack())


def network() -> nn.Sequential:
    """Every form of convolution, a norm, and in-place activations."""
    net = nn.Sequential(
        kernels.Conv3d(CI, 8, 3, 1, 1),
        kernels.InstanceNorm3d(8, affine=True),
        kernels.LeakyReLU(0.01, inplace=True),
        kernels.Conv3d(8, 8, 3, 2, 1),
        kernels.LeakyReLU(0.01, inplace=True),
        kernels.Conv3d(8, 8, 3, 1, 1),
        kernels.LeakyReLU(0.01, inplace=True),
        kernels.Conv3d(8, CO, 1),
        kernels.ConvTranspose3d(CO, CO, 2, 2),
    )
    nn.init.normal_(net[1].weight)
    return net


def gradients(net) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_convolves_in_the_low_precision(mask, dtype):
    net = network()
    x = batch().requires_grad_()
    exact = net(BlockTensor.pack(x, mask))
    exact.features.sum().backward()
    expected = gradients(net)
    with torch.autocast("cpu", dtype):
        y = net(BlockTensor.pack(x, mask))
        dense = net(x)
    assert y.dtype == dense.dtype == dtype
    y.features.float().sum().backward()
    close = dict(rtol=0.0, atol=0.05 * exact.features.abs().max().item())
    torch.testing.assert_close(y.features.float(), exact.features, **close)
    for value, other in zip(gradients(net), expected, strict=True):
        assert value.dtype == torch.float32
        assert (value - other).norm() < 0.1 * other.norm() + 1e-2 * expected[0].norm()


def test_autocast_leaves_float64_alone(mask):
    net = network().double()
    x = BlockTensor.pack(batch().double(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(net(x).features, net(x).features)
        assert net(x).dtype == torch.float64


def test_activation_checkpointing(mask):
    net, dense = network(), batch()
    results = []
    for recompute in (False, True):
        x = dense.clone().requires_grad_()
        packed = BlockTensor.pack(x, mask)
        y = checkpoint(net, packed, use_reentrant=False) if recompute else net(packed)
        y.features.square().sum().backward()
        results.append([y.features, x.grad, *gradients(net)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_two_masks_in_flight(mask):
    """Forward A, forward B, backward A, backward B: each as if it were alone."""
    net, dense = network(), batch()
    packed = [BlockTensor.pack(dense, m) for m in (mask, BlockMask.random(2, (2, 2, 2), 0.25))]
    alone = []
    for x in packed:
        y = net(x).features
        y.square().sum().backward()
        alone.append([y, *gradients(net)])
    outputs = [net(x).features for x in packed]
    for y, expected in zip(outputs, alone, strict=True):
        y.square().sum().backward()
        assert all(torch.equal(a, b) for a, b in zip([y, *gradients(net)], expected, strict=True))


def test_instance_norm_of_a_channels_last_batch():
    norm = kernels.InstanceNorm3d(6, affine=True).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 4, 5, 7, dtype=torch.double)
    upstream = torch.randn_like(x)
    results = []
    for form in (torch.contiguous_format, torch.channels_last_3d):
        leaf = x.clone(memory_format=form).requires_grad_()
        y = norm(leaf)
        assert y.is_contiguous(memory_format=form)
        grads = torch.autograd.grad(y, [leaf, norm.weight, norm.bias], upstream)
        results.append([y, *grads])
        nn.functional.leaky_relu(norm(leaf), 0.1, inplace=True).sum().backward()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
