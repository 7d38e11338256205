"""Runs of `sparsemae pretrain` that can be started, stopped and killed quickly and often."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsemae.runfiles import CHECKPOINTS

SERVER = Path(__file__).with_name("fork_server.py")
# everything that a step's outcome depends on is switched on
VARIED = {
    "data.patch_size": 16, "data.batch_size": 2, "data.validation": 2, "data.foreground": 0.5,
    "data.rotation_probability": 0.5, "data.scale_probability": 0.5, "mask.ratio": [0.4, 0.7],
    "train.steps": 24, "train.save_every": 4, "train.ema": 0.8, "train.optimizer": "sgd",
    "train.lr": 1e-3, "train.warmup": 3, "data.workers": 0,
}  # fmt: skip


class Started:
    """A command that runs."""

    def __init__(self, server, pid, out):
        self.server, self.pid, self.out, self.code = server, pid, out, None

    def wait(self):
        """Its exit code; negative if a signal ended it."""
        if self.code is None:
            self.code = self.server.ask({"wait": self.pid})
        return self.code

    def kill(self, signal, *, group=False):
        (os.killpg if group else os.kill)(self.pid, signal)

    def within(self, work):
        """Whether a slowed "validation" or "report" goes on."""
        return Path(f"{self.out}.{work}").exists()

    @property
    def ended(self):
        """Also a zombie, which it is until it is waited for."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    @property
    def printed(self):
        return self.out.read_text() if self.out.exists() else ""


class Server:
    def __init__(self, folder):
        self.folder, self.number = folder, itertools.count()
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def __call__(self, *words, slow=0.0, largest=0, memory=0):
        """Start `sparsemae WORDS`; see fork_server.py."""
        out = self.folder / f"out-{next(self.number)}.txt"
        limits = {"slow": slow, "largest": largest, "memory": memory}
        request = {"argv": [str(w) for w in words], "out": str(out), **limits}
        return Started(self, self.ask(request), out)


@pytest.fixture(scope="session")
def sparsemae_now(tmp_path_factory):
    """`sparsemae_now("pretrain", ...)` starts a command at once."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="session")
def varied(store):
    """`varied(run, key=value)`: the words that start, or go on with, a run that varies a lot."""

    def words(run, **changes):
        values = VARIED | {key.replace("__", "."): value for key, value in changes.items()}
        sets = [f"--set={k}={str(v).lower()}" for k, v in values.items()]
        return ["pretrain", store, "-o", run, "--config", "tiny", "--resume", *sets]

    return words


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, sparsemae_now, varied):
    """The folder of a run that nothing happened to."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = sparsemae_now(*varied(run))
    assert done.wait() == 0, done.printed
    return run


@pytest.fixture(scope="session")
def run_bytes():
    return _run_bytes


def _run_bytes(run):
    """What must be the same whatever happened to a run: its last checkpoint, log, configuration."""
    last = max((run / CHECKPOINTS).iterdir())
    files = [*last.iterdir(), run / "metrics.jsonl", run / "config.toml"]
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(files)}


@pytest.fixture(scope="session")
def until():
    return _until


def _until(condition, started, seconds=60):
    """Wait for something to be true of a run that has not ended."""
    limit = time.monotonic() + seconds
    while not condition():
        assert not started.ended, started.printed
        assert time.monotonic() < limit, started.printed
        time.sleep(0.001)


@pytest.fixture(scope="session")
def steps_done():
    return _steps_done


def _steps_done(run):
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b'"loss"') if log.exists() else 0
