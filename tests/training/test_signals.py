"""Stopped by a scheduler or by hand: a whole checkpoint, the right exit code, and nothing lost."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

STOPS = 20
TARGETS = list(itertools.product(("SIGTERM", "SIGUSR1"), (False, True), (0, 1), (0.0, 0.02)))


def status(run):
    return json.loads((run / "status.json").read_text())


def same(run, undisturbed, run_bytes):
    """Byte for byte, but for the number of loader workers."""
    found, expected = run_bytes(run), run_bytes(undisturbed)
    found["config.toml"] = found["config.toml"].replace(b"workers = 1", b"workers = 0")
    return found == expected


@pytest.mark.slow
def test_stops_at_random_moments(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, until, steps_done
):
    """To the process or its group, with and without workers, in and between saves."""
    chance, runs = random.Random(0), itertools.count()
    run, stops, moments = tmp_path / f"run{next(runs)}", 0, set()
    while stops < STOPS:
        name, group, workers, slow = TARGETS[stops % len(TARGETS)]
        words = varied(run, data__workers=workers)
        before = steps_done(run)
        started = sparsemae_now(*words, slow=slow)
        if before + 8 >= 24:  # too near the end
            assert started.wait() == 0, started.printed
            assert same(run, undisturbed, run_bytes)
            run = tmp_path / f"run{next(runs)}"
            continue
        wanted = before + chance.randrange(1, 6)
        until(lambda run=run, n=wanted: steps_done(run) >= n, started)
        time.sleep(chance.uniform(0, 0.05))
        at = steps_done(run)
        started.kill(getattr(signal, name), group=group)
        assert started.wait() == 85, started.printed
        assert "Traceback" not in started.printed
        assert "stopped at step" in started.printed
        done = steps_done(run)
        assert done - at <= 2
        found = status(run)
        assert (found["state"], found["exit_code"], found["step"]) == ("preempted", 85, done)
        assert (run / "checkpoints" / f"step-{done:08d}" / "meta.json").exists()
        stops += 1
        moments.add(done)
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert same(run, undisturbed, run_bytes)
    assert status(run)["state"] == "finished"
    assert len(moments) > 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_while_it_still_imports_stops_it_after_a_step(tmp_path, varied, name):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "sparsemae", *map(str, varied(run))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    # the handler is set before torch is imported, and typer is there by then
    limit = time.monotonic() + 30
    while not caught(process.pid, getattr(signal, name)):
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(getattr(signal, name))
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 85, printed
    assert "stopped at step 1 as asked" in printed
    assert status(run)["state"] == "preempted"


def caught(pid, name):
    with open(f"/proc/{pid}/status") as file:
        mask = next(line for line in file if line.startswith("SigCgt")).split()[1]
    return bool(int(mask, 16) >> (name - 1) & 1)


def test_ctrl_c_stops_cleanly_with_the_code_of_an_interrupt(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, until, steps_done
):
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run))
    until(lambda: steps_done(run) >= 6, started)
    started.kill(signal.SIGINT, group=True)
    assert started.wait() == 130, started.printed
    assert "Traceback" not in started.printed
    assert status(run)["state"] == "interrupted"
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert same(run, undisturbed, run_bytes)


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path, sparsemae_now, varied, until):
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run), slow=3.0)  # its first checkpoint takes seconds
    until(lambda: list(run.glob("checkpoints/.tmp-*")), started)
    begun = time.monotonic()
    for _ in range(2):
        started.kill(signal.SIGINT)
        time.sleep(0.05)
    code = started.wait()
    assert code in (130, -signal.SIGINT, 1), started.printed
    assert status(run)["state"] == "interrupted"
    assert time.monotonic() - begun < 60
