"""No space, memory or right to write, other data, two at once: one line, and nothing is lost."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess

import pytest

from sparsemae.checkpoint import load_checkpoint
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import preprocess
from sparsemae.status import read_status

FULL = "free some space, and run it again: what was whole before is kept"


def only_line(started):
    """What a command that failed said of it: its last line, and no other."""
    lines = started.printed.splitlines()
    assert "Traceback" not in started.printed
    assert [n for n, line in enumerate(lines) if "error" in line.lower()] == [len(lines) - 1]
    assert lines[-1].startswith("sparsemae: error: ")
    return lines[-1]


def newest(run):
    checkpoint, warnings = load_checkpoint(run / "checkpoints")
    assert warnings == []
    return checkpoint.step


def hidden(run):
    return [p for p in run.rglob("*") if p.name.startswith((".tmp-", ".del-"))]


@pytest.fixture
def killed(sparsemae_now, varied, until):
    """`killed(run)`: a run that was killed two steps after its second checkpoint."""

    def make(run):
        started = sparsemae_now(*varied(run), hold=("step", 5))
        started.reach()
        until(lambda: (run / "checkpoints" / "step-00000004").exists(), started)
        started.kill(signal.SIGKILL)
        assert started.wait() == -signal.SIGKILL
        return run

    return make


@pytest.fixture
def ends_the_same(sparsemae_now, varied, undisturbed, run_bytes):
    """Run again, with nothing in the way."""

    def check(run):
        last = sparsemae_now(*varied(run))
        assert last.wait() == 0, last.printed
        assert run_bytes(run) == run_bytes(undisturbed)
        assert read_status(run).state == "finished"
        assert not hidden(run)

    return check


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("first", [True, False])
def test_a_checkpoint_that_grows_too_large(
    tmp_path, sparsemae_now, varied, killed, ends_the_same, first
):
    """The first of a run, and a later one."""
    run = tmp_path / "run"
    before = None if first else newest(killed(run))
    started = sparsemae_now(*varied(run), largest=300_000)
    assert started.wait() == 1, started.printed
    file = run / "checkpoints" / f".tmp-step-{0 if first else before + 4:08d}" / "model.safetensors"
    assert only_line(started) == f"sparsemae: error: {file}: {os.strerror(errno.EFBIG)}; {FULL}"
    assert first or newest(run) == before
    assert not hidden(run)
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert str(file) in status["message"]
    events = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert "failed" in [event["event"] for event in events]
    ends_the_same(run)


def test_a_file_system_that_fills_up(small_disk, sparsemae_now, varied, ends_the_same):
    """The third checkpoint does not fit beside two; what there is of it makes room for the rest."""
    run = small_disk / "run"
    started = sparsemae_now(*varied(run))
    assert started.wait() == 1, started.printed
    assert f"{run}/checkpoints/.tmp-step-00000008/" in only_line(started)
    assert f"{os.strerror(errno.ENOSPC)}; {FULL}" in only_line(started)
    assert newest(run) == 4
    assert not hidden(run)
    assert read_status(run).state == "failed"
    remount(small_disk, "size=200m")
    ends_the_same(run)


def test_a_file_system_that_is_full_to_the_last_byte(
    small_disk, sparsemae_now, varied, killed, ends_the_same
):
    """There is no room to say so in the folder either; the command says it."""
    remount(small_disk, "size=200m")
    run, filler = killed(small_disk / "run"), small_disk / "filler"
    before = newest(run)
    started = sparsemae_now(*varied(run), hold=("step", 0))
    started.reach()
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(2**16))
    assert os.statvfs(small_disk).f_bavail == 0
    started.go_on()
    assert started.wait() == 1, started.printed
    assert f"{os.strerror(errno.ENOSPC)}; {FULL}" in only_line(started)
    assert str(run) in only_line(started)
    assert newest(run) == before
    assert not hidden(run)
    assert read_status(run).state in ("killed", "failed")
    again = sparsemae_now(*varied(run))
    assert again.wait() == 1, again.printed
    assert os.strerror(errno.ENOSPC) in only_line(again)
    filler.unlink()
    ends_the_same(run)


def test_logs_that_cannot_grow(tmp_path, sparsemae_now, varied, killed, ends_the_same):
    run = killed(tmp_path / "run")
    before = newest(run)
    started = sparsemae_now(*varied(run, train__save_every=1000), largest=2500)
    assert started.wait() == 1, started.printed
    assert f"{run}/timing.jsonl: {os.strerror(errno.EFBIG)}; {FULL}" in only_line(started)
    assert newest(run) == before
    assert read_status(run).state == "failed"
    assert f"{run}/timing.jsonl" in read_status(run).message
    ends_the_same(run)


def test_a_folder_that_is_read_only(
    small_disk, sparsemae_now, varied, killed, ends_the_same, run_bytes
):
    remount(small_disk, "size=200m")
    run = killed(small_disk / "run")
    before = run_bytes(run)
    remount(small_disk, "ro")
    for folder in (run, small_disk / "new"):
        started = sparsemae_now(*varied(folder))
        assert started.wait() == 1, started.printed
        assert str(folder) in only_line(started)
        assert os.strerror(errno.EROFS) in only_line(started)
    assert run_bytes(run) == before
    remount(small_disk, "rw")
    ends_the_same(run)


def test_two_in_one_folder(tmp_path, sparsemae_now, varied, undisturbed, run_bytes):
    run = tmp_path / "run"
    first = sparsemae_now(*varied(run), hold=("step", 1))
    first.reach()
    second = sparsemae_now(*varied(run))
    assert second.wait() == 2
    assert not first.ended
    assert f"{run}: another process is training in it" in only_line(second)
    assert len(second.printed.splitlines()) == 1
    first.go_on()
    assert first.wait() == 0, first.printed
    assert run_bytes(run) == run_bytes(undisturbed)


def test_other_data_is_refused_and_a_moved_store_is_not(
    tmp_path, sparsemae_now, varied, killed, store, undisturbed, run_bytes
):
    run = killed(tmp_path / "run")
    write_heads(tmp_path / "volumes", 3, size=24, seed=7)
    keep = PreprocessConfig(spacing=None)
    other = preprocess([tmp_path / "volumes"], tmp_path / "other", keep).store.path
    before = run_bytes(run)
    refused = sparsemae_now(*(other if word == store else word for word in varied(run)))
    assert refused.wait() == 2, refused.printed
    line = f"{other} is not the data this run was started on ({store}): resume with that, or"
    assert line in only_line(refused)
    assert run_bytes(run) == before
    shutil.copytree(store, tmp_path / "moved")
    words = [tmp_path / "moved" if word == store else word for word in varied(run)]
    last = sparsemae_now(*words)
    assert last.wait() == 0, last.printed
    found, expected = run_bytes(run), run_bytes(undisturbed)
    # that says where the store is
    assert [name for name in found if found[name] != expected[name]] == [
        "checkpoints/step-00000024/meta.json"
    ]


def test_memory_that_does_not_suffice(tmp_path, sparsemae_now, varied):
    run = tmp_path / "run"
    words = varied(run, data__batch_size=4096, data__validation=0)
    started = sparsemae_now(*words, memory=2**29)
    assert started.wait() == 1, started.printed
    line = only_line(started)
    assert "step 0: out of memory" in line
    for key in ("train.accumulate", "data.batch_size", "data.patch_size"):
        assert key in line
    assert read_status(run).state == "failed"
    assert newest(run) == 0
