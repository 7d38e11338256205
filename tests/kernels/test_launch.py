"""Choosing a backend, launching a kernel, and noting what would be launched elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsemae.kernels import BlockMask, BlockTensor, ops, registry, tiles
from sparsemae.kernels.tiles import Tile

pytest.importorskip("triton")

from sparsemae.kernels import launch as launching

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        (CPU, torch.float32, "torch"),
        (CUDA, torch.float32, "triton"),
        (CUDA, torch.bfloat16, "triton"),
        (CUDA, torch.float16, "triton"),
        (CUDA, torch.float64, "torch"),
        (CUDA, torch.bool, "torch"),
    ],
)
def test_auto(device, dtype, expected):
    assert registry.choose("auto", device, dtype) == expected
    assert registry.choose("spconv", device, dtype) == "spconv"


def test_auto_without_triton(monkeypatch):
    monkeypatch.setitem(registry.INSTALLED, "triton", False)
    assert registry.choose("auto", CUDA, torch.bfloat16) == "torch"
    assert "triton" not in registry.available()
    with pytest.raises(ValueError, match="backend 'triton' is not installed here: pip install tri"):
        registry.resolve("conv3d", "triton")


def step(blocks=5, channels=32, width=16, dtype=torch.bfloat16):
    """One convolution and its gradients on tensors without storage."""
    visible = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    visible.view(-1)[:blocks] = True
    mask = BlockMask.from_visible(visible).to("meta")
    x = torch.empty(blocks, *(width,) * 3, channels, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(
        channels, channels, 3, 3, 3, dtype=dtype, device="meta", requires_grad=True
    )
    y = ops.conv3d(BlockTensor(x, mask), weight, backend="triton").features
    assert y.shape == x.shape
    assert y.device.type == "meta"
    dx, dw = torch.autograd.grad(y, [x, weight], torch.empty_like(y))
    assert (dx.shape, dw.shape) == (x.shape, weight.shape)


def test_what_a_chip_would_launch_is_recorded():
    with launching.recording("sm_90") as launches:
        step()
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == ["_march_kernel", "_march_kernel", "_wgrad_kernel", "_add_weights_kernel"]
    forward, backward = (dict(launch.constants) for launch in launches[:2])
    assert (forward["MIRROR"], backward["MIRROR"]) == (False, True)
    assert forward["RESIDENT"]
    assert dict(launches[0].signature) == {
        "x_ptr": "*bf16", "neighbors_ptr": "*i32", "w_ptr": "*bf16", "y_ptr": "*bf16", "N": "i32",
    }  # fmt: skip
    assert forward["bias_ptr"] is None
    with launching.recording("sm_80") as others:
        step()
    assert not dict(others[0].constants)["RESIDENT"]


def test_nothing_is_recorded_outside():
    with launching.recording("sm_90") as launches:
        pass
    step()
    assert launches == []


def test_another_number_of_blocks_compiles_nothing_new():
    """Within one number of splits, which the rows of small blocks decide."""

    def forms(blocks):
        with launching.recording("sm_90") as launches:
            step(blocks)
        return [(x.kernel, x.signature, x.constants, x.warps, x.stages) for x in launches]

    assert forms(5) == forms(6) == forms(48)


def test_an_empty_grid_launches_nothing():
    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError("launched")

    launching.launch(Kernel(), (0, 1), {"x": torch.empty(0)}, {})


@pytest.mark.parametrize("chip", ["sm_80", "sm_86", "sm_90", "sm_100", "gfx942", "gfx1100"])
@pytest.mark.parametrize("kernel", tiles.RULES)
@pytest.mark.parametrize("bits", [16, 32])
def test_the_rule_has_a_tile_for_every_shape(chip, kernel, bits):
    for k in (1, 2, 3, 5, 8, 15, 16, 24, 64, 100, 320, 1000):
        for n in (1, 7, 16, 33, 64, 320):
            for taps in (1, 8, 9, 27):
                found = tiles.RULES[kernel](chip, bits, k, n, taps)
                for number in (found.rows, found.cols, found.depth, found.taps):
                    assert number > 0
                    assert number & (number - 1) == 0
                assert found.cols >= 16
                assert found.taps * found.depth >= 16
                assert found.warps in (4, 8)


def test_an_entry_comes_before_the_rule():
    x = torch.empty(1, 4, 4, 4, 24)
    given = {"k": 24, "n": 24, "width": 4, "rows": 10**6, "taps": 27}
    usual, other = tiles.tile("gather", x, **given), Tile(32, 16, 16, warps=2)
    with tiles.using({("gather", "sm_90", 32, 24, 24, 4): other}):
        assert tiles.tile("gather", x, **given) == other
        with tiles.using({("march", "sm_90", 32, 24, 24, 4): Tile(0, 0, 0)}):
            assert tiles.tile("gather", x, **given) == other
            assert tiles.march_tile(x, k=24, n=24, block=(4, 4, 4)) is None
    assert tiles.tile("gather", x, **given) == usual
    assert tiles.march_tile(x, k=24, n=24, block=(4, 4, 4)) is not None
    for k, n, block in ((128, 32, (4, 4, 4)), (8, 32, (4, 4, 4)), (32, 32, (2, 4, 4))):
        assert tiles.march_tile(x, k=k, n=n, block=block) is None


@pytest.mark.parametrize(("rows", "splits"), [(10**6, 1), (4000, 4), (500, 16), (1, 16), (0, 16)])
def test_few_rows_split_the_sum(rows, splits):
    x = torch.empty(1, 1, 1, 1, 256, dtype=torch.bfloat16)
    assert tiles.tile("gather", x, k=256, n=256, width=1, rows=rows, taps=27).splits == splits


@pytest.mark.slow
def test_triton_binds_what_is_recorded():
    """Every kernel goes through Triton's own argument binding and compiles for sm_90."""
    script = Path(__file__).with_name("bind_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(launching.__file__).parent
    kernels = re.findall(
        r"^def (_\w+_kernel)\(", "".join(p.read_text() for p in folder.glob("triton_*.py")), re.M
    )
    assert len(kernels) > 15
    assert set(done.stdout.split()) == set(kernels)
