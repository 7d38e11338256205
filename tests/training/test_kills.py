"""kill -9 at any moment: run again, the run ends as if nothing had happened, byte for byte."""

import itertools
import json
import random
import shutil
import signal
import time

import pytest

from sparsemae.checkpoint import clean, load_checkpoint

KILLS = 15
MOMENTS = ("start-up", "save", "validation", "any", "save", "report")
SAVES = ("model", "commit", "optimizer", "removal", "ema", "meta")  # places of hold.py


def leftovers(run):
    return [
        p for p in run.rglob("*") if p.name.startswith((".tmp-", ".del-")) or ".tmp" in p.suffix
    ]


def in_a_save(run):
    return any(p.name.startswith((".tmp-", ".del-")) for p in leftovers(run))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_kill_9_at_random_moments(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, steps_done, workers
):
    """Most while a certain work is under way."""
    run, chance, seen = tmp_path / "run", random.Random(workers), set()
    saves = itertools.cycle(SAVES if workers else SAVES[::-1])
    words, kills, place = varied(run, data__workers=workers), 0, None
    runs = itertools.count()
    while kills < KILLS:
        moment = MOMENTS[kills % len(MOMENTS)]
        timed = moment in ("start-up", "any")
        if not timed and place is None:
            place = next(saves) if moment == "save" else moment
        # now and then one is passed before, else the run would stand still
        hold = None if timed else (place, int(chance.random() < 0.4))
        started = sparsemae_now(*words, hold=hold)
        if timed:
            time.sleep(chance.uniform(0.0, 0.3 if moment == "start-up" else 1.5))
        else:
            started.reach_or_end()
            time.sleep(chance.uniform(0.0, 0.05))  # what is not held goes on
        started.kill(signal.SIGKILL, group=bool(chance.randrange(2)))
        if started.wait() == 0:  # it was done before: begin anew, with the kills counted so far
            assert_same(run, undisturbed, run_bytes, workers)
            run = tmp_path / f"run{next(runs)}"
            words = varied(run, data__workers=workers)
            continue
        assert started.code == -signal.SIGKILL, started.printed
        assert moment != "save" or in_a_save(run)
        kills, place = kills + 1, None
        seen.add(steps_done(run))
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert_same(run, undisturbed, run_bytes, workers)
    assert not leftovers(run)
    assert len(seen) > 3


@pytest.mark.parametrize("place", ["model", "meta", "commit"])
def test_kill_9_while_the_first_checkpoint_is_written(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, steps_done, place
):
    """There is none to go on from, so no step may have been done."""
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run), hold=(place, 0))
    started.reach()
    started.kill(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert not list(run.glob("checkpoints/step-*"))
    assert steps_done(run) == 0
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert_same(run, undisturbed, run_bytes, 0)


def assert_same(run, undisturbed, run_bytes, workers):
    expected, found = run_bytes(undisturbed), run_bytes(run)
    same = f"workers = {workers}".encode()
    expected["config.toml"] = expected["config.toml"].replace(b"workers = 0", same)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_what_is_left_half_written_or_half_removed_is_no_checkpoint(tmp_path, undisturbed):
    whole = undisturbed / "checkpoints"
    steps = sorted(p.name for p in whole.iterdir())
    for name in (".tmp-step-00000028", ".del-step-00000016"):
        folder = tmp_path / name / "checkpoints"
        shutil.copytree(whole, folder)
        shutil.copytree(folder / steps[-1], folder / name)
        if name.startswith(".tmp"):
            (folder / name / "meta.json").unlink()
        found, warnings = load_checkpoint(folder)
        assert (found.path.name, warnings) == (steps[-1], [])
        clean(folder)
        assert sorted(p.name for p in folder.iterdir()) == steps


def test_the_folder_is_free_at_once_after_a_kill(tmp_path, sparsemae_now, varied):
    """Loader workers live a moment longer; they must not hold the lock."""
    run = tmp_path / "run"
    words = varied(run, data__workers=2)
    for _ in range(2):
        started = sparsemae_now(*words, hold=("step", 4))
        started.reach()
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
    for name in (".tmp-step-00000099", ".del-step-00000000"):  # as kills leave them
        (run / "checkpoints" / name).mkdir(exist_ok=True)
    (run / "status.json.0a1b2c3d.tmp").write_text("{")
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in history] == ["started", *["resumed"] * 2, "finished"]
    assert not leftovers(run)
