"""kill -9 at any moment: run again, the run ends as if nothing had happened, byte for byte."""

import json
import random
import shutil
import signal
import time
from collections import Counter

import pytest

from sparsemae.checkpoint import clean, load_checkpoint

KILLS = 30
MOMENTS = ("start-up", "save", "validation", "any", "save", "report")


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
    """Half of the kills of each case; most wait for a certain work to be under way."""
    run, chance = tmp_path / "run", random.Random(workers)
    words, kills, hit, seen = varied(run, data__workers=workers), 0, Counter(), set()
    while kills < KILLS // 2:
        moment = MOMENTS[kills % len(MOMENTS)]
        before = steps_done(run)
        started = sparsemae_now(*words, slow=0.02)

        # now and then a save is passed before, else the run would stand still
        enough = before + 5 if chance.random() < 0.4 else 0

        def reached(run=run, started=started, moment=moment, enough=enough):
            # what an earlier kill left is gone when a step is shown
            if "step " not in started.printed or steps_done(run) < enough:
                return False
            return in_a_save(run) if moment == "save" else started.within(moment)

        if moment in ("start-up", "any"):
            time.sleep(chance.uniform(0.0, 0.3 if moment == "start-up" else 1.5))
        else:
            while not (reached() or started.ended):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0.0, 0.05))
        started.kill(signal.SIGKILL, group=bool(chance.randrange(2)))
        if started.wait() == 0:  # it was done before: begin anew, with the kills counted so far
            assert_same(run, undisturbed, run_bytes, workers)
            run = tmp_path / f"run{kills}"
            words = varied(run, data__workers=workers)
            continue
        assert started.code == -signal.SIGKILL, started.printed
        kills += 1
        seen.add(steps_done(run))
        # what is left of the kill before is removed when a run starts
        hit["save"] += moment != "start-up" and in_a_save(run)
        for work in ("validation", "report"):
            hit[work] += started.within(work)
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert_same(run, undisturbed, run_bytes, workers)
    assert not leftovers(run)
    print(f"{kills} kills, of them within {dict(hit)}")
    assert hit["save"] >= KILLS // 6
    assert hit["validation"]
    assert hit["report"]
    assert len(seen) > 3


def test_kill_9_while_the_first_checkpoint_is_written(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, until
):
    """There is none to go on from, so no step may have been done."""
    run = tmp_path / "run"
    for name in ("model", "meta"):
        started = sparsemae_now(*varied(run), slow=0.3)
        until(lambda n=name: list(run.glob(f"checkpoints/.tmp-*/{n}.*")), started)
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        assert not list(run.glob("checkpoints/step-*"))
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


def test_the_folder_is_free_at_once_after_a_kill(
    tmp_path, sparsemae_now, varied, until, steps_done
):
    """Loader workers live a moment longer; they must not hold the lock."""
    run = tmp_path / "run"
    words = varied(run, data__workers=2)
    for _ in range(2):
        started = sparsemae_now(*words)
        before = steps_done(run)
        until(lambda n=before: steps_done(run) >= n + 5, started)
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
    for name in (".tmp-step-00000099", ".del-step-00000000"):  # as kills leave them
        (run / "checkpoints" / name).mkdir()
    (run / "status.json.0a1b2c3d.tmp").write_text("{")
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in history] == ["started", *["resumed"] * 2, "finished"]
    assert not leftovers(run)
