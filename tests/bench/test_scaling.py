"""The time of a step on several ranks is taken of a step that averages gradients."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparsemae.bench.scaling import Step, measure
from sparsemae.config import load_config
from sparsemae.pretrain import PretrainConfig
from sparsemae.training.ranks import Ranks

SMALL = ("data.patch_size=16", "train.device=cpu")


def small():
    return load_config(PretrainConfig, "tiny", SMALL).resolved()


def test_one_rank_reduces_nothing():
    row = measure(small(), 1, 1, Ranks(torch.device("cpu")))
    assert row["ranks"] == 1
    assert row["reduce_ms"] == 0
    assert row["step_ms"] == row["local_ms"] == row["predicted_ms"] > row["backward_ms"] > 0


def test_gradients_that_are_no_mean_are_not_timed():
    class Tripled(Ranks):
        def total(self, values):
            return 3 * values

    step = Step(small(), 1, Ranks(torch.device("cpu")))
    step.ranks = Tripled(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="gradients differ from the mean of the ranks' by 6"):
        step.check()


@pytest.mark.slow
def test_two_ranks_leave_one_record(tmp_path):
    words = ["--standalone", "--nproc-per-node", "2", "-m", "sparsemae.bench.scaling"]
    words += ["--rounds", "2", "--batch", "1", "--json", tmp_path / "scaling.jsonl"]
    command = [sys.executable, "-m", "torch.distributed.run", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(
        [*command, *(f"--set={item}" for item in SMALL)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (row,) = map(json.loads, (tmp_path / "scaling.jsonl").read_text().splitlines())
    assert json.loads(printed) == row
    assert (row["ranks"], row["batch"], row["threads"]) == (2, 1, 1)
    trainable = row["gradient_mb"] * 1e6 / 4
    assert trainable == Step(small(), 1, Ranks(torch.device("cpu"))).flat.numel()
    # of two ranks the whole gradient passes each link once
    assert row["bus_gb_per_second"] == pytest.approx(row["gradient_mb"] / row["reduce_ms"])
    assert row["local_ms"] < row["predicted_ms"] <= row["nothing_hidden_ms"]
    assert row["commit"]
