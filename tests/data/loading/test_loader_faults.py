"""Workers that die, hang or fail: an error that names the case, at once, and none left over."""

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest

from sparsemae.data.loader import make_loader
from sparsemae.data.loading import wire
from sparsemae.data.loading.pool import Pool
from sparsemae.data.loading.samples import SampleReader
from sparsemae.data.store import Store
from sparsemae.errors import LoaderError, UserError

PATCH = (8, 8, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_store):
    arrays = {f"case-{i}": np.random.default_rng(i).standard_normal((16, 12, 10)) for i in range(5)}
    return make_store(tmp_path_factory.mktemp("faults"), arrays)


def loader(store, **options):
    return make_loader(store, PATCH, 2, **{"seed": 0, "steps": 12, "workers": 2} | options)


def at_case(monkeypatch, name, act):
    """Do something else than reading when it is the turn of this case."""
    read = SampleReader._read

    def sabotaged(self, case, rng):
        if case.id == name:
            act()
        return read(self, case, rng)

    monkeypatch.setattr(SampleReader, "_read", sabotaged)


def none_left():
    return not multiprocessing.active_children()


def failure(batches, error=LoaderError, seconds=5):
    began = time.monotonic()
    with pytest.raises(error) as caught:
        list(batches)
    assert time.monotonic() - began < seconds
    assert "\n" not in str(caught.value)
    assert none_left()
    return caught.value


@pytest.mark.parametrize("name", ["SIGKILL", "SIGUSR2"])
def test_a_worker_that_is_killed_is_named_with_its_case(monkeypatch, store, name):
    at_case(monkeypatch, "case-3", lambda: os.kill(os.getpid(), getattr(signal, name)))
    message = str(failure(loader(store)))
    assert message.startswith("case case-3: loader worker ")
    assert f"was killed by {name}" in message
    assert message.endswith("use fewer data.workers") == (name == "SIGKILL")


def test_a_worker_that_ends_is_named_with_its_case(monkeypatch, store):
    at_case(monkeypatch, "case-3", lambda: os._exit(9))
    assert str(failure(loader(store))).endswith("ended with exit code 9")


def test_a_worker_that_hangs_is_named_with_its_case(monkeypatch, store):
    at_case(monkeypatch, "case-2", lambda: os.kill(os.getpid(), signal.SIGSTOP))
    message = str(failure(loader(store, timeout=3), seconds=8))
    assert message.startswith("case case-2: loader worker ")
    assert message.endswith("gave no answer for 3 s; check the disk or raise data.timeout")


