"""What the kernel benchmark counts and predicts: layers, work, and the times of a roofline."""

from collections import Counter
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench.cases import KINDS, Layer, Problem, Selection, layers, problems, work
from sparsemae.bench.expected import expected
from sparsemae.bench.report import predictions
from sparsemae.bench.timing import H200
from sparsemae.kernels import Conv3d
from sparsemae.models.resenc import ResEncUNet

POINT, CUBE = (1, 1, 1), (3, 3, 3)
CONV = tuple(KINDS["conv"])
LARGE = Selection(160, (16,), (2,), (0.75,), CONV, (), "bfloat16")


def problem(stage: int, kind: str = "conv", **changes) -> Problem:
    """ResEnc-L, 160^3, cells of 16, batch 2, 75 % hidden."""
    channels, width = (32, 64, 128, 256, 320)[stage], 16 >> stage
    layer = Layer(f"stage{stage}", stage, channels, channels, CUBE, POINT, 1)
    whole = Problem(kind, layer, 16, 160, 2, 0.75, (width,) * 3, "bfloat16")
    return replace(whole, **changes)


def test_layers_are_those_of_the_network():
    encoder = ResEncUNet.from_preset("L", input_channels=1).encoder
    counted = Counter(
        (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.bias is not None)
        for m in {id(m): m for m in encoder.modules() if isinstance(m, Conv3d)}.values()
    )
    described = Counter()
    for layer in layers(encoder.topology):
        key = layer.ci, layer.co, layer.kernel, layer.stride, layer.bias
        described[key] += layer.count
    assert described == counted


def test_selections_pick_layers_most_important_first():
    chosen = replace(LARGE, cells=(16, 32), batches=(2, 8), mask_ratios=(0.75, 0.0))
    chosen = replace(chosen, operators=("fwd", "pool"))
    found = list(problems(chosen))
    settings = list(dict.fromkeys((p.mask_ratio, p.batch, p.cell) for p in found))
    assert settings == [(r, b, c) for r in (0.75, 0.0) for b in (2, 8) for c in (16, 32)]
    names = [p.layer.name for p in found if settings[0] == (p.mask_ratio, p.batch, p.cell)]
    assert names[:4] == ["stem", "stage0", "down1", "skip1"]
    assert "stage5" not in names  # a voxel there is 32 wide, more than a cell
    assert "stage5" in {p.layer.name for p in found}
    pooled = [p for p in found if p.kind == "pool"]
    assert min(min(p.out_block) for p in pooled) == 2
    two = replace(chosen, stages=("1", "stem"))
    assert {p.layer.name for p in problems(two)} == {"stem", "down1", "skip1", "stage1"}


def test_work_is_counted_once():
    conv, size = problem(0), 2
    rows = 2 * 250 * 16**3
    flops = 2 * rows * 27 * 32 * 32
    features, weight = size * rows * 32, size * 27 * 32 * 32
    for operator in ("fwd", "dgrad", "wgrad"):
        counted = work(conv, operator, dense=False)
        assert (counted.flops, counted.bytes) == (flops, 2 * features + weight)
    assert work(conv, "fwd", dense=True).flops == 4 * flops
    assert work(replace(conv, mask_ratio=0.0), "fwd", dense=False) == work(conv, "fwd", dense=True)
    strided = replace(conv.layer, co=64, stride=(2, 2, 2))
    down = replace(conv, layer=strided, out_block=(8, 8, 8))
    assert work(down, "dgrad", dense=False).flops == 2 * rows // 8 * 27 * 32 * 64
    assert work(down, "fwd", dense=False).bytes == features + features // 4 + 2 * weight
    assert work(conv, "norm-bwd", dense=False).bytes == 3 * features
    assert work(conv, "pool", dense=False).bytes == features + features // 8
    assert work(conv, "densify", dense=False).bytes == features + 4 * features


@pytest.mark.parametrize(
    ("stage", "microseconds"),
    [  # worked out by hand; also the roofline of the design notes, which round to whole numbers
        (0, (143.4, 61.0, 136.2, 804.3)),
        (1, (71.7, 15.3, 54.2, 241.3)),
        (2, (35.8, 4.0, 25.1, 80.4)),
        (3, (17.9, 1.8, 16.3, 40.7)),
        (4, (3.5, 1.4, 9.9, 11.9)),
    ],
)
def test_predictions_are_those_of_a_hand_calculation(stage, microseconds):
    found = expected(problem(stage), "fwd", H200)
    times = [1e3 * t for t in (found.tensor, found.memory, found.l2, found.l2_taps)]
    assert times == pytest.approx(microseconds, rel=0.01, abs=0.06)
    assert found.ms == max(found.tensor, found.memory, found.l2)
    assert expected(problem(stage), "dgrad", H200) == found  # equal channels
    dense = expected(problem(stage), "fwd", H200, dense=True)
    assert dense.tensor == pytest.approx(4 * found.tensor)


def test_the_prediction_of_one_stage_in_full():
    rows, c = 2 * 250 * 8**3, 64
    weight = 27 * c * c * 2
    halo = (4 + 2) * (8 + 2) * (8 + 2) / (4 * 8 * 8)
    l2 = halo * rows * c * 2 + rows / 256 * weight
    found = expected(problem(1), "fwd", H200)
    assert found.tensor == pytest.approx(1e3 * 2 * rows * 27 * c * c / 790e12)
    assert found.memory == pytest.approx(1e3 * (2 * rows * c * 2 + weight) / 4.3e12)
    assert found.l2 == pytest.approx(1e3 * l2 / 5.5e12)
    assert found.bound == "products"
    assert expected(problem(0, "norm"), "norm", H200).bound == "memory"


def test_expecting_needs_no_gpu_and_adds_up(tmp_path):
    document = tmp_path / "expected.md"
    arguments = ["kernels", "--expect", "--markdown", str(document)]
    result = CliRunner().invoke(command.app, arguments)
    assert result.exit_code == 0, result.output
    assert "fwd stage0 160^3 cell 16 batch 2 75%" in result.output
    assert "| fwd stage1 160^3 cell 16 batch 2 75% | 5 | 56.6 |" in document.read_text()
    chosen = list(problems(LARGE))
    *_, total = predictions(chosen, CONV, H200)
    parts = [
        (
            p.layer.count * expected(p, op, H200).ms,
            p.layer.count * expected(p, op, H200, dense=True).ms,
        )
        for p in chosen
        for op in CONV
        if (p.layer.name, op) != ("stem", "dgrad")
    ]
    ours, dense = (sum(column) for column in zip(*parts, strict=True))
    assert total[-4:] == [f"{ours:.3g}", "", f"{dense:.3g}", f"{dense / ours:.2f}x"]
