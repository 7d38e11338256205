"""kill -9 at any moment: the same command goes on, and the run ends byte-equal to a whole one."""

import itertools
import random
import signal
import time

import pytest

from sparsemae.files import is_locked

# the first four come one after another in one run
MOMENTS = ("stored", "stored", "save", "validation", "any", "save", "report", "any")
SAVES = ("ema", "removal", "optimizer", "meta")  # places of hold.py


def leftovers(folder):
    return [
        p for p in folder.rglob("*") if p.name.startswith((".tmp-", ".del-")) or ".tmp" in p.suffix
    ]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_moments(tmp_path, sparsemae_now, varied, as_undisturbed, workers):
    """To the process or its group; most while a certain work is under way."""
    run, chance, moments = tmp_path / "run", random.Random(workers), [*MOMENTS]
    saves, place = itertools.cycle(SAVES if workers else SAVES[::-1]), None
    words, runs = varied(run, data__workers=workers), itertools.count()
    while moments:
        moment = moments[0]
        if moment == "any":
            started = sparsemae_now(*words)
            time.sleep(chance.uniform(0, 1))
        else:
            place = place or (next(saves) if moment == "save" else moment)
            started = sparsemae_now(*words, hold=(place, chance.randrange(2)))
            started.reach_or_end()
            time.sleep(chance.uniform(0, 0.05))  # what is not held goes on
        started.kill(signal.SIGKILL, group=bool(chance.randrange(2)))
        if started.wait() == 0:  # it was done before: the moment is to come in another run
            assert as_undisturbed(run) == []
            run = tmp_path / f"run{next(runs)}"
            words = varied(run, data__workers=workers)
            continue
        assert started.code == -signal.SIGKILL, started.printed
        assert moment != "save" or leftovers(run / "checkpoints")
        assert (run / "config.toml").exists() or moment in ("stored", "any")
        moments.pop(0)
        place = None
        limit = time.monotonic() + 60
        while is_locked(run / ".lock"):  # a worker forked just now lets go of it once it runs
            assert time.monotonic() < limit
            time.sleep(0.01)
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []
    assert not leftovers(run)


@pytest.mark.parametrize("place", ["ema", "meta"])
def test_kill_9_while_the_first_checkpoint_is_written(
    tmp_path, sparsemae_now, varied, as_undisturbed, place
):
    """The run has begun, but has nothing to go on from: it takes the pre-trained weights again."""
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run), hold=(place, 0))
    started.reach()
    started.kill(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL
    assert (run / "config.toml").exists()
    assert not list(run.glob("checkpoints/step-*"))
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []


def test_kills_while_cases_are_prepared_leave_a_whole_store(
    tmp_path, sparsemae_now, varied, undisturbed
):
    """Whatever is half-written is made anew, and the store is that of a process left alone."""
    run, chance = tmp_path / "run", random.Random(0)
    for files in (0, 1, 2, 4):
        started = sparsemae_now(*varied(run, train__steps=5), hold=("stored", files))
        started.reach()
        if files:  # else it is killed between two files
            started.go_on()
            time.sleep(chance.uniform(0, 0.03))
        started.kill(signal.SIGKILL)
        assert started.wait() in (0, -signal.SIGKILL), started.printed
        if started.code == 0:  # this machine was busy
            break
    last = sparsemae_now(*varied(run, train__steps=5))
    assert last.wait() == 0, last.printed
    assert files_of(run / "store") == files_of(undisturbed / "store")


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
