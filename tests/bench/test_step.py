"""The step benchmark measures, records, and refuses to time what is wrong."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench.harness import peak_mib, time_in_turn
from sparsemae.bench.step import VARIANTS, Setting, build, check, variants_on
from sparsemae.kernels import torch_conv

SMALL = Setting("cpu", 32, 8, 0.75, 1, "tiny", torch.get_num_threads())


def test_every_variant_leaves_a_complete_line(tmp_path):
    record = tmp_path / "deep" / "record.jsonl"
    arguments = ["step", "--patch", "32", "--block", "8", "--preset", "tiny", "--rounds", "2"]
    result = CliRunner().invoke(command.app, [*arguments, "--no-memory", "--json", str(record)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["variant"] for row in rows] == [v.name for v in VARIANTS]
    for row in rows:
        assert {"case", "backend", "device", "torch", "triton", "commit", "ms", "ratio"} <= set(row)
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        rivals = [r for r in rows if r["variant"] == row["baseline"]]
        assert row["ratio"] == pytest.approx(rivals[0]["ms"] / row["ms"])
    assert max(row["ratio"] for row in rows if row["backend"] == "reference") == 1


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    right = torch_conv._columns
    monkeypatch.setattr(torch_conv, "_columns", lambda *args: right(*args).flip(1))
    with pytest.raises(RuntimeError, match="encoder torch differs from the reference"):
        check(VARIANTS, SMALL)


def test_below_float32_the_reference_sets_the_tolerance(monkeypatch):
    low = replace(SMALL, dtype="bfloat16")
    check(VARIANTS, low)
    right = torch_conv._columns
    monkeypatch.setattr(torch_conv, "_columns", lambda *args: right(*args).flip(1))
    with pytest.raises(RuntimeError, match=r"encoder torch differs from the reference by .*, more"):
        check(VARIANTS, low)


def test_a_gpu_also_runs_triton_and_has_floors_of_its_own():
    assert variants_on("cpu") == VARIANTS
    found = variants_on("cuda")
    assert [v.name for v in found[: len(VARIANTS)]] == [v.name for v in VARIANTS]
    floors = {v.name: v.floor for v in found if v.floor is not None}
    assert floors == {
        "encoder triton": 3.5,
        "step-all triton": 1.6,
        "step-masked triton": 2.0,
        "step-third triton": 2.6,
    }


def test_variants_are_timed_in_turn():
    calls = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    timings = time_in_turn(variants, torch.device("cpu"), rounds=2)
    assert calls == list("ababab")  # the first round does not count
    assert set(timings) == {"a", "b"}


def test_peak_memory_counts_weights_and_activations():
    cpu, variant = torch.device("cpu"), VARIANTS[-1]  # a whole dense step
    small, large = (peak_mib(build, cpu, variant, replace(SMALL, patch=n)) for n in (32, 64))
    weights = sum(p.numel() for p in build(variant, SMALL).mae.parameters()) * 4 / 2**20
    assert small > 3 * weights  # weights, gradients, momentum
    assert large > small + 16 * 64**3 * 4 / 2**20  # at least one activation of the finest stage


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["--patch", "50"], "--patch 50: use a multiple of 32"),
        (["--mask-ratio", "1"], "mask.ratio 1.0 leaves"),
        (["--block", "48"], "use (32, 32, 32) or a multiple"),
        (["--preset", "huge"], "choose from tiny"),
        (["--dtype", "float64"], "--dtype float64: choose from float32, bfloat16"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: on the CPU this benchmark runs in float32"),
    ],
)
def test_bad_input_is_one_line(arguments, remedy):
    run = [sys.executable, "-m", "sparsemae.bench", "step", "--patch", "64", *arguments]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert done.stderr.count("\n") == 1
