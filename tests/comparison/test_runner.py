"""Jobs end, fail, stop and go on; nothing is done twice and nothing is mixed up."""

import io
import json
import os
import signal
import threading
import time

import pytest
from rich.console import Console

from sparsemae.comparison.jobs import chosen
from sparsemae.comparison.runner import check_same, run_jobs, state
from sparsemae.errors import UserError
from sparsemae.files import locked


@pytest.fixture
def run(stand_in):
    def run(jobs, stop=lambda: 0):
        console = Console(file=io.StringIO(), width=300)
        outcome = run_jobs(jobs, stand_in.program, stop=stop, console=console)
        return outcome, console.file.getvalue()

    return run


def record(job):
    return json.loads((job.folder / "job.json").read_text())


def test_stages_run_in_order_and_only_once(jobs, run, stand_in):
    few = jobs[:2]
    outcome, _ = run(few)
    assert (outcome.code, outcome.counts["finished"]) == (0, 2)
    stages = ["finetune", "predict", "evaluate"]
    assert [call[:2] for call in stand_in.calls] == [[j.id, s] for j in few for s in stages]
    assert [state(job) for job in jobs[:3]] == ["finished", "finished", "waiting"]
    assert record(few[0])["done"] == stages
    stand_in.forget()
    outcome, _ = run(few)
    assert (outcome.code, outcome.counts["skipped"], stand_in.calls) == (0, 2, [])


def test_a_failure_keeps_nobody_else_from_running(jobs, run, stand_in):
    few = jobs[:3]
    stand_in.plan(fail=[f"{few[0].id}:predict"])
    outcome, printed = run(few)
    assert (outcome.code, outcome.counts["failed"], outcome.counts["finished"]) == (3, 1, 2)
    said = f"{few[0].id}: predict ended with 1: out of luck; in full: {few[0].folder / 'log.txt'}"
    assert outcome.messages == [said]
    assert f"failed: {said}" in printed
    assert record(few[0])["state"] == "failed"
    assert "out of luck" in (few[0].folder / "log.txt").read_text()

    stand_in.plan()
    stand_in.forget()
    outcome, _ = run(few)
    assert (outcome.code, outcome.counts["finished"]) == (0, 1)
    assert [call[1] for call in stand_in.calls] == ["predict", "evaluate"]  # it was fine-tuned


def test_an_evaluation_without_a_result_has_failed(jobs, run, stand_in):
    stand_in.plan(nothing=[jobs[0].id])
    outcome, _ = run(jobs[:1])
    assert outcome.code == 3
    assert "metrics.json is missing" in outcome.messages[0]
    stand_in.plan()
    stand_in.forget()
    assert run(jobs[:1])[0].code == 0
    assert [call[1] for call in stand_in.calls] == ["evaluate"]


def test_a_result_that_is_gone_is_made_again(jobs, run, stand_in):
    run(jobs[:1])
    jobs[0].metrics.unlink()
    assert state(jobs[0]) == "waiting"
    stand_in.forget()
    assert run(jobs[:1])[0].code == 0
    assert [call[1] for call in stand_in.calls] == ["evaluate"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"definition": 3}', b"\xff"])
def test_a_damaged_record_means_starting_over(jobs, run, stand_in, damage):
    run(jobs[:1])
    (jobs[0].folder / "job.json").write_bytes(damage)
    assert state(jobs[0]) == "waiting"
    stand_in.forget()
    assert run(jobs[:1])[0].code == 0
    assert len(stand_in.calls) == 3


def test_results_of_another_definition_are_not_taken_over(jobs, run, tmp_path):
    mae = next(job for job in jobs if job.method.name == "mae")
    run([mae])
    check_same(jobs)
    (tmp_path / "fast.toml").write_text("seed = 0\n[train]\nsteps = 3\n")
    assert state(mae) != "finished"
    with pytest.raises(UserError, match=rf"job {mae.id}: made with another config; choose anoth"):
        check_same(jobs)


def test_a_job_in_use_is_left_to_who_uses_it(jobs, run, stand_in):
    jobs[0].folder.mkdir(parents=True)
    with locked(jobs[0].folder / ".lock", busy=""):
        outcome, printed = run(jobs[:2])
    assert (outcome.code, outcome.counts["in use"], outcome.counts["finished"]) == (0, 1, 1)
    assert f"{jobs[0].id}: in use by another process; left to it" in printed
    assert {call[0] for call in stand_in.calls} == {jobs[1].id}


def test_two_processes_share_a_grid(jobs, run, stand_in):
    """Both are given all jobs; every stage of each runs once."""
    codes = []
    threads = [threading.Thread(target=lambda: codes.append(run(jobs)[0].code)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0]
    assert all(state(job) == "finished" for job in jobs)
    assert len(stand_in.calls) == 3 * len(jobs)
    assert len({tuple(call[:2]) for call in stand_in.calls}) == 3 * len(jobs)


def stop_when(path, code):
    """As a signal that comes once there is a file."""
    limit = time.monotonic() + 20

    def stop():
        assert time.monotonic() < limit
        return code if path.exists() else 0

    return stop


@pytest.mark.parametrize("code", [85, 130])
def test_a_stop_is_handed_on_and_all_of_it_goes_on_later(jobs, run, stand_in, code):
    stand_in.plan(hang=[f"{jobs[1].id}:finetune"])
    outcome, _ = run(jobs[:3], stop=stop_when(stand_in.folder / "hanging", code))
    assert outcome.code == code
    assert (stand_in.folder / "signalled").exists()
    assert [state(job) for job in jobs[:3]] == ["finished", "stopped", "waiting"]
    assert "stopped at step 3" in (jobs[1].folder / "log.txt").read_text()
    stand_in.plan()
    stand_in.forget()
    outcome, _ = run(jobs[:3])
    assert (outcome.code, outcome.counts["finished"]) == (0, 2)
    assert jobs[0].id not in {call[0] for call in stand_in.calls}


def test_a_command_that_was_stopped_by_itself_stops_all(jobs, run, stand_in):
    """A scheduler may signal the process that has the GPU alone."""
    stand_in.plan(hang=[f"{jobs[0].id}:predict"])

    def signal_child():
        stop = stop_when(stand_in.folder / "hanging", 1)
        while not stop():
            time.sleep(0.01)
        for child in children():
            os.kill(child, signal.SIGTERM)

    thread = threading.Thread(target=signal_child)
    thread.start()
    outcome, _ = run(jobs[:2])
    thread.join()
    assert outcome.code == 85
    assert record(jobs[0])["done"] == ["finetune"]
    assert state(jobs[1]) == "waiting"


def children():
    """Processes of the stand-in that this one has started."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat") as file:
                    parent = int(file.read().rpartition(")")[2].split()[1])
                with open(f"/proc/{name}/cmdline") as file:
                    words = file.read()
            except OSError:
                continue
            if parent == os.getpid() and "stand-in" in words:
                yield int(name)


def test_a_killed_process_leaves_a_job_that_goes_on(jobs, run):
    run(jobs[:1])
    found = record(jobs[0]) | {"state": "running", "done": ["finetune"]}
    (jobs[0].folder / "job.json").write_text(json.dumps(found))
    assert state(jobs[0]) == "stopped"
    assert run(jobs[:1])[0].counts["finished"] == 1


def test_a_stop_before_anything_runs_starts_nothing(jobs, run, stand_in):
    outcome, _ = run(chosen(jobs, None), stop=lambda: 85)
    assert (outcome.code, stand_in.calls) == (85, [])
