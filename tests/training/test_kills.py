"""kill -9 at any moment: run again, the run ends as if nothing had happened, byte for byte."""

import json
import random
import shutil
import signal
import time

import pytest

from sparsemae.checkpoint import clean, load_checkpoint

KILLS = 30


def leftovers(run):
    return [
        p for p in run.rglob("*") if p.name.startswith((".tmp-", ".del-")) or ".tmp" in p.suffix
    ]


def in_a_save(run):
    return any(leftovers(run))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_kill_9_at_random_moments(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, steps_done, workers
):
    """Half of the kills of each case; every other one waits for a save to be under way."""
    run, chance = tmp_path / "run", random.Random(workers)
    words, kills, inside, seen = varied(run, data__workers=workers), 0, 0, set()
    while kills < KILLS // 2:
        started = sparsemae_now(*words, slow=0.02)
        begun, before = time.monotonic(), steps_done(run)
        if kills % 2:
            # one save at least is passed, else the run would stand still
            while not (steps_done(run) >= before + 5 and in_a_save(run)):
                if time.monotonic() > begun + 30 or started_has_ended(started):
                    break
                time.sleep(0.0005)
        else:
            time.sleep(chance.uniform(0.0, 0.8))
        started.kill(signal.SIGKILL, group=bool(chance.randrange(2)))
        code = started.wait()
        if code == 0:  # it was done before: begin anew, with the kills counted so far
            assert_same(run, undisturbed, run_bytes, workers)
            run = tmp_path / f"run{kills}"
            words = varied(run, data__workers=workers)
            continue
        assert code == -signal.SIGKILL
        kills += 1
        inside += in_a_save(run)
        seen.add(steps_done(run))
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert_same(run, undisturbed, run_bytes, workers)
    assert not leftovers(run)
    assert inside >= KILLS // 6
    assert len(seen) > 3


def started_has_ended(started):
    """A zombie until it is waited for."""
    try:
        with open(f"/proc/{started.pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


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
    for _ in range(3):
        started = sparsemae_now(*words)
        before = steps_done(run)
        until(lambda n=before: steps_done(run) >= n + 5, started)
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in history] == ["started", *["resumed"] * 3, "finished"]
