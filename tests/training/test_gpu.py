"""What only a GPU shows of the trainer: a host that is ahead, bits that repeat, full memory."""

import io
import json

import pytest
import torch
from rich.console import Console

from sparsemae.config import load_config
from sparsemae.errors import OutOfMemoryError
from sparsemae.pretrain import PretrainConfig, pretrain

pytestmark = pytest.mark.gpu

SMALL = (
    "data.patch_size=32", "data.workers=0", "data.validation=2", "train.steps=8",
    "train.save_every=4", "train.device=cuda",
)  # fmt: skip


def train(store, run, *overrides, **options):
    config = load_config(PretrainConfig, "tiny", [*SMALL, *overrides])
    console = Console(file=io.StringIO())
    return pretrain(store, run, config, console=console, resume=True, **options)


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_what_it_learns_on_a_cpu(tmp_path, store, precision):
    train(store, tmp_path / "gpu", f"train.precision={precision}", "train.ema=0.9")
    train(store, tmp_path / "cpu", "train.device=cpu", "train.ema=0.9")
    within = 1e-3 if precision == "fp32" else 0.1
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=within)


def test_a_deterministic_run_ends_with_the_same_bytes_when_resumed(tmp_path, store, run_bytes):
    deterministic = ("train.deterministic=true", "train.precision=bf16")
    try:
        train(store, tmp_path / "whole", *deterministic)
        asked = iter([0] * 4 + [85] * 100)
        stopped = train(store, tmp_path / "half", *deterministic, stop=lambda: next(asked))
        assert 5 <= stopped.step <= 7  # within two steps
        train(store, tmp_path / "half", *deterministic)
    finally:
        torch.use_deterministic_algorithms(False)
    assert run_bytes(tmp_path / "whole") == run_bytes(tmp_path / "half")


def test_too_much_for_the_memory_names_three_settings(tmp_path, store):
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(0.002)
    try:
        with pytest.raises(OutOfMemoryError, match=r"out of memory .*train\.accumulate"):
            train(store, tmp_path / "run", "data.patch_size=96", "data.batch_size=8")
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
