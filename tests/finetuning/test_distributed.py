"""Fine-tuning on several ranks: the same run as on one, stopped and gone on with together."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsemae.checkpoint import load_checkpoint
from sparsemae.files import locked
from sparsemae.finetune import load_finetuned
from sparsemae.segmentation.making import LOCK

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("rank_driver.py")
STEPS = 12
ELSEWHERE = """
import os
from pathlib import Path
from sparsemae import cli
from sparsemae.segmentation.store import LabelledStore

here = LabelledStore.open
if os.environ["RANK"] == "1":
    LabelledStore.open = lambda path: here(Path("{folder}"))
cli.main()
"""


def sparsemae(words):
    return [sys.executable, "-m", "sparsemae", *words]


def size_of(model):
    return sum(float(p.detach().double().abs().sum()) for p in model.parameters())


def assert_alike(run, other):
    """Losses, scores and weights equal to 1e-5."""
    found, expected = lines(other), lines(run)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, right in zip(found, expected, strict=True):
        for key in line:
            within = 1e-3 if key == "grad_norm" else 1e-5  # rounding decides slopes at a kink
            assert line[key] == pytest.approx(right[key], rel=within), (line["step"], key)
    last, right = (load_checkpoint(r / "checkpoints")[0] for r in (other, run))
    for kind in ("model", "ema"):
        ours, theirs = getattr(last, kind)(), getattr(right, kind)()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=1e-5, rtol=0)
    average = last.ema()
    assert not all(torch.equal(tensor, average[name]) for name, tensor in last.model().items())


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def watched(torchrun, varied, tmp_path_factory):
    """`watched(ranks, key=value)`: a run, and what each of its ranks saw."""

    def start(ranks, **changes):
        folder = tmp_path_factory.mktemp("watched")
        words = varied(folder / "run", **changes)
        command = [sys.executable, DRIVER, folder / "seen", *words]
        if ranks == 1:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        else:
            torchrun(ranks, *command).wait(0)
        seen = [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]
        assert len(seen) == ranks
        return folder / "run", seen

    return start


@pytest.fixture(scope="module")
def alone(watched):
    return watched(1)


@pytest.fixture(scope="module")
def two_ranks(watched):
    return watched(2, data__workers=2)


@pytest.fixture(params=["two ranks", "two parts"])
def other(request, watched):
    if request.param == "two ranks":
        return request.getfixturevalue("two_ranks")
    return watched(1, train__accumulate=2, data__workers=2)


def test_any_number_of_ranks_is_the_same_run(alone, other, as_undisturbed, start):
    """The same samples from the same weights; losses and weights equal to 1e-5 over 12 steps."""
    (run, (one,)), (run_2, seen) = alone, other
    assert as_undisturbed(run) == []  # being watched changes nothing
    samples = {key: value for part in seen for key, value in part["samples"].items()}
    assert len(samples) == sum(len(part["samples"]) for part in seen) == 2 * STEPS
    assert samples == one["samples"]
    assert len({tuple(value) for value in samples.values()}) == 2 * STEPS
    encoder = size_of(load_finetuned(start).network.encoder)
    for part in seen:  # what rank 0 alone has read would show in the others' average
        assert part["start"] == one["start"]
        assert part["encoder"] == pytest.approx([encoder] * 2, rel=1e-12)
        assert part["end"] == seen[0]["end"]
        assert part["end"]["average"] != part["end"]["network"]
    assert sum("val_loss" in line for line in lines(run)) == 4
    assert_alike(run, run_2)


def test_one_dice_of_a_batch_is_over_all_ranks(
    tmp_path, torchrun, varied, sparsemae_now, small_plans
):
    """As nnU-Net's plan may ask; parts of a batch would be another loss."""
    plans, raw = tmp_path / "plans.json", json.loads(small_plans.read_text())
    raw["configurations"]["3d_fullres"]["batch_dice"] = True
    plans.write_text(json.dumps(raw))
    options = {"store": tmp_path / "stores", "plans": plans}
    alone = sparsemae_now(*varied(tmp_path / "one", **options))
    assert alone.wait() == 0, alone.printed
    torchrun(2, *sparsemae(varied(tmp_path / "two", **options))).wait(0)
    assert_alike(tmp_path / "one", tmp_path / "two")
    parts = sparsemae_now(*varied(tmp_path / "parts", train__accumulate=2, **options))
    assert parts.wait() == 2, parts.printed
    assert "train.accumulate 2: the plan has one Dice over a whole batch" in parts.printed
    assert not (tmp_path / "parts" / "config.toml").exists()


def test_a_rank_that_lacks_what_rank_0_has_says_so(tmp_path, torchrun, varied):
    """On another machine, where the folder of prepared cases is another one."""
    code = ELSEWHERE.format(folder=str(tmp_path / "nowhere"))
    agent = torchrun(2, sys.executable, "-c", code, *varied(tmp_path / "run"))
    agent.wait(1)
    (said,) = [line for line in agent.errors if "rank 1, unlike rank 0" in line]
    assert str(tmp_path / "nowhere") in said
    assert not agent.traced
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_killed_ranks_go_on_and_end_byte_equal(
    tmp_path, torchrun, varied, two_ranks, steps_done, run_bytes, held_at
):
    run, held = tmp_path / "run", held_at("step", 4)
    words = varied(run, data__workers=2)
    agent = torchrun(2, sys.executable, *held.words, *words)
    agent.until(lambda: len(held.pids) == 2)
    for pid in [agent.rank(rank) for rank in (1, 0)]:
        os.kill(pid, signal.SIGKILL)
    agent.wait(1)
    assert steps_done(run) < STEPS
    torchrun(2, *sparsemae(words)).wait(0)
    assert run_bytes(run) == run_bytes(two_ranks[0])


def test_a_stop_before_the_first_step_is_one_of_all_ranks(tmp_path, torchrun, varied, two_ranks):
    """Rank 0 waits for another process that prepares; the others for it."""
    run, (name,) = tmp_path / "run", (path.name for path in (two_ranks[0] / "store").iterdir())
    folder = tmp_path / "stores" / name
    folder.mkdir(parents=True)
    with locked(folder / LOCK, busy=""):
        agent = torchrun(2, *sparsemae(varied(run, store=folder.parent)))
        agent.until(lambda: "another process prepares it; waiting" in agent.printed)
        os.kill(agent.rank(0), signal.SIGTERM)
        agent.wait(1)
    assert agent.printed.count("stopped before the first step as asked") == 1
    assert not agent.errors
    assert not agent.traced
    assert not (run / "config.toml").exists()
