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
WORKS = ("step", "optimizer", "step", "validation")  # places of hold.py


def status(run):
    return json.loads((run / "status.json").read_text())


def same(run, undisturbed, run_bytes):
    """Byte for byte, but for the number of loader workers."""
    found, expected = run_bytes(run), run_bytes(undisturbed)
    found["config.toml"] = found["config.toml"].replace(b"workers = 1", b"workers = 0")
    return found == expected


@pytest.mark.slow
def test_stops_at_random_moments(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, steps_done
):
    """To the process or its group, with and without workers, in saves, validations and steps."""
    chance, runs = random.Random(0), itertools.count()
    run, stops, moments = tmp_path / f"run{next(runs)}", 0, set()
    targets = list(itertools.product(("SIGTERM", "SIGUSR1"), (False, True), (0, 1)))
    chance.shuffle(targets)
    while stops < STOPS:
        name, group, workers = targets[stops % len(targets)]
        work = WORKS[stops % len(WORKS)]
        words = varied(run, data__workers=workers)
        if steps_done(run) + 8 >= 24:  # too near the end
            last = sparsemae_now(*words)
            assert last.wait() == 0, last.printed
            assert same(run, undisturbed, run_bytes)
            run = tmp_path / f"run{next(runs)}"
            continue
        started = sparsemae_now(*words, hold=(work, chance.randrange(2)))
        started.reach()
        time.sleep(chance.uniform(0, 0.05))  # a save is beside the steps, which go on
        at = steps_done(run)
        started.kill(getattr(signal, name), group=group)
        started.go_on()
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
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes
):
    run = tmp_path / "run"
    started = sparsemae_now(*varied(run), hold=("step", 5))
    started.reach()
    started.kill(signal.SIGINT, group=True)
    started.go_on()
    assert started.wait() == 130, started.printed
    assert "Traceback" not in started.printed
    assert status(run)["state"] == "interrupted"
    last = sparsemae_now(*varied(run))
    assert last.wait() == 0, last.printed
    assert same(run, undisturbed, run_bytes)


@pytest.mark.parametrize("at", ["first save", "step"])
def test_a_second_ctrl_c_waits_for_nothing(
    tmp_path, sparsemae_now, varied, undisturbed, run_bytes, steps_done, at
):
    """Neither for the end of a step nor for a checkpoint, which takes for ever here."""
    run = tmp_path / "run"
    words = varied(run, data__workers=1)  # which gets it twice, too
    if at == "step":
        started = sparsemae_now(*words, hold=("step", 2))
        started.reach()
        started.kill(signal.SIGKILL)
        started.wait()
    before = steps_done(run)
    started = sparsemae_now(*words, hold=("model", 0))
    started.reach()
    assert at != "step" or steps_done(run) > before
    begun = time.monotonic()
    started.kill(signal.SIGINT, group=True)
    time.sleep(0.05)
    assert not started.ended
    while not started.ended:  # two that come as one are one
        started.kill(signal.SIGINT, group=True)
        time.sleep(0.5)
        assert time.monotonic() - begun < 10
    assert started.wait() == 130, started.printed
    assert "Traceback" not in started.printed
    found = status(run)
    assert (found["state"], found["exit_code"]) == ("interrupted", 130)
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    assert same(run, undisturbed, run_bytes)
