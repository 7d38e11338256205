"""Jobs on a real Dask cluster on loopback: a scheduler and two workers, one killed on the way."""

import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from sparsemae.data.making.cluster import connected, run_on_dask
from sparsemae.data.making.workers import Lost
from sparsemae.data.preprocess import preprocess
from sparsemae.errors import UserError

pytest.importorskip("distributed", reason="Dask is not installed")
pytestmark = pytest.mark.slow

JOBS = """
import os, pathlib, signal, time

def run(job):
    kind, argument = job
    if kind == "square":
        return argument * argument, os.getpid()
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "wait":  # until the file is there
        pathlib.Path(argument + f".{os.getpid()}").touch()
        while not os.path.exists(argument):
            time.sleep(0.02)
        return "waited", os.getpid()
    raise OSError(28, "No space left on device")
"""


def on_cluster(cluster, function, jobs, folder, **options):
    with connected(cluster.address) as client:
        yield from run_on_dask(function, jobs, client, folder, **options)


class Cluster:
    """A scheduler and workers as a person would start them, by the `dask` command."""

    def __init__(self, folder, allowed=3, workers=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.folder, self.address = folder, f"tcp://127.0.0.1:{port}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed),
        }
        self.scheduler = self._start(
            *("scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard")
        )
        self.workers = [
            self._start(
                *("worker", self.address, "--nthreads", "1", "--no-dashboard", "--no-nanny"),
                *("--host", "127.0.0.1", "--local-directory", str(folder / f"worker{i}")),
            )
            for i in range(workers)
        ]

    def _start(self, *words):
        return subprocess.Popen(
            [sys.executable, "-m", "dask", *words],
            env=self.environment,
            cwd=self.folder,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def close(self):
        for process in (*self.workers, self.scheduler):
            os.killpg(process.pid, signal.SIGKILL)  # with what a nanny started
            process.wait()


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "sparsemae_dask_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("sparsemae_dask_jobs").run
    sys.modules.pop("sparsemae_dask_jobs")


@pytest.fixture
def start(tmp_path):
    started = []

    def start(**options):
        started.append(Cluster(tmp_path, **options))
        return started[-1]

    yield start
    for cluster in started:
        cluster.close()


def test_two_workers_share_the_jobs_and_one_is_killed(run, start, tmp_path):
    cluster, release = start(), tmp_path / "release"
    jobs = [("wait", str(release)), ("wait", str(release)), *(("square", i) for i in range(60))]
    results = on_cluster(cluster, run, jobs, tmp_path)

    def kill_one_that_works():
        limit = time.monotonic() + 60
        while not (busy := list(tmp_path.glob("release.*"))):
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(int(busy[0].suffix[1:]), signal.SIGKILL)
        release.touch()

    killer = threading.Thread(target=kill_one_that_works)
    killer.start()
    found = list(results)
    killer.join()
    assert sorted(job for job, _ in found) == sorted(jobs)
    for (kind, argument), result in found:
        assert result[0] == ("waited" if kind == "wait" else argument * argument)
    assert len({result[1] for _, result in found}) <= 2


def test_a_job_that_kills_its_workers_is_given_up(run, start, tmp_path):
    cluster = start(workers=5, allowed=1)  # two die, and two more when it is tried alone
    jobs = [("kill", 0), *(("square", i) for i in range(10))]
    found = dict(on_cluster(cluster, run, jobs, tmp_path))
    lost = found.pop(("kill", 0))
    assert isinstance(lost, Lost)
    assert lost.code == "worker.killed"
    assert "2 Dask workers died at it alone" in lost.reason
    assert [found["square", i][0] for i in range(10)] == [i * i for i in range(10)]


def test_an_exception_ends_the_run(run, start, tmp_path):
    cluster = start()
    with pytest.raises(OSError, match="No space left"):
        list(on_cluster(cluster, run, [("full", 0)], tmp_path))
    with pytest.raises(UserError, match=r"does not see .*nowhere; start it"):
        list(on_cluster(cluster, run, [("square", 1)], tmp_path / "nowhere"))
    first = on_cluster(cluster, run, [("square", 1)] * 99, tmp_path, stopped=lambda: True)
    assert list(first) == []


def test_no_scheduler_or_no_worker_there(start, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsemae.data.making.cluster.CONNECT_SECONDS", 1.0)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(UserError, match=rf"--dask {address}: no scheduler"), connected(address):
            pass
    monkeypatch.setattr("sparsemae.data.making.cluster.CONNECT_SECONDS", 5.0)
    with pytest.raises(UserError, match="no worker there"), connected(start(workers=0).address):
        pass


def test_preprocessing_on_a_cluster_that_loses_a_worker(start, volumes, tmp_path, contents):
    """The store is the one that this machine alone makes, and no volume is missing or blamed."""
    source, cluster, killed = volumes(24), start(), []
    preprocess([source], tmp_path / "alone")

    def kill(progress, outcome):
        if progress.done == 5 and not killed:
            killed.append(cluster.workers[0].pid)
            os.kill(killed[0], signal.SIGKILL)

    summary = preprocess([source], tmp_path / "store", dask=cluster.address, on_outcome=kill)
    assert killed
    assert (summary.progress.ok, summary.progress.rejected) == (24, 0)
    assert contents(tmp_path / "store") == contents(tmp_path / "alone")


def test_a_scheduler_that_goes_away_is_one_line(run, start, tmp_path):
    cluster = start()
    results = on_cluster(cluster, run, [("wait", str(tmp_path / "never"))] * 3, tmp_path)

    def kill():
        until = time.monotonic() + 60
        while not list(tmp_path.glob("never.*")):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.killpg(cluster.scheduler.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ConnectionError, match=r"scheduler has gone; .*the same command goes on"):
        list(results)
    killer.join()


def test_a_cluster_without_workers_is_given_up(run, start, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsemae.data.making.cluster.POLL_SECONDS", 0.2)
    monkeypatch.setattr("sparsemae.data.making.cluster.DESERTED_SECONDS", 1.0)
    cluster = start(workers=1)
    with pytest.raises(ConnectionError, match=r"no worker is left; .*the same command goes on"):
        list(on_cluster(cluster, run, [("kill", 0), ("square", 1)], tmp_path))
