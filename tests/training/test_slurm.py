"""docs/slurm.sh with a SLURM of three small scripts: when the job queues itself again."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "slurm.sh"
SCONTROL = """
case $1 in
show) echo 127.0.0.1; echo 127.0.0.2 ;;
requeue) echo "$2" >> requeued; exit "${REQUEUE_CODE:-0}" ;;
esac
"""
# a step that leaves a status, at once or when it is told to stop
STEP = """
printf '%s\\n' "$@" > words
leave() { [ "$STATE" = none ] || printf '{"state": "%s", "at": %d}' "$STATE" $$ > run/status.json; }
trap 'echo stop >> signals; leave; exit 7' USR1
trap 'echo killed >> signals; exit 9' TERM
echo > started
[ "$WAIT" ] && for i in $(seq 400); do sleep 0.05; done
leave
exit 7
"""


@pytest.fixture
def job(tmp_path):
    """`job(srun, STATE=..., WAIT=...)`: the script in a job, started; its run folder is `run`."""
    for name, text in (("scontrol", SCONTROL), ("python", f'exec {sys.executable} "$@"')):
        script(tmp_path / "bin" / name, text)
    (tmp_path / "run").mkdir()
    started = []

    def start(srun, *words, **environment):
        script(tmp_path / "bin" / "srun", srun)
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "a[1-2]", "OMP_NUM_THREADS": "1"}
        slurm |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8", "WAIT": ""}
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        process = subprocess.Popen(
            ["bash", SCRIPT, *map(str, words or ("store", "run", "--config", "tiny"))],
            cwd=tmp_path,
            env={**os.environ, **slurm, **environment, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def a_run_is_there(folder, state="preempted"):
    (folder / "run" / "config.toml").touch()
    (folder / "run" / "status.json").write_text(json.dumps({"state": state}))


def ended(process, folder):
    """Exit code, and whether the job was queued again."""
    printed = process.communicate(timeout=120)[0]
    queued = folder / "requeued"
    assert not queued.exists() or queued.read_text() == "4711\n"
    assert printed.count("requeued:") == 1 or process.returncode in (0, 2), printed
    return process.returncode, queued.exists()


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("state", "code", "queued"),
    [
        ("finished", 0, False),
        ("preempted", 0, True),
        ("failed", 7, False),
        ("interrupted", 7, False),
        ("running", 7, False),  # nobody holds the lock: it was killed
        ("none", 7, False),  # it came to nothing; what an earlier job left says preempted
    ],
)
def test_what_the_run_folder_says_decides(tmp_path, job, state, code, queued):
    a_run_is_there(tmp_path)
    assert ended(job(STEP, STATE=state), tmp_path) == (code, queued)


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
@pytest.mark.parametrize(
    ("state", "code", "queued"),
    [
        ("preempted", 0, True),
        ("running", 0, True),  # killed before it had saved
        ("none", 0, True),  # stopped while it still started
        ("failed", 7, False),
        ("finished", 0, False),
    ],
)
def test_a_signal_is_handed_to_srun_as_one_it_forwards(tmp_path, job, name, state, code, queued):
    a_run_is_there(tmp_path, "failed")
    process = job(STEP, STATE=state, WAIT="yes")
    wait_for(tmp_path / "started", process)
    process.send_signal(getattr(signal, name))
    assert ended(process, tmp_path) == (code, queued)
    assert (tmp_path / "signals").read_text() == "stop\n"


def test_a_queue_that_refuses_is_an_error(tmp_path, job):
    a_run_is_there(tmp_path)
    assert ended(job(STEP, STATE="preempted", REQUEUE_CODE="3"), tmp_path) == (3, True)


def test_the_command_is_the_same_each_time(tmp_path, job):
    a_run_is_there(tmp_path)
    commands = []
    for state in ("preempted", "finished"):
        words = ("my store", "run", "--config", "tiny", "--set", "train.lr=1e-3")
        process = job(STEP, *words, STATE=state)
        assert process.communicate(timeout=60)[0].count("not requeued") == 0
        commands.append((tmp_path / "words").read_text().splitlines())
    assert commands[0] == commands[1]
    line = shlex.join(commands[0])
    assert "--nnodes 2 --nproc-per-node 8 " in line
    assert ("--shutdown-timeout 100 " in line) == (torch.__version__ >= (2, 12))
    assert "--rdzv-id 4711 --rdzv-endpoint 127.0.0.1:24711 " in line
    end = "-m sparsemae pretrain 'my store' -o run --resume --config tiny --set train.lr=1e-3"
    assert line.endswith(end)


def test_without_a_run_folder_it_says_what_to_give(tmp_path, job):
    process = job(STEP, "store", STATE="finished")
    assert process.communicate()[0].startswith("usage: sbatch ")
    assert process.returncode == 2
    assert not (tmp_path / "words").exists()


@pytest.mark.slow
def test_a_real_run_is_stopped_queued_again_and_finished(tmp_path, job, store):
    """torchrun in srun's place, with two ranks."""
    sets = [
        f"--set={item}"
        for item in (
            *("data.patch_size=16", "data.batch_size=2", "data.workers=0", "data.validation=0"),
            *("train.steps=150", "train.save_every=75", "train.device=cpu"),
        )
    ]
    words = (store, "run", "--config", "tiny", *sets)
    alone = {"SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"}
    first = job('exec "$@"', *words, **alone)
    wait_for(tmp_path / "run" / "metrics.jsonl", first)
    first.send_signal(signal.SIGUSR1)
    assert ended(first, tmp_path) == (0, True)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 85)
    assert status["step"] < 150
    (tmp_path / "requeued").unlink()
    assert ended(job('exec "$@"', *words, **alone), tmp_path) == (0, False)
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    log = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 151))
