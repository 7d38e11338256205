"""A run that is killed, preempted or out of disk: run again, it ends with the undisturbed store."""

import itertools
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sparsemae.data.preprocess import preprocess
from sparsemae.data.store import Store
from sparsemae.errors import UserError

COUNT = 24


@pytest.fixture
def undisturbed(volumes, tmp_path, contents):
    folder = volumes(COUNT)
    preprocess([folder], tmp_path / "undisturbed")
    return folder, contents(tmp_path / "undisturbed")


def until(condition, process, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < limit
        time.sleep(0.002)


def finish(sparsemae, *words, code=0):
    done = sparsemae("preprocess", *words)
    printed = done.communicate(timeout=120)[0]
    assert done.returncode == code, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.slow
def test_kill_9_of_the_run_at_several_moments(undisturbed, contents, tmp_path, sparsemae, held_at):
    folder, expected = undisturbed
    store, words = tmp_path / "store", (folder, "-o", tmp_path / "store", "--workers", 2)
    for number, more in enumerate((1, 7, 7, COUNT - 16)):
        held = held_at("recorded", more - 1)
        run = sparsemae("preprocess", *words, held=held)
        until(lambda held=held: held.pids, run)
        # once the process alone, once with everything it started
        os.kill(run.pid, signal.SIGKILL) if number % 2 else os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        assert not (store / "index.json").exists()
    printed = finish(sparsemae, *words)
    assert f"{COUNT - 1} of {COUNT} volumes are done already" in printed
    assert contents(store) == expected
    assert not (store / ".journal").exists()
    before = {path: path.stat().st_mtime_ns for path in store.glob("cases/*")}
    assert f"{COUNT} of {COUNT} volumes are done already" in finish(sparsemae, *words)
    assert contents(store) == expected
    assert {path: path.stat().st_mtime_ns for path in store.glob("cases/*")} == before


@pytest.mark.slow
def test_kill_9_of_workers_loses_nothing(
    undisturbed, contents, tmp_path, sparsemae, children, held_at
):
    folder, expected = undisturbed
    store, held = tmp_path / "store", held_at("recorded", "1,8")
    run = sparsemae("preprocess", folder, "-o", store, "--workers", 2, held=held)
    for _ in range(2):
        until(lambda: held.pids, run)
        workers = [
            pid
            for pid in children(run.pid)
            if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        ]
        os.kill(workers[-1], signal.SIGKILL)
        held.go_on()
    printed = run.communicate(timeout=120)[0]
    assert run.returncode == 0, printed
    assert contents(store) == expected
    assert not (store / "failures.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_scheduler_stops_the_run_and_a_later_one_goes_on(
    undisturbed, contents, tmp_path, sparsemae, name, held_at
):
    folder, expected = undisturbed
    store, words = tmp_path / "store", (folder, "-o", tmp_path / "store", "--workers", 2)
    held = held_at("recorded", 2)
    run = sparsemae("preprocess", *words, held=held)
    until(lambda: held.pids, run)
    os.killpg(run.pid, getattr(signal, name))  # as SLURM does: the workers get it too
    held.go_on()
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 85, printed
    assert "the same command goes on" in printed
    assert not (store / "index.json").exists()
    finish(sparsemae, *words)
    assert contents(store) == expected


@pytest.mark.slow
def test_ctrl_c(undisturbed, contents, tmp_path, sparsemae, held_at):
    folder, expected = undisturbed
    store, words = tmp_path / "store", (folder, "-o", tmp_path / "store")
    held = held_at("recorded", 1)
    run = sparsemae("preprocess", *words, held=held)
    until(lambda: held.pids, run)
    os.killpg(run.pid, signal.SIGINT)
    held.go_on()
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 130
    assert "Traceback" not in printed
    assert "the same command goes on" in printed
    finish(sparsemae, *words)
    assert contents(store) == expected


def limited():
    """No file may grow beyond 8 KB, as on a disk that is nearly full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_blames_no_volume(undisturbed, contents, tmp_path, sparsemae):
    folder, expected = undisturbed
    store = tmp_path / "store"
    run = sparsemae("preprocess", folder, "-o", store, preexec_fn=limited)
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 1, printed
    assert "Traceback" not in printed
    assert f"{store}/cases/v000.b2nd" in printed
    assert "File too large; free some space" in printed
    assert not (store / "index.json").exists()
    assert not [path for path in store.glob("cases/*") if path.stat().st_size == 8192]
    finish(sparsemae, folder, "-o", store)
    assert contents(store) == expected
    assert not (store / "failures.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 200 KB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_on_a_file_system_that_fills_up(undisturbed, contents, small_disk, sparsemae):
    folder, expected = undisturbed
    store = small_disk / "store"
    run = sparsemae("preprocess", folder, "-o", store, "--workers", 2)
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == 1, printed
    assert "Traceback" not in printed
    assert "No space left on device" in printed
    assert not (store / "index.json").exists()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    finish(sparsemae, folder, "-o", store, "--workers", 2)
    assert contents(store) == expected


def test_a_journal_cut_in_a_line_goes_on(undisturbed, contents, tmp_path):
    folder, expected = undisturbed
    store = tmp_path / "store"
    preprocess(
        [folder], store, stopped=itertools.chain([False] * 9, itertools.repeat(True)).__next__
    )
    (journal,) = store.glob(".journal/*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 9
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:100])
    for name in ("index.json.0a1b2c3d.tmp", "cases/v001.b2nd.0a1b2c3d.tmp"):  # cut short as well
        (store / name).write_bytes(b"{")
    # the line after the cut one is whole
    preprocess(
        [folder], store, stopped=itertools.chain([False] * 3, itertools.repeat(True)).__next__
    )
    seen = []
    summary = preprocess([folder], store, on_outcome=lambda *event: seen.append(event[0].kept))
    assert seen[0] == 11
    assert not list(store.rglob("*.tmp"))
    assert len(summary.store) == COUNT
    assert contents(store) == expected


def test_only_what_changed_is_done_again(undisturbed, contents, save_volume, tmp_path):
    folder, expected = undisturbed
    store = tmp_path / "undisturbed"
    done = []

    def run(**options):
        done.clear()
        preprocess([folder], store, on_outcome=lambda _, o: done.append(o and o.id), **options)
        assert done.pop(0) is None
        return sorted(done)

    assert run() == []
    save_volume(folder / "v003.nii.gz", seed=77)  # changed
    save_volume(folder / "v100.nii.gz", seed=100)  # new
    (folder / "v005.nii.gz").unlink()  # gone
    (store / "cases" / "v006.b2nd").unlink()  # lost
    damaged = store / "cases" / "v007.b2nd"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(UserError, match=r"1 volumes in it, as v005, are not among .*--prune"):
        run()
    assert contents(store).keys() == expected.keys() - {"cases/v006.b2nd"}
    assert run(prune=True) == ["v003", "v006", "v100"]
    names = {name for name in contents(store) if name.startswith("cases/")}
    assert "cases/v005.b2nd" not in names
    assert len(names) == COUNT
    assert contents(store)["cases/v007.b2nd"] != expected["cases/v007.b2nd"]
    run(verify=True)
    assert contents(store)["cases/v007.b2nd"] == expected["cases/v007.b2nd"]
    index = json.loads((store / "index.json").read_text())
    assert [case["id"] for case in index["cases"]] == sorted(p.name[:4] for p in folder.iterdir())


def test_a_store_that_is_half_remade_is_no_store(undisturbed, save_volume, tmp_path):
    """Else training would read new files with old checksums, and call them damaged."""
    folder, _ = undisturbed
    store = tmp_path / "undisturbed"
    for i in range(3):
        save_volume(folder / f"v{i:03d}.nii.gz", seed=50 + i)
    preprocess([folder], store, stopped=itertools.chain([False], itertools.repeat(True)).__next__)
    with pytest.raises(UserError, match="no store there"):
        Store.open(store)
    seen = []
    summary = preprocess([folder], store, on_outcome=lambda p, o: seen.append(p.kept))
    assert seen[0] == COUNT - 2
    for case in summary.store.cases:
        summary.store.verify(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_stopped_while_workers_start(undisturbed, contents, tmp_path, sparsemae, children, name):
    folder, expected = undisturbed
    store, words = tmp_path / "store", (folder, "-o", tmp_path / "store", "--workers", 4)
    run = sparsemae("preprocess", *words)
    until(lambda: children(run.pid), run)  # one at least is being started
    os.killpg(run.pid, getattr(signal, name))
    printed = run.communicate(timeout=60)[0]
    assert run.returncode == {"SIGTERM": 85, "SIGINT": 130}[name], printed
    assert "Traceback" not in printed
    finish(sparsemae, *words)
    assert contents(store) == expected
