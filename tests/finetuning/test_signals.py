"""Stopped by a scheduler or by hand: the right exit code, and the same command goes on."""

import itertools
import json
import random
import signal
import time

import pytest

from sparsemae.files import locked
from sparsemae.segmentation.making import LOCK
from sparsemae.segmentation.store import LabelledStore

STOPS = 8
BEFORE = "stopped before the first step as asked; the same command goes on\n"


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.mark.slow
def test_stops_at_random_moments(tmp_path, sparsemae_now, varied, as_undisturbed, steps_done):
    """To the process or its group, with and without workers, some of them within a save."""
    chance, runs, stops, moments = random.Random(0), itertools.count(), 0, set()
    run, store = tmp_path / f"run{next(runs)}", tmp_path / "stores"
    targets = list(itertools.product(("SIGTERM", "SIGUSR1"), (False, True), (0, 2)))
    chance.shuffle(targets)
    while stops < STOPS:
        name, group, workers = targets[stops]
        words = varied(run, store=store, data__workers=workers)
        if steps_done(run) > 7:  # too near the end
            last = sparsemae_now(*words)
            assert last.wait() == 0, last.printed
            assert as_undisturbed(run) == []
            run = tmp_path / f"run{next(runs)}"
            continue
        place = "optimizer" if stops % 2 else "step"
        started = sparsemae_now(*words, hold=(place, chance.randrange(2)))
        started.reach()
        time.sleep(chance.uniform(0, 0.03))  # a save is beside the steps, which go on
        at = steps_done(run)
        started.kill(getattr(signal, name), group=group)
        started.go_on()
        assert started.wait() == 85, started.printed
        assert "Traceback" not in started.printed
        done = steps_done(run)
        assert done - at <= 2
        assert f"stopped at step {done} as asked" in started.printed
        found = status(run)
        assert (found["state"], found["exit_code"], found["step"]) == ("preempted", 85, done)
        assert (run / "checkpoints" / f"step-{done:08d}" / "meta.json").exists()
        stops += 1
        moments.add(done)
    last = sparsemae_now(*varied(run, store=store))
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []
    assert status(run)["state"] == "finished"
    assert len(moments) > 3


@pytest.mark.parametrize(
    ("name", "group", "code"),
    [("SIGTERM", False, 85), ("SIGUSR1", True, 85), ("SIGINT", True, 130)],
)
def test_a_stop_while_it_prepares_keeps_what_is_prepared(
    tmp_path, sparsemae_now, varied, as_undisturbed, name, group, code
):
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run), hold=("preparing", 1))
    started.reach()
    started.kill(getattr(signal, name), group=group)
    started.go_on()
    assert started.wait() == code, started.printed
    assert "Traceback" not in started.printed
    assert BEFORE in started.printed
    assert not (run / "config.toml").exists()
    (folder,) = (path for path in (run / "store").iterdir() if path.is_dir())
    kept = {file for case in LabelledStore.open(folder).cases for file in case.files}
    assert 0 < len(kept) < 12
    times = {file.file: (folder / file.file).stat().st_mtime_ns for file in kept}
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []
    assert times == {file: (folder / file).stat().st_mtime_ns for file in times}


def test_a_stop_while_it_looks_at_the_cases(tmp_path, sparsemae_now, varied):
    """There is no plan.json to go by; what was seen is lost, what is kept is whole."""
    run = tmp_path / "run"
    words = [word for word in varied(run) if "plan.file" not in str(word)]
    started = sparsemae_now(*words, hold=("looking", 1))
    started.reach()
    started.kill(signal.SIGTERM)
    started.go_on()
    assert started.wait() == 85, started.printed
    assert BEFORE in started.printed
    assert "prepared" not in started.printed
    assert not list(run.glob("store/*.json"))
    last = sparsemae_now(*words, "--set=train.steps=5")
    assert last.wait() == 0, last.printed
    assert json.loads((run / "plan.json").read_text())["planner"] == "like_pretrained"


def test_a_stop_while_another_process_prepares(
    tmp_path, sparsemae_now, varied, undisturbed, as_undisturbed, until
):
    """It waits for it, and can be stopped then, too."""
    run, (name,) = tmp_path / "run", (path.name for path in (undisturbed / "store").iterdir())
    folder = tmp_path / "stores" / name
    folder.mkdir(parents=True)
    with locked(folder / LOCK, busy=""):
        started = sparsemae_now(*varied(run, store=folder.parent))
        until(lambda: "another process prepares it; waiting" in started.printed, started)
        started.kill(signal.SIGTERM)
        assert started.wait() == 85, started.printed
        assert BEFORE in started.printed
    last = sparsemae_now(*varied(run, store=folder.parent))
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []
