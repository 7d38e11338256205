"""kill -9 at any moment: the same command goes on, and the run ends byte-equal to a whole one."""

import random
import signal
import time
from collections import Counter

import pytest

from sparsemae.files import is_locked

# the first four come one after another in one run
MOMENTS = ("preparing", "preparing", "save", "validation", "any", "save", "report", "any")


def leftovers(folder):
    return [
        p for p in folder.rglob("*") if p.name.startswith((".tmp-", ".del-")) or ".tmp" in p.suffix
    ]


def in_a_save(run):
    return bool(leftovers(run / "checkpoints"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_at_random_moments(
    tmp_path, sparsemae_now, varied, as_undisturbed, steps_done, workers
):
    """To the process or its group; most wait for a certain work to be under way."""
    run, chance, hit, moments = tmp_path / "run", random.Random(workers), Counter(), [*MOMENTS]
    words = varied(run, data__workers=workers)
    while moments:
        moment = moments[0]
        enough, stale = steps_done(run) + chance.randrange(3), in_a_save(run)
        started = sparsemae_now(*words, slow=0.02)

        def reached(run=run, started=started, moment=moment, enough=enough, stale=stale):
            if moment != "save":
                return started.within(moment)
            # what an earlier kill left is gone when this is said
            fresh = not stale or "resuming at" in started.printed
            return steps_done(run) >= enough and fresh and in_a_save(run)

        if moment == "any":
            time.sleep(chance.uniform(0, 1))
        else:
            while not (reached() or started.ended):
                time.sleep(0.0005)
            time.sleep(chance.uniform(0, 0.05))
        started.kill(signal.SIGKILL, group=bool(chance.randrange(2)))
        if started.wait() == 0:  # it was done before: the moment is to come in another run
            assert as_undisturbed(run) == []
            run = tmp_path / f"run{len(moments)}"
            words = varied(run, data__workers=workers)
            continue
        assert started.code == -signal.SIGKILL, started.printed
        hit[moment] += moment != "any" and reached()
        assert (run / "config.toml").exists() or moment in ("preparing", "any")
        moments.pop(0)
        limit = time.monotonic() + 5
        while is_locked(run / ".lock"):  # a worker forked just now lets go of it once it runs
            assert time.monotonic() < limit
            time.sleep(0.01)
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []
    assert not leftovers(run)
    print(f"{len(MOMENTS)} kills, of them within {dict(hit)}")
    assert hit["preparing"]
    assert hit["save"] + hit["validation"] >= 2


def test_kill_9_while_the_first_checkpoint_is_written(
    tmp_path, sparsemae_now, varied, as_undisturbed, until
):
    """The run has begun, but has nothing to go on from: it takes the pre-trained weights again."""
    run = tmp_path / "run"
    for name in ("ema", "meta"):
        started = sparsemae_now(*varied(run), slow=0.1)
        until(lambda n=name: list(run.glob(f"checkpoints/.tmp-*/{n}.*")), started)
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        assert (run / "config.toml").exists()
        assert not list(run.glob("checkpoints/step-*"))
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert as_undisturbed(run) == []


def test_kills_while_cases_are_prepared_leave_a_whole_store(
    tmp_path, sparsemae_now, varied, undisturbed, until
):
    """Whatever is half-written is made anew, and the store is that of a process left alone."""
    run, chance = tmp_path / "run", random.Random(0)
    for done in range(4):
        started = sparsemae_now(*varied(run, train__steps=5), slow=0.02)
        until(lambda n=done: len(list(run.glob("store/*/labels/*.b2nd"))) >= n, started)
        time.sleep(chance.uniform(0, 0.1))
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL, started.printed
    last = sparsemae_now(*varied(run, train__steps=5))
    assert last.wait() == 0, last.printed
    assert files_of(run / "store") == files_of(undisturbed / "store")


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
