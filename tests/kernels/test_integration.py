"""Triton operators inside torch's machinery: compile, autocast, checkpoints, DDP, CUDA graphs."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sparsemae.kernels import BlockMask, BlockTensor, set_backend
from sparsemae.models.blocks import ResidualBlock
from sparsemae.models.mae import SparseMAE, masked_mse
from sparsemae.models.resenc import ResEncUNet

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, GRID = (8, 8, 8), (2, 2, 2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def network(features=(8, 16, 16)) -> ResEncUNet:
    net = ResEncUNet(
        1, 1, features_per_stage=features, n_blocks_per_stage=(1, 1, 1), strides=(1, 2, 2)
    )
    for module in net.modules():
        if isinstance(module, ResidualBlock):
            nn.init.uniform_(module.conv2.norm.weight, 0.5, 1.5)
    return set_backend(net, "triton").to(DEVICE)


def mask(seed=0, ratio=0.5) -> BlockMask:
    generator = torch.Generator().manual_seed(seed)
    return BlockMask.random(1, GRID, ratio, generator=generator).to(DEVICE)


def volume() -> torch.Tensor:
    return torch.randn(1, 1, *SIZE, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def values(skips) -> list[torch.Tensor]:
    return [s if isinstance(s, torch.Tensor) else s.features for s in skips]


def run(encoder, parameters, cells) -> list[torch.Tensor]:
    """Skips and parameter gradients of one forward and backward pass."""
    outputs = values(encoder(BlockTensor.pack(volume(), cells)))
    loss = sum(
        (o.float() * torch.linspace(-1, 1, o.shape[-1], device=o.device)).sum() for o in outputs
    )
    return [*outputs, *torch.autograd.grad(loss, parameters)]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_sparse_encoder_is_one_graph(compiler):
    """Traced whole, forward and backward, with equal bits; another mask needs no new graph."""
    encoder = network().encoder
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True, backend=compiler)
    for seed in (0, 1):
        expected = run(encoder, parameters, mask(seed))
        assert same(run(compiled, parameters, mask(seed)), expected)
        if seed == 0:
            first = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == first


@pytest.mark.slow
def test_a_compiled_encoder():
    """With the default compiler, which fuses around the kernels."""
    encoder = network((4, 8, 8)).encoder
    parameters = list(encoder.parameters())
    torch._dynamo.reset()
    compiled = torch.compile(encoder, fullgraph=True)
    expected = run(encoder, parameters, mask())
    for a, b in zip(run(compiled, parameters, mask()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_autocast(dtype):
    encoder = network().encoder
    parameters = list(encoder.parameters())
    exact = run(encoder, parameters, mask())
    with torch.autocast(DEVICE, dtype):
        found = run(encoder, parameters, mask())
    assert [v.dtype for v in found[:3]] == [dtype] * 3
    assert {v.dtype for v in found[3:]} == {torch.float32}
    for a, b in zip(found[:3], exact[:3], strict=True):
        assert (a.float() - b).norm() < 0.05 * b.norm()


def test_activation_checkpointing():
    encoder = network().encoder
    parameters = list(encoder.parameters())

    def recomputed(x):
        return checkpoint(encoder, x, use_reentrant=False)

    found, expected = (run(e, parameters, mask()) for e in (recomputed, encoder))
    assert same(found, expected)


def test_two_masks_in_flight():
    """Forward A, forward B, backward A, backward B: each as if it were alone."""
    encoder = network().encoder
    parameters = list(encoder.parameters())
    cells = [mask(0), mask(1, 0.25)]
    alone = [run(encoder, parameters, m) for m in cells]
    outputs = [values(encoder(BlockTensor.pack(volume(), m))) for m in cells]
    for out, expected in zip(outputs, alone, strict=True):
        loss = sum((o * torch.linspace(-1, 1, o.shape[-1], device=o.device)).sum() for o in out)
        assert same([*out, *torch.autograd.grad(loss, parameters)], expected)


def test_a_mask_changes_in_place():
    """As a captured graph needs it: the tensors stay, the pattern is another."""
    encoder = network().encoder
    parameters = list(encoder.parameters())
    reused = mask(0)
    pointers = [t.data_ptr() for t in reused._tensors]
    assert not same(run(encoder, parameters, reused)[:1], run(encoder, parameters, mask(1))[:1])
    assert reused.copy_(mask(1)) is reused
    assert [t.data_ptr() for t in reused._tensors] == pointers
    assert same(run(encoder, parameters, reused), run(encoder, parameters, mask(1)))
    with pytest.raises(ValueError, match=r"\(4,\) visible blocks cannot become one .* \(6,\)"):
        reused.copy_(mask(0, 0.25))


@pytest.mark.parametrize("decode", ["all", "masked", 0.5])
def test_the_autoencoder_equals_the_torch_backend(decode):
    results = []
    mae = SparseMAE(network(), 4, decode=decode, decode_levels=1).to(DEVICE)
    masks = mae.draw_masks(1, SIZE, 0.5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = volume()
    for backend in ("torch", "triton"):
        model = set_backend(copy.deepcopy(mae), backend)
        loss = masked_mse(model(x, masks), x, masks.scored)
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss.item(), grads))
    (loss, grads), (expected, truth) = results[1], results[0]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert grads.keys() == truth.keys()
    for name, value in truth.items():
        scale = max(value.norm(), truth.get(name.replace(".bias", ".weight"), value).norm())
        assert (grads[name] - value).norm() < 1e-3 * scale + 1e-6, name


@pytest.mark.skipif(DEVICE == "cuda", reason="ranks run in the interpreter, on the CPU")
@pytest.mark.slow
def test_two_ranks_average_their_gradients(tmp_path):
    """DistributedDataParallel over a sparse encoder, each rank with a mask of its own."""
    script = Path(__file__).with_name("ddp_encoder.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for together, other, *alone in zip(
        *(r["together"] for r in ranks), *(r["alone"] for r in ranks), strict=True
    ):
        assert torch.equal(together, other)
        torch.testing.assert_close(together, sum(alone) / 2, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph():
    """A captured encoder step, replayed with another mask and volume, equals the eager one."""
    encoder = network().encoder
    parameters = list(encoder.parameters())
    static_mask, static_x = mask(0), volume()

    def step():
        outputs = values(encoder(BlockTensor.pack(static_x, static_mask)))
        loss = sum(o.square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, parameters)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (1, 2):
        static_mask.copy_(mask(seed))
        static_x.copy_(torch.randn_like(static_x))
        graph.replay()
        torch.cuda.synchronize()
        found = [t.clone() for t in captured]
        assert same(found, step())


@pytest.mark.gpu
def test_nothing_waits_for_the_device():
    mae = SparseMAE(network(), 4, decode="masked", decode_levels=1).to(DEVICE)
    masks = mae.draw_masks(1, SIZE, 0.5).to(DEVICE)
    x = volume()
    for wary in (False, True):
        torch.cuda.set_sync_debug_mode("error" if wary else "default")
        try:
            masked_mse(mae(x, masks), x, masks.scored).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
