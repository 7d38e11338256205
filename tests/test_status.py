"""Where a run stands, in words and for scripts."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from sparsemae.cli import app
from sparsemae.errors import UserError
from sparsemae.files import is_locked, locked
from sparsemae.status import describe, read_status


@pytest.fixture
def run(tmp_path):
    """A run of 100 steps that is at step 60."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.toml").write_text("seed = 0\n")
    lines = [{"step": i, "loss": 1 / i, "lr": 0.1, "grad_norm": 1.0} for i in range(1, 61)]
    lines.append({"step": 60, "val_loss": 0.5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    times = [{"step": i, "seconds": 2.0} for i in range(1, 61)] + [{"step": 60, "save_seconds": 9}]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    status(folder)
    (folder / ".lock").touch()
    return folder


def status(run, **changes):
    values = {"state": "running", "step": 50, "steps": 100, "checkpoint": 50, "store": "/s"}
    values |= {"best": {"step": 50, "val_loss": 0.5}, "message": "", "exit_code": None}
    (run / "status.json").write_text(json.dumps(values | changes))


def test_a_running_one_tells_how_far_it_is(run):
    with locked(run / ".lock", busy=""):
        found = read_status(run)
    assert (found.state, found.step, found.steps, found.checkpoint) == ("running", 60, 100, 50)
    assert found.loss == pytest.approx(sum(1 / i for i in range(11, 61)) / 50)
    assert found.seconds_per_step == 2.0
    text = describe(found).split("\n")
    assert text[0] == f"{run}: running, step 60 of 100 (60%)"
    assert "2 s per step, 0:01:26 left" in text
    assert "best validation 0.5000 at step 50" in text


def test_one_without_a_process_was_killed(run):
    found = read_status(run)
    assert found.state == "killed"
    assert describe(found).split("\n")[-1].endswith(f"sparsemae pretrain /s -o {run} --resume")


@pytest.mark.parametrize("state", ["preempted", "interrupted", "failed", "finished"])
def test_one_that_ended_says_what_to_do(run, state):
    status(run, state=state, message="disk full" if state == "failed" else "", exit_code=1)
    text = describe(read_status(run)).split("\n")
    assert state in text[0]
    assert ("--resume" in text[-1]) == (state != "finished")
    assert ("disk full" in text) == (state == "failed")


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[1]", b"\xff", b'{"state": 3, "steps": "x"}']
)
def test_without_a_status_the_logs_tell(run, content):
    (run / "status.json").unlink()
    if content is not None:
        (run / "status.json").write_bytes(content)
    found = read_status(run)
    assert (found.state, found.step) == ("unknown", 60)
    assert "status.json is missing or damaged" in describe(found).split("\n")[-1]


def test_a_log_cut_in_a_line_is_read_to_the_line_before(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "lo')
    assert read_status(run).step == 60


def test_only_the_end_of_a_long_log_is_read(run, monkeypatch):
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(61, 20_000):
            file.write(json.dumps({"step": step, "loss": 0.25, "lr": 0.1, "grad_norm": 1.0}) + "\n")
    read = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: read.append(1) or loads(text))
    found = read_status(run)
    assert (found.step, found.loss) == (19_999, 0.25)
    assert len(read) < 2000


def test_only_finite_numbers_count(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in enumerate(["true", "NaN", "1e400", '"1"', "null", "[1]"] * 20, 61):
            file.write(f'{{"step": {step}, "loss": {loss}}}\n')
    found = read_status(run)
    assert (found.step, found.loss) == (180, pytest.approx(sum(1 / i for i in range(11, 61)) / 50))


def test_lines_longer_than_usual_are_found_at_the_end(run):
    cases = [f"{i:0100}" for i in range(3000)]
    with (run / "metrics.jsonl").open("a") as file:
        for step in (61, 62):
            line = {"step": step, "loss": 9.0, "lr": 0.1, "grad_norm": 1.0, "spike": True}
            file.write(json.dumps(line | {"cases": cases}) + "\n")
    found = read_status(run)
    assert found.step == 62
    assert found.loss == pytest.approx((18 + sum(1 / i for i in range(13, 61))) / 50)


def test_one_that_ended_while_it_was_looked_at_was_not_killed(run, monkeypatch):
    def ends(path):
        status(run, state="finished")
        return False

    monkeypatch.setattr("sparsemae.status.is_locked", ends)
    assert read_status(run).state == "finished"


def test_what_to_type_survives_names_with_spaces(run):
    status(run, store="/my data/it's")
    moved = run.rename(run.with_name("a run"))
    last = describe(read_status(moved)).split("\n")[-1]
    words = shlex.split(last.partition("; ")[2])
    assert words == ["sparsemae", "pretrain", "/my data/it's", "-o", str(moved), "--resume"]


def test_speed_is_told_in_samples_too(run):
    times = [{"step": i, "seconds": 2.0, "samples": 6} for i in range(1, 61)]
    (run / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in times))
    assert "2 s per step, 3 samples per second" in describe(read_status(run)).split("\n")


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no run there .*sparsemae pretrain"):
        read_status(tmp_path)


def test_the_command_prints_lines_or_json(run):
    command = [sys.executable, "-m", "sparsemae", "status", str(run)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.startswith(f"{run}: killed, step 60 of 100 (60%)\n")
    as_json = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(as_json.stdout)["state"] == "killed"
    assert {c.name or c.callback.__name__ for c in app.registered_commands} >= {"status", "report"}


def test_a_look_at_a_lock_takes_nothing(tmp_path):
    path = tmp_path / "lock"
    assert not is_locked(path)
    assert not path.exists()
    with locked(path, busy="busy"):
        assert is_locked(path)
        with pytest.raises(UserError, match="busy"), locked(path, busy="busy"):
            pass
    assert not is_locked(path)


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    """Loader workers live a moment longer than a process that was killed."""
    path = tmp_path / "lock"
    ready, go = os.pipe(), os.pipe()
    with locked(path, busy="busy"):
        child = os.fork()
        if not child:
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        assert is_locked(path)
    try:
        assert not is_locked(path)
        with locked(path, busy="busy"):
            pass
    finally:
        os.write(go[1], b"x")
        os.waitpid(child, 0)
