"""Several ranks when one of them fails, or when their number changes; and a wrong mean is seen."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest

from sparsemae.data.loading.samples import SampleReader
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import preprocess
from sparsemae.data.store import write_index, write_mask

pytestmark = pytest.mark.slow
# rank 1 weighs as rank 0, however many of its voxels are excluded
MEAN_OF_MEANS = """
from sparsemae import cli
from sparsemae.pretraining.objective import Loss, Objective

right = Objective.loss_of
def wrong(*arguments):
    total, weight = right(*arguments)
    return Loss(total / weight)

Objective.loss_of = wrong
cli.main()
"""
LIMITED = """
[ "$RANK" = 0 ] && ulimit -f 12000  # KiB: the weights and their mean fit, two moments do not
exec "$@"
"""


def sparsemae(words):
    return [sys.executable, "-m", "sparsemae", *words]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses(run):
    return {(r["step"], k): r[k] for r in lines(run / "metrics.jsonl") for k in r.keys() - {"step"}}


def status(run):
    found = json.loads((run / "status.json").read_text())
    return found["state"], found["step"], found["exit_code"]


@pytest.fixture
def heads(tmp_path):
    """A store of heads of 24^3 that is the test's own, one held out."""
    write_heads(tmp_path / "volumes", 9, size=24)
    keep, folder = PreprocessConfig(spacing=None), tmp_path / "heads"
    return preprocess([tmp_path / "volumes"], folder, keep, validation=0.1).store


def on(store, words):
    """The same command on another store."""
    return [words[0], store.path, *words[2:]]


def test_the_mean_of_the_ranks_means_is_another_loss(
    tmp_path, torchrun, heads, varied, sparsemae_now
):
    """What makes one rank and two equal is the weight of each sample, not luck."""
    cases = []
    for i, case in enumerate(heads.cases):
        mask = np.zeros((1, *case.shape), bool)
        mask[:, : 4 * i] = True
        some = write_mask(heads.path, case.id, mask) if i < 5 else None
        cases.append(replace(case, excluded=some))
    write_index(heads.path, cases, heads.config)
    run = {name: tmp_path / name for name in ("one", "wrong")}
    few = {"train__steps": 4, "data__validation": 0}
    one = sparsemae_now(*on(heads, varied(run["one"], **few)))
    words = on(heads, varied(run["wrong"], **few))
    torchrun(2, sys.executable, "-c", MEAN_OF_MEANS, *words).wait(0)
    assert one.wait() == 0, one.printed
    right, wrong = losses(run["one"]), losses(run["wrong"])
    assert right.keys() == wrong.keys()
    off = [abs(wrong[k] / right[k] - 1) for k in right if k[1] == "loss"]
    assert max(off) > 1e-3


def test_parts_that_no_rank_can_make_are_refused_before_anything_is_written(
    tmp_path, torchrun, varied
):
    words = varied(tmp_path / "run", data__batch_size=4, train__accumulate=4)
    agent = torchrun(2, *sparsemae(words))
    agent.wait(1)
    said = "train.accumulate 4: each of 2 ranks has 2 samples of data.batch_size 4, which make no "
    assert agent.errors == [f"sparsemae: error: {said}4 equal parts: choose from 1, 2"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_case_of_one_rank_ends_all_and_is_named_once(
    tmp_path, torchrun, heads, varied, rank
):
    run, train = tmp_path / "run", heads.split("train")
    assert len(train) == 8
    # of the first eight samples, every case is one; ranks take turns, and this one is of step 3
    case = SampleReader(train, (16, 16, 16), seed=0).case_of(6 + rank)
    file = heads.path / case.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    agent = torchrun(2, *sparsemae(on(heads, varied(run))))
    agent.wait(1)
    assert [case.id in line for line in agent.errors].count(True) == 1, agent.printed
    assert not agent.traced
    assert [line["step"] for line in lines(run / "metrics.jsonl")] == [1, 2, 3]
    assert (run / "checkpoints" / "step-00000003" / "meta.json").exists()
    assert status(run) == ("failed", 3, 2 if rank == 0 else 1)


def test_a_killed_loader_worker_of_one_rank_ends_all_and_resuming_ends_the_same(
    tmp_path, torchrun, varied, steps_done, run_bytes, held_at
):
    run, whole, held = tmp_path / "run", tmp_path / "whole", held_at("step", 4)
    few = {"data__workers": 1, "train__steps": 12}
    words = varied(run, **few)
    agent = torchrun(2, sys.executable, *held.words, *words)
    agent.until(lambda: len(held.pids) == 2)
    rank = agent.rank(1)
    (worker,) = agent.children(rank)
    os.kill(worker, signal.SIGKILL)
    held.go_on()
    agent.wait(1)
    (said,) = [line for line in agent.errors if "case" in line]
    assert "killed" in said or "signal 9" in said or "SIGKILL" in said, said
    state, step, code = status(run)
    assert (state, code) == ("failed", 1)
    assert step == steps_done(run)
    assert (run / "checkpoints" / f"step-{step:08d}" / "meta.json").exists()
    torchrun(2, *sparsemae(words)).wait(0)
    torchrun(2, *sparsemae(varied(whole, **few))).wait(0)
    assert run_bytes(run) == run_bytes(whole)


def test_another_number_of_ranks_goes_on_and_says_that_it_is_not_exact(
    tmp_path, torchrun, varied, sparsemae_now, undisturbed
):
    """One rank to step 12, two to step 20, one to the end."""
    run, said = tmp_path / "run", []
    words = varied(run, train__keep=9)
    first = sparsemae_now(*words)
    assert first.wait() == 0, first.printed

    def back_to(step):
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)

    back_to(12)
    agent = torchrun(2, *sparsemae(words))
    agent.wait(0)
    said.append(agent.printed)
    back_to(20)
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    said.append(last.printed)
    warnings = [
        "resumed, but not bit-exact, because world_size 1 is now 2",
        "resumed, but not bit-exact, because world_size 2 is now 1",
    ]
    history = lines(run / "history.jsonl")
    assert [e["message"] for e in history if e["event"] == "warning"] == warnings
    for text, warning, step in zip(said, warnings, (12, 20), strict=True):
        assert text.count(f"warning: {warning}\n") == 1
        assert text.count(f"resuming at step {step}\n") == 1
        assert text.count("done: ") == 1
    expected, found = losses(undisturbed), losses(run)
    assert found.keys() == expected.keys()
    for key in expected:
        # a norm sums up many small differences
        within = 1e-4 if key[1] == "grad_norm" else 1e-5
        assert found[key] == pytest.approx(expected[key], rel=within), key


def test_a_rank_0_that_cannot_write_ends_all_with_one_line(tmp_path, torchrun, varied):
    """The first checkpoint fits; the next one has the optimiser's moments, and does not."""
    run = tmp_path / "run"
    words = sparsemae(varied(run, train__optimizer="adamw", train__steps=8))
    agent = torchrun(2, "bash", "-c", LIMITED, "limited", *words)
    agent.wait(1)
    (said,) = [line for line in agent.errors if "File too large" in line]
    assert "optimizer.safetensors" in said
    assert "free some space" in said
    assert not agent.traced
    kept = [path.name for path in (run / "checkpoints").iterdir()]
    assert kept == ["step-00000000"]
    assert status(run)[0] == "failed"
    torchrun(2, *words).wait(0)
    assert status(run) == ("finished", 8, 0)
