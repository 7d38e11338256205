"""Commands that run as processes of their own: started, stood still, stopped and waited for."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SERVER = Path(__file__).with_name("fork_server.py")
HOLD = Path(__file__).with_name("hold.py")


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

    @property
    def held(self):
        """Whether it stands still where `hold` wants it to."""
        return self._held.exists()

    def reach(self):
        """Wait until it stands still there."""
        _until(lambda: self.held, self)

    def reach_or_end(self):
        """Wait until it stands still there, or has ended before."""
        while not (self.held or self.ended):
            time.sleep(0.001)

    def go_on(self):
        """Let it go on from there."""
        self._held.unlink()

    @property
    def _held(self):
        return Path(f"{self.out}.held")

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

    def __call__(self, *words, hold=None, largest=0, memory=0):
        """Start `sparsemae WORDS`; see fork_server.py."""
        out = self.folder / f"out-{next(self.number)}.txt"
        limits = {"hold": hold, "largest": largest, "memory": memory}
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
def run_bytes():
    return _run_bytes


def _run_bytes(run):
    """What must be the same whatever happened to a run: its last checkpoint, log, configuration."""
    from sparsemae.runfiles import CHECKPOINTS

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


class Held:
    """Makes processes stand still at a place of hold.py: its `words` come before the command's."""

    def __init__(self, folder, place, number):
        self.folder, self.words = folder, [HOLD, folder, place, number]

    @property
    def pids(self):
        """Those that stand still."""
        return {int(path.name) for path in self.folder.iterdir()}

    def go_on(self):
        """Let them go on."""
        for path in self.folder.iterdir():
            path.unlink()


@pytest.fixture
def held_at(tmp_path_factory):
    """`held_at(place, n)`: a Held."""
    return lambda *place: Held(tmp_path_factory.mktemp("held"), *place)


class Agent:
    """A torchrun of ranks on this machine; `printed` is what all of them said."""

    def __init__(self, out, ranks, *words):
        self.out = out
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "--no-python", *map(str, words)]
        with out.open("w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )

    @property
    def printed(self):
        return self.out.read_text()

    @property
    def errors(self):
        start = "sparsemae: error: "
        return [line for line in self.printed.splitlines() if line.startswith(start)]

    @property
    def traced(self):
        """Whether there is a traceback of ours; torchrun always prints one of its own."""
        return re.search(r'File "[^"]*/sparsemae/', self.printed) is not None

    def wait(self, code):
        assert self.process.wait(120) == code, self.printed

    def until(self, condition):
        limit = time.monotonic() + 90
        while not condition():
            assert self.process.poll() is None, self.printed
            assert time.monotonic() < limit, self.printed
            time.sleep(0.005)

    def rank(self, number):
        """Its pid."""
        for pid in self.children(self.process.pid):
            if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"rank {number} does not run\n{self.printed}")

    @staticmethod
    def children(pid):
        """The processes that a process has started."""
        return [
            int(child)
            for listing in Path(f"/proc/{pid}/task").glob("*/children")
            for child in listing.read_text().split()
        ]


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """`torchrun(ranks, *words)`: an Agent; it and its ranks end with the module."""
    agents, folder = [], tmp_path_factory.mktemp("agents")

    def start(ranks, *words):
        agents.append(Agent(folder / f"out-{len(agents)}.txt", ranks, *words))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.process.poll() is None:
            for pid in [agent.process.pid, *agent.children(agent.process.pid)]:
                os.kill(pid, signal.SIGKILL)
            agent.process.wait()
