"""Several ranks by torchrun: the same run as one, stopped and started again together."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Case, Store, write_image, write_index, write_mask

pytestmark = pytest.mark.slow
DRIVER = Path(__file__).with_name("rank_driver.py")
SAME = (
    "data.patch_size=16", "data.batch_size=6", "data.validation=3", "data.workers=0",
    "data.rotation_probability=0.5", "data.scale_probability=0.5", "mask.ratio=[0.4,0.7]",
    "train.steps=20", "train.save_every=10", "train.optimizer=sgd", "train.lr=1e-3",
)  # fmt: skip


@pytest.fixture(scope="module")
def masked_store(tmp_path_factory):
    """Cases of which very different parts are excluded: a mean of the ranks' means is wrong."""
    folder, rng, cases = tmp_path_factory.mktemp("masked") / "store", np.random.default_rng(0), []
    eye = tuple(map(tuple, np.eye(4).tolist()))
    for i in range(6):
        array = rng.standard_normal((20, 20, 20)).astype(np.float32) * (1 + i)
        mask = rng.random(array.shape) < (0.0, 0.9, 0.3, 0.97, 0.0, 0.6)[i]
        files = vars(write_image(folder, f"case{i}", array[None]))
        excluded = write_mask(folder, f"case{i}", mask[None])
        geometry = {"shape": array.shape, "spacing": (1.0,) * 3, "affine": eye}
        source = {"source": "", "stamp": "", "source_shape": array.shape, "source_affine": eye}
        crop = {"crop_start": (0, 0, 0), "crop_stop": array.shape}
        scale = {"background": 0.0, "mean": 0.0, "std": 1.0}
        split = "val" if i == 5 else "train"
        facts = files | geometry | source | crop | scale
        cases.append(Case(id=f"case{i}", **facts, excluded=excluded, split=split))
    write_index(folder, cases, PreprocessConfig())
    return Store.open(folder).path


def torchrun(ranks, *words, **options):
    """A command by torchrun, in a process group of its own."""
    module = [] if str(words[0]).endswith(".py") else ["-m"]
    flags = options.pop("flags", ["--standalone"])
    command = [sys.executable, "-m", "torch.distributed.run", *flags]
    command += ["--nproc-per-node", str(ranks), *module, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("environment", {})}
    # a pipe that nobody reads would stop it one day
    out = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(
        command,
        stdout=out,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        **options,
    )
    process.out = out
    return process


def printed_by(process):
    process.out.seek(0)
    return process.out.read()


def finished(process, code=0, seconds=180):
    try:
        process.wait(seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == code, printed_by(process)
    return printed_by(process)


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def watched(ranks, store, folder, *overrides, **options):
    """A run by the driver: its lines, what was seen by slot, what was printed."""
    words = [DRIVER, store, folder / "run", folder / "seen", *SAME, *overrides]
    folder.mkdir(exist_ok=True)
    printed = finished(torchrun(ranks, *words, **options))
    seen = [json.loads(path.read_text()) for path in sorted(folder.glob("seen-*.json"))]
    assert len(seen) == ranks
    together = {key: value for part in seen for key, value in part.items()}
    assert len(together) == sum(map(len, seen))  # no sample twice
    return metrics(folder / "run"), together, printed


@pytest.fixture(scope="module")
def alone(masked_store, tmp_path_factory):
    return watched(1, masked_store, tmp_path_factory.mktemp("one") / "of")[:2]


def assert_alike(lines, expected):
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in line.keys() - {"step"}:
            within = 1e-3 if key == "grad_norm" else 1e-5  # rounding decides slopes at a kink
            assert line[key] == pytest.approx(other[key], rel=within), (line["step"], key)


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (3, 2), (1, 3)])
def test_any_number_of_ranks_is_the_same_run(tmp_path, masked_store, alone, ranks, accumulate):
    """The same samples and masks in the same steps; losses equal to 1e-5 over 20 steps."""
    lines, seen = alone
    assert len(seen) == 20 * 6
    found, together, printed = watched(
        ranks, masked_store, tmp_path / "of", f"train.accumulate={accumulate}"
    )
    assert together == {key: list(value) for key, value in seen.items()}
    assert_alike(found, lines)
    assert len([line for line in found if "val_loss" in line]) == 2
    assert printed.count("step 20/20  loss") == 1  # one rank speaks


