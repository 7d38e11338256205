"""Worker processes that are killed, hang, raise, or lose their parent."""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sparsemae.data.making.workers import Lost, run_jobs

JOBS = """
import os, pathlib, signal, time

def run(job):
    kind, argument = job
    if kind == "square":
        return argument * argument
    if kind == "pid":
        return os.getpid()
    if kind == "environment":
        return os.environ[argument]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(7)
    if kind == "kill once" and not os.path.exists(argument):
        pathlib.Path(argument).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hang":
        time.sleep(600)
    if kind == "group":
        os.kill(os.getpid(), argument)
        return "ignored"
    if kind == "write":
        with open(argument, "w") as file:
            file.write(str(os.getpid()))
        time.sleep(600)
    if kind == "full":
        raise OSError(28, "No space left on device")
    if kind == "odd":
        class Local(Exception):
            pass
        raise Local("cannot be pickled")
    return "survived"
"""


@pytest.fixture
def working(children):
    """Living processes that the test started, but multiprocessing's own resource tracker."""
    before = set(children(os.getpid()))  # such as a server that other tests share

    def find():
        found = filter(_alive, set(children(os.getpid())) - before)
        return {pid for pid in found if "resource_tracker" not in _command(pid)}

    return find


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that the processes can import, from a module of its own."""
    (tmp_path / "sparsemae_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("sparsemae_jobs")
    yield module.run
    sys.modules.pop("sparsemae_jobs")


def squares(count):
    return [("square", i) for i in range(count)]


def test_without_processes_jobs_run_here_in_order(run):
    found = list(run_jobs(run, [*squares(3), ("pid", None)], 0))
    assert [result for _, result in found] == [0, 1, 4, os.getpid()]


def test_every_job_is_done_once_by_other_processes(run):
    jobs = [*squares(40), ("pid", 0), ("environment", "OMP_NUM_THREADS")]
    found = dict(run_jobs(run, jobs, 2))
    assert len(found) == len(jobs)
    assert all(found["square", i] == i * i for i in range(40))
    assert found["pid", 0] != os.getpid()
    assert found["environment", "OMP_NUM_THREADS"] == "1"


def test_no_job_no_process(run):
    assert list(run_jobs(run, [], 2)) == []


@pytest.mark.parametrize(("kind", "reason"), [("kill", "signal SIGKILL"), ("exit", "exit code 7")])
def test_a_job_that_ends_its_process_is_given_up_and_the_rest_goes_on(run, kind, reason):
    found = dict(run_jobs(run, [(kind, 0), *squares(12)], 2))
    lost = found.pop((kind, 0))
    assert isinstance(lost, Lost)
    assert lost.code == "worker.killed"
    assert reason in lost.reason
    assert found == {("square", i): i * i for i in range(12)}


def test_a_job_is_tried_again_after_all_others(run, tmp_path):
    found = list(run_jobs(run, [("kill once", str(tmp_path / "seen")), *squares(9)], 2))
    assert found[-1] == (("kill once", str(tmp_path / "seen")), "survived")
    assert len(found) == 10


def test_a_hanging_job_is_given_up(run):
    began = time.monotonic()
    found = dict(run_jobs(run, [("hang", 0), *squares(5)], 2, timeout=4))
    assert found["hang", 0].code == "worker.timeout"
    assert "4 s" in found["hang", 0].reason
    assert len(found) == 6
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_workers_outlive_what_a_scheduler_sends_to_the_group(run, name):
    job = ("group", getattr(signal, name))
    assert list(run_jobs(run, [job], 1)) == [(job, "ignored")]


def test_an_exception_ends_the_run_and_no_process_is_left(run, working):
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_jobs(run, [("full", 0), ("hang", 0), ("hang", 1)], 2))
    assert caught.value.errno == 28
    assert working() == set()
    with pytest.raises(RuntimeError, match="Local: cannot be pickled"):
        list(run_jobs(run, [("odd", 0)], 1))


def test_a_left_iterator_leaves_no_process(run, working):
    results = run_jobs(run, [*squares(4), ("hang", 0), ("hang", 1)], 2)
    next(results)
    results.close()
    assert working() == set()


def test_stopping_finishes_what_was_begun(run):
    stop = []
    done = []
    for job, result in run_jobs(run, squares(50), 2, stopped=lambda: bool(stop)):
        done.append((job, result))
        stop.append(1)
    assert 1 <= len(done) <= 3
    assert all(result == job[1] ** 2 for job, result in done)


def test_an_idle_worker_may_be_killed(run, working):
    """As the kernel does when memory is short: nothing is lost, nothing waits for ever."""
    results = run_jobs(run, [*squares(2), *squares(30)], 2)
    found = [next(results)]
    for pid in working():
        os.kill(pid, signal.SIGKILL)
    found += results
    assert sorted(r for _, r in found) == sorted([0, 1, *(i * i for i in range(30))])


def test_workers_that_cannot_start_are_an_error(run, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr("multiprocessing.spawn._python_exe", b"/bin/false")
    with pytest.raises(RuntimeError, match="while they started"):
        list(run_jobs(run, squares(3), 1))


def test_workers_end_with_their_parent(tmp_path):
    """Also when it is killed, as by a scheduler or for memory."""
    (tmp_path / "sparsemae_jobs.py").write_text(JOBS)
    pid_file = tmp_path / "pid"
    code = f"""
import sparsemae_jobs
from sparsemae.data.making.workers import run_jobs
if __name__ == "__main__":
    list(run_jobs(sparsemae_jobs.run, [("write", {str(pid_file)!r})], 1))
"""
    (tmp_path / "main.py").write_text(code)
    parent = subprocess.Popen([sys.executable, tmp_path / "main.py"])
    _until(lambda: pid_file.exists() and pid_file.read_text())
    worker = int(pid_file.read_text())
    parent.kill()
    parent.wait()
    _until(lambda: not _alive(worker))


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _command(pid: int) -> str:
    with open(f"/proc/{pid}/cmdline") as file:
        return file.read()


def _until(condition, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit
        threading.Event().wait(0.02)