def test_slow_is_not_hung(monkeypatch, store):
    """The time is that of one sample: a batch of slow ones may take longer."""
    for case in ("case-1", "case-2"):
        at_case(monkeypatch, case, lambda: time.sleep(1))
    batches = make_loader(store, PATCH, 8, seed=0, steps=1, workers=1, timeout=3)
    began = time.monotonic()
    assert len(list(batches)) == 1
    assert time.monotonic() - began > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_is_named_with_its_case_and_keeps_its_traceback(monkeypatch, store, workers):
    def act():
        raise KeyError("some\nthing")

    at_case(monkeypatch, "case-1", act)
    error = failure(loader(store, workers=workers))
    assert str(error).startswith("case case-1: KeyError: ")
    trace = "".join(getattr(error, "__notes__", [])) if workers else repr(error.__cause__)
    assert "KeyError" in trace
    assert ("in act" in trace) == bool(workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_chunk_is_an_error_and_no_other_case(tmp_path, store, make_store, workers):
    mine = make_store(tmp_path, {"a": np.random.default_rng(0).standard_normal((16, 12, 10))})
    file = tmp_path / mine.cases[0].file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    error = failure(loader(mine, workers=workers), UserError)
    assert str(error).startswith(f"{file}: damaged")
    assert "sparsemae preprocess" in str(error)


def test_a_file_that_goes_away_is_an_error(tmp_path, make_store):
    mine = make_store(tmp_path, {"a": np.random.default_rng(0).standard_normal((16, 12, 10))})
    (tmp_path / mine.cases[0].file).unlink()
    assert "missing" in str(failure(loader(mine), UserError))


def test_the_death_of_a_worker_not_waited_for_is_seen_too(store):
    batches = iter(loader(store, steps=100, workers=3))
    next(batches)
    victim = batches._processes[0]  # the next batch is of worker 1
    victim.kill()
    victim.join()
    assert "loader worker 0 was killed by SIGKILL" in str(failure(batches))


def test_batches_before_an_error_are_delivered(monkeypatch, store):
    """The error comes where the case would have come, for any number of workers."""

    def act():
        raise KeyError

    at_case(monkeypatch, "case-3", act)
    counts = []
    for workers in (0, 1, 3):
        batches = iter(loader(store, workers=workers, steps=50))
        got = []
        with pytest.raises(LoaderError, match="case-3"):
            got.extend(batch for batch in batches)
        counts.append(len(got))
    assert len(set(counts)) == 1


def test_workers_let_stop_signals_pass(store):
    batches = iter(loader(store, steps=40))
    next(batches)
    for process in batches._processes:
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(process.pid, name)
    assert sum(1 for _ in batches) == 39
    assert none_left()


def test_no_worker_is_left_when_the_iteration_is_given_up(store):
    batches = iter(loader(store, steps=1000))
    next(batches)
    processes = batches._processes
    del batches
    assert none_left()
    assert all(process.exitcode is not None for process in processes)
    for _ in loader(store, steps=1000):
        break
    assert none_left()


def run(store, code):
    code = f"""
import os, signal
from sparsemae.data.loader import make_loader
from sparsemae.data.store import Store
loader = make_loader(
    Store.open({str(store.path)!r}), {PATCH}, 1, seed=0, steps=10**6, workers=2)
batches = iter(loader)
next(batches)
print(*[process.pid for process in batches._processes], flush=True)
{code}
"""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        # files, not pipes: those would be waited for until the last worker has closed them
        done = subprocess.run([sys.executable, "-c", code], timeout=60, stdout=out, stderr=errors)
        out.seek(0)
        errors.seek(0)
        return done.returncode, [int(pid) for pid in out.read().split()], errors.read().decode()


def ended(pid):
    """Whether the process is gone, or a zombie that nobody collects."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_worker_that_cannot_be_killed_holds_nobody_up(store):
    """One stuck in the kernel, here one whose killing does nothing."""
    code = """
from sparsemae.data.loading import pool
pool.PATIENCE = 0.2
pool.Pool.cancel = lambda self: None
os.kill(batches._processes[0].pid, signal.SIGSTOP)
batches._processes[1].kill()
try:
    list(batches)
except Exception as error:
    print(error, file=__import__("sys").stderr)
raise SystemExit(3)
"""
    began = time.monotonic()
    returncode, pids, errors = run(store, code)
    os.kill(pids[0], signal.SIGKILL)
    assert (returncode, time.monotonic() - began < 30) == (3, True)
    assert "loader worker 1 was killed by SIGKILL" in errors


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise SystemExit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise KeyError", 1),
    ],
    ids=["exit", "kill", "error"],
)
def test_workers_end_with_the_main_process(store, code, expected):
    returncode, pids, _ = run(store, code)
    assert returncode == expected
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while not all(map(ended, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_nothing_is_left_in_shared_memory(store):
    if not os.path.isdir("/dev/shm"):
        pytest.skip("no /dev/shm")
    before = set(os.listdir("/dev/shm"))
    batches = iter(loader(store, steps=1000))
    next(batches)
    batches._processes[0].kill()
    with pytest.raises(LoaderError):
        list(batches)
    assert set(os.listdir("/dev/shm")) <= before


def test_descriptors_are_given_back(store):
    def count():
        gc.collect()  # errors of other tests hold frames that hold iterators
        return len(os.listdir("/proc/self/fd"))

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    list(loader(store, steps=4))
    before = count()
    for _ in range(3):
        list(loader(store, steps=20))
    assert count() <= before


def echo(item, report):
    report(item)
    shape = [(0,), (3, 5), (1000, 700)][item % 3]
    return {"none": None, "arrays": [np.full(shape, item, np.float16), np.arange(item) % 2 == 1]}


def test_arrays_cross_unchanged_and_writable():
    pool = Pool(echo, range(5, 12), 2, name_of=str, timeout=60)
    for item, got in zip(range(5, 12), pool, strict=True):
        expected = echo(item, lambda sample: None)
        for a, b in zip(expected["arrays"], got["arrays"], strict=True):
            assert a.dtype == b.dtype
            assert np.array_equal(a, b)
            b[...] = 0
    assert none_left()


def test_arrays_do_not_go_through_the_pipe():
    ours, theirs = multiprocessing.Pipe()
    array = np.zeros(10**7)  # would fill any pipe, and nobody reads yet
    wire.send(ours, array, os.getpid())
    got = wire.receive(theirs)
    assert np.array_equal(got, array)
    assert len(pickle.dumps(got, protocol=5, buffer_callback=lambda buffer: None)) < 1000


def test_a_range_shorter_than_the_workers():
    assert len(list(Pool(echo, range(1), 3, name_of=str, timeout=60))) == 1
    assert list(Pool(echo, range(0), 2, name_of=str, timeout=60)) == []
    assert none_left()


def test_the_store_is_opened_once(store, monkeypatch):
    """Workers take the opened index along: they do not read it again."""
    opened = []
    monkeypatch.setattr(Store, "open", lambda *a, **k: opened.append(a))
    list(loader(store))
    assert opened == []