def test_two_nodes_are_as_two_ranks_of_one(tmp_path, masked_store, alone):
    """Two agents that meet over the network, each with one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [DRIVER, masked_store, tmp_path / "run", tmp_path / "seen", *SAME]
    nodes = []
    for node in range(2):
        flags = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-backend", "c10d"]
        flags += ["--rdzv-id", "test", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        flags += ["--local-addr", "127.0.0.1"]
        nodes.append(torchrun(1, *words, flags=flags))
    for node in nodes:
        finished(node)
    assert_alike(metrics(tmp_path / "run"), alone[0])
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("seen-*.json"))]
    assert seen[0] | seen[1] == alone[1]


def test_a_batch_that_does_not_divide_is_refused_by_one_line(tmp_path, masked_store):
    words = ["sparsemae", "pretrain", masked_store, "-o", tmp_path / "run", "--config", "tiny"]
    sets = [f"--set={item}" for item in (*SAME, "data.batch_size=5")]
    printed = finished(torchrun(2, *words, *sets), code=1)
    said = [line for line in printed.splitlines() if line.startswith("sparsemae: error: ")]
    assert said == [
        "sparsemae: error: data.batch_size 5 does not divide by 2 ranks: the nearest valid sizes "
        "are 4 and 6"
    ]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory, varied):
    """The command of a run on two ranks, and the folder of one that nothing happened to."""
    run = tmp_path_factory.mktemp("two") / "run"
    finished(torchrun(2, "sparsemae", *varied(run)))
    return run


def workers_of(agent):
    """The ranks that an agent has started, by rank."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[1]) == agent.pid:
                environment = (path.parent / "environ").read_bytes().split(b"\0")
                rank = [e for e in environment if e.startswith(b"RANK=")]
                if rank:
                    found[int(rank[0][5:])] = int(path.parent.name)
        except (OSError, ValueError):
            continue
    return found


def reach(agent, held, ranks=2, seconds=120):
    """Wait until so many ranks stand still."""
    limit = time.monotonic() + seconds
    while len(held.pids) < ranks:
        assert agent.poll() is None, printed_by(agent)
        assert time.monotonic() < limit, printed_by(agent)
        time.sleep(0.005)


def test_killed_ranks_are_started_again_and_the_run_ends_byte_equal(
    tmp_path, varied, two_ranks, run_bytes, held_at
):
    run, held = tmp_path / "run", held_at("step", 4)
    flags = ["--standalone", "--max-restarts", "9"]
    if torch.__version__ >= (2, 12):
        # a rank that waits for a dead one hears no signal: torchrun ends it after so many seconds
        flags += ["--shutdown-timeout", "2"]
    agent = torchrun(2, *held.words, *varied(run), flags=flags)
    for killed in range(5):
        reach(agent, held)
        ranks = workers_of(agent)
        assert held.pids == set(ranks.values())
        os.kill(ranks[killed % 2], signal.SIGKILL)
        held.go_on()
        limit = time.monotonic() + 60
        while set(workers_of(agent).values()) & set(ranks.values()):
            assert time.monotonic() < limit
            time.sleep(0.02)
    while agent.poll() is None:
        held.go_on()
        time.sleep(0.02)
    finished(agent)
    assert run_bytes(run) == run_bytes(two_ranks)


@pytest.mark.parametrize("target", ["rank 0", "rank 1", "agent", "agent SIGUSR1"])
def test_a_stop_of_one_is_a_stop_of_all(
    tmp_path, varied, two_ranks, run_bytes, steps_done, held_at, target
):
    run, held = tmp_path / "run", held_at("step", 4)
    flags = ["--standalone", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    agent = torchrun(2, *held.words, *varied(run), flags=flags)
    reach(agent, held)
    at = steps_done(run)
    assert at == 5
    pid = agent.pid if target.startswith("agent") else workers_of(agent)[int(target[-1])]
    os.kill(pid, signal.SIGUSR1 if target.endswith("USR1") else signal.SIGTERM)
    if target.startswith("agent"):
        time.sleep(1)  # it passes it on
    held.go_on()
    agent.wait(120)
    printed = printed_by(agent)
    done = steps_done(run)
    assert done - at <= 2, printed
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("preempted", done, 85)
    assert (run / "checkpoints" / f"step-{done:08d}" / "meta.json").exists()
    assert printed.count("stopped at step") == 1
    if target == "rank 1":  # once is enough
        finished(torchrun(2, "sparsemae", *varied(run)))
        assert run_bytes(run) == run_bytes(two_ranks)
