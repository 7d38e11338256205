"""The kernel benchmark refuses what is wrong, and measures and records the rest."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench import kernels
from sparsemae.bench.cases import KINDS, Selection, layers, problems
from sparsemae.bench.forms import Form, Inputs, Prepared, differences, tolerances, truth
from sparsemae.bench.kernels import encoder_totals, measure
from sparsemae.bench.plots import plot
from sparsemae.bench.report import measured
from sparsemae.bench.tables import markdown_table, write_markdown
from sparsemae.bench.timing import Ceilings, spread
from sparsemae.errors import UserError
from sparsemae.kernels import torch_backend
from sparsemae.models.resenc import ResEncUNet

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = Selection(
    16, (8,), (1,), (0.75,), ("fwd", "dgrad", "wgrad"), ("stage0",), "float32", "tiny"
)
OPTIONS = ("--patch", "8", "--block", "4", "--batch", "1", "--mask-ratio", "0.75")
OPTIONS += ("--preset", "tiny", "--seconds", "0")
KEYS = {"case", "backend", "device", "torch", "triton", "commit", "ms", "ratio"}

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: str):
    return CliRunner().invoke(command.app, ["kernels", *OPTIONS, *arguments])


def rows_of(selection: Selection, *backends: str, budget: float = math.inf):
    ceilings = Ceilings(1, 1)
    arguments = (problems(selection), backends, selection.operators, CPU, ceilings)
    return list(measure(*arguments, budget=budget, seconds=0))


def test_every_backend_leaves_a_complete_line(tmp_path):
    record, pictures = tmp_path / "deep" / "record.jsonl", tmp_path / "pictures"
    backends = ("reference", "torch", "triton")
    result = run(
        *("--stage", "stage0", "--operator", "fwd", "--json", str(record), "--plot", str(pictures)),
        *(word for backend in backends for word in ("--backend", backend)),
    )
    assert result.exit_code == 0, result.output
    ceilings, rows = [], []
    for line in record.read_text().splitlines():
        row = json.loads(line)
        assert set(row) >= KEYS
        (ceilings if row["case"].startswith("ceiling") else rows).append(row)
    assert {row["case"] for row in ceilings} == {"ceiling matmul", "ceiling copy"}
    assert [(row["backend"], row["layout"]) for row in rows] == [
        *(("reference", "NCDHW"), ("reference", "NDHWC"), ("torch", "packed"), ("triton", "packed"))
    ]
    best = min(row["ms"] for row in rows if row["backend"] == "reference")
    for row in rows:
        assert row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        assert row["ratio"] == pytest.approx(best / row["ms"])
        assert row["tflops"] == pytest.approx(row["gflop"] / row["ms"])
        assert row["of_matmul"] == pytest.approx(row["tflops"] / ceilings[0]["tflops"])
        assert row["gbps"] == pytest.approx(1e3 * row["gbyte"] / row["ms"])
        assert row["max_error"] < 1e-3
        assert (row["refused"], row["checked_in"]) == (None, "float64")
    assert len(list(pictures.glob("time-*.png"))) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_operator_is_right_and_timed(kind):
    operators = tuple(KINDS[kind])
    rows = rows_of(replace(SMALL, operators=operators), "reference", "torch")
    assert [r["operator"] for r in rows] == [op for op in operators for _ in range(3)]
    assert all(row["refused"] is None and row["ms"] > 0 for row in rows)


def test_generic_library_converts_and_nothing_else():
    pytest.importorskip("spconv")
    selection = replace(SMALL, operators=("fwd", "norm", "pool"))
    rows = rows_of(selection, "reference", "spconv")
    assert [row["operator"] for row in rows if row["backend"] == "spconv"] == ["fwd"]
    assert all(row["ratio_spconv"] for row in rows if row["operator"] == "fwd")


def flip(y):
    return y.with_values(y.features.flip(0))


def one_wrong_voxel(y):
    return y.with_values(
        y.features + 3 * (torch.arange(y.features.numel()) == 5).view_as(y.features)
    )


def hole(y):
    return y.with_values(y.features.where(y.features != y.features.max(), torch.nan))


def wrong_gradient(y):
    return y.with_values(y.features + 0.01 * (y.features.detach() - y.features))


def fails(y):
    raise RuntimeError("no such tile\nat line 5")


@pytest.mark.parametrize("fault", [flip, one_wrong_voxel, hole, wrong_gradient, fails])
def test_a_wrong_kernel_is_refused_and_never_timed(monkeypatch, tmp_path, fault):
    right, timed = torch_backend.conv3d, []
    monkeypatch.setattr(torch_backend, "conv3d", lambda *args: fault(right(*args)))
    time_operators = kernels.time_operators

    def spy(runs, *arguments):
        timed.extend(runs)
        return time_operators(runs, *arguments)

    monkeypatch.setattr(kernels, "time_operators", spy)
    record = tmp_path / "record.jsonl"
    options = ["--backend", "reference", "--backend", "torch", "--operator", "fwd"]
    result = run(*options, "--operator", "dgrad", "--stage", "stage0", "--json", str(record))
    assert result.exit_code == 1
    assert "refused: fwd stage0" in result.output
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    wrong = [row for row in rows if row["backend"] == "torch"]
    assert len(wrong) == 2
    assert all(row["ms"] is None and row["ratio"] is None for row in wrong)
    assert all(("no such tile" if fault is fails else "differs by") in r["refused"] for r in wrong)
    assert timed
    assert Form("torch") not in timed
    assert all(row["ms"] > 0 for row in rows if row["backend"] == "reference")


def test_memory_that_ends_skips_a_form(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch_backend, "conv3d", full)
    rows = rows_of(replace(SMALL, operators=("fwd",)), "reference", "torch")
    assert [row["skipped"] for row in rows] == [None, None, "out of memory"]
    header, lines = measured(rows)
    assert lines[0][header.index("torch ms")] == "skipped"


def test_a_problem_without_memory_for_the_truth_stops_nothing(monkeypatch):
    right, calls = kernels.truth, []

    def full(*args):
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        return right(*args)

    monkeypatch.setattr(kernels, "truth", full)
    rows = rows_of(replace(SMALL, operators=("fwd", "pool")), "torch")
    assert [(row["case"][:11], row.get("skipped")) for row in rows] == [
        *(("conv stage0", "out of memory"), ("pool stage0", None))
    ]


def test_the_budget_leaves_the_rest_out():
    (row,) = rows_of(SMALL, "reference", budget=0)
    name = "stage0 16^3 cell 8 batch 1 75%"
    assert row["cases"] == [f"fwd {name}", f"dgrad {name}", f"wgrad {name}"]
    assert row["case"] == "left out"
    assert row["ms"] is None


def test_the_kink_of_an_activation_is_kept_out_of_checks():
    (case,) = problems(replace(SMALL, operators=("norm",)))
    inputs = Inputs(case, CPU, torch.float32)
    before = inputs.upstream.clone()
    right = truth(case, inputs)
    near = (right["y"] < 0.05) & (right["y"] > -0.0005)
    assert 0 < near.sum() < near.numel() / 4
    assert torch.equal(inputs.upstream == 0, near)
    assert torch.equal(inputs.upstream[~near], before[~near])
    errors = differences(Prepared(case, Form("torch"), inputs, torch.float32).results(), right)
    assert max(error for pair in errors.values() for error in pair) < 1e-5


def test_differences_are_those_of_the_worst_value_and_of_the_norm():
    right = {"y": torch.tensor([3.0, 4.0]), "weight": torch.tensor([2.0]), "bias": torch.zeros(1)}
    found = {"y": torch.tensor([3.0, 4.4]), "weight": torch.zeros(2), "bias": torch.tensor([0.1])}
    errors = differences(found, right)
    assert errors["y"] == (pytest.approx(0.1), pytest.approx(0.08))
    assert errors["weight"] == (math.inf, math.inf)  # another shape
    assert errors["bias"][0] == pytest.approx(0.05)  # against the weight's gradient beside it
    assert differences({"y": right["y"] * torch.nan}, {"y": right["y"]})["y"][0] == math.inf
    assert tolerances(torch.float32, CPU) < tolerances(torch.bfloat16, CPU)


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--preset", "huge"], "--preset huge: choose from tiny, S"),
        (["--stage", "6"], "--stage 6: choose from 0, 1"),
        (["--operator", "forward"], "--operator forward: choose from densify"),
        (["--backend", "cudnn"], "--backend cudnn: here are reference, torch"),
        (["--dtype", "float64"], "--dtype float64: choose from bfloat16"),
        (["--device", "tpu"], "--device tpu: choose cpu or cuda"),
        (["--mask-ratio", "0.999"], "mask.ratio 0.999 leaves"),
        (["--block", "12"], "data.patch_size (8, 8, 8) is no whole number"),
    ],
)
def test_bad_input_is_named(arguments, remedy):
    result = run(*arguments)
    assert isinstance(result.exception, UserError)
    assert remedy in str(result.exception)


def timed(layer: str, operator: str, backend: str, ms: float, count: int = 1, **more):
    setting = {"patch": 32, "block": 8, "batch": 1, "mask_ratio": 0.75, "device": "chip"}
    row = {"case": f"{operator} {layer}", "backend": backend, "layer": layer, "operator": operator}
    row |= {"layout": "packed", "ms": ms, "count": count, "dtype": "float32"}
    return row | {"refused": None, "ratio": None, "ratio_spconv": None} | setting | more


def test_ratios_are_against_the_better_reference():
    rows = [timed("stem", "fwd", b, ms) for b, ms in (("reference", 6.0), ("reference", 4.0))]
    rows += [timed("stem", "fwd", "spconv", 3.0), timed("stem", "fwd", "triton", 2.0)]
    rows += [timed("stem", "fwd", "torch", None)]
    found = kernels._with_ratios(rows)
    assert [row["ratio"] for row in found] == [4 / 6, 1.0, 4 / 3, 2.0, None]
    assert [row["ratio_spconv"] for row in found] == [0.5, 0.75, 1.0, 1.5, None]


def test_an_encoder_is_the_sum_of_its_layers_or_nothing():
    known = layers(ResEncUNet.from_preset("tiny").topology)
    rows = []
    for layer in known:
        for operator in KINDS["conv"]:
            for backend, ms in (("reference", 9.0), ("reference", 8.0), ("triton", 2.0)):
                rows.append(timed(layer.name, operator, backend, ms, layer.count))
    passes = 3 * sum(layer.count for layer in known) - 1  # all but the stem's dgrad
    reference, triton = encoder_totals(rows, "tiny")
    assert (reference["backend"], reference["ms"]) == ("reference", 8 * passes)
    assert (triton["ms"], triton["ratio"]) == (2 * passes, 4.0)
    assert triton["ratio_spconv"] is None
    rows = [row for row in rows if (row["layer"], row["operator"]) != ("down2", "wgrad")]
    assert encoder_totals(rows, "tiny") == []


def test_spread_is_median_and_quantiles():
    found = spread([s / 1e3 for s in (5, 1, 2, 4, 3)])
    assert (found.ms, found.ms_p20, found.ms_p80) == pytest.approx((3, 1.8, 4.2))
    assert found.rounds == 5


def test_pictures_show_times_and_speed(tmp_path):
    rows = []
    for ratio in (0.6, 0.75):
        for operator in ("fwd", "norm"):
            for layer in ("stage0", "stage1"):
                for backend, ms in (("reference", 4.0), ("reference", 5.0), ("triton", 1.0)):
                    row = timed(layer, operator, backend, ms, ratio=4 / ms, mask_ratio=ratio)
                    rows.append(row | {"case": f"{operator} {layer} {ratio}"})
    rows.append({"case": "ceiling copy", "backend": None, "ms": 1.0, "ratio": None})
    written = plot(rows, tmp_path / "pictures")
    assert sorted(path.name for path in written) == [
        *("speed-block8-batch1.png", "time-block8-batch1-hidden60.png"),
        "time-block8-batch1-hidden75.png",
    ]
    for path in written:
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert path.stat().st_size > 10_000
    assert plot(rows[-1:], tmp_path / "none") == []


def test_a_document_keeps_its_prose(tmp_path):
    path = tmp_path / "kernels.md"
    table = markdown_table(("a", "b"), [["x|y", "1"]])
    assert table == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |\n"
    path.write_text("before\n<!-- static -->\nold\n<!-- /static -->\nafter\n")
    write_markdown(path, "static", table)
    assert path.read_text() == f"before\n<!-- static -->\n{table}<!-- /static -->\nafter\n"
    with pytest.raises(UserError, match="has no lines <!-- expected -->"):
        write_markdown(path, "expected", table)
    write_markdown(tmp_path / "new.md", "static", table)
    assert table in (tmp_path / "new.md").read_text()
