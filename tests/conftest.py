"""What tests of several folders need: data sets, networks, and commands to stop and to kill."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

SERVER = Path(__file__).with_name("fork_server.py")
HOLD = Path(__file__).with_name("hold.py")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: they run on the CPU then

# a shell that starts tests in the background has them ignore Ctrl-C, and every command they start
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shared():
    """The folder of real volumes beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real volumes: {folder} is missing")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """`new_empty` gives NaN, so that an operator that leaves a hole in its output is caught."""
    empty = torch.Tensor.new_empty

    def nan(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", nan)


@pytest.fixture
def one_thread():
    """Networks of a few channels are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store of three heads of 24^3, two to train on and one held out."""
    from sparsemae.data.options import PreprocessConfig
    from sparsemae.data.phantom import write_heads
    from sparsemae.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder / "volumes", 3, size=24)
    keep = PreprocessConfig(spacing=None)
    return preprocess([folder / "volumes"], folder / "store", keep).store.path


@pytest.fixture(scope="session")
def draw_labelled():
    """`draw_labelled(folder, cases=4, ...)`: a data set in nnU-Net's layout, of bright ellipsoids
    (class 1) with a dark core off their centre (class 2), no axis like another."""

    def draw(
        folder, cases=4, *, channels=1, size=(20, 24, 22), spacing=(1.0, 1.0, 1.0), labels=None
    ):
        rng = np.random.default_rng(len(folder.name))
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        affine = np.diag([*spacing, 1.0])
        for case in range(cases):
            grid = np.indices(size).transpose(1, 2, 3, 0)
            centre = np.array(size) / 2 + rng.uniform(-2, 2, 3)
            radii = np.array(size) * (0.35, 0.3, 0.4)
            classes = ((((grid - centre) / radii) ** 2).sum(-1) < 1).astype(np.uint8)
            core = centre + radii * (0.35, 0.1, -0.3)
            classes[(((grid - core) / (radii * 0.4)) ** 2).sum(-1) < 1] = 2
            for channel in range(channels):
                levels = np.array([0.0, 100 + 20 * channel, 40 - 10 * channel])
                image = levels[classes] + rng.normal(5, 2, size) * (grid[..., 0] > 2)
                path = folder / "imagesTr" / f"case_{case}_{channel:04}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), path)
            path = folder / "labelsTr" / f"case_{case}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(classes, affine), path)
        about = {
            "channel_names": {str(i): f"MR{i}" for i in range(channels)},
            "labels": labels or {"background": 0, "shell": 1, "core": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(about))
        return folder

    return draw


@pytest.fixture(scope="session")
def labelled(tmp_path_factory, draw_labelled):
    """Such a data set of four cases with one channel; not to be changed."""
    return draw_labelled(tmp_path_factory.mktemp("labelled") / "Dataset009_Eggs")


@pytest.fixture(scope="session")
def small_plans(tmp_path_factory):
    """An nnU-Net plans.json of a very small network, for data sets of one channel."""
    architecture = {
        "n_stages": 3, "features_per_stage": [8, 16, 16], "n_blocks_per_stage": [1, 1, 1],
        "kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage_decoder": [1, 1], "conv_op": "torch.nn.modules.conv.Conv3d",
        "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
        "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    configuration = {
        "patch_size": [16, 16, 16], "batch_size": 2, "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            "ResidualEncoderUNet",
            "arch_kwargs": architecture, "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
        },
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset009_Eggs", "plans_name": "small",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    path.write_text(json.dumps(plans))
    return path


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, labelled, small_plans):
    """A fine-tuning run of 80 steps on the labelled data set, which learned its classes."""
    from sparsemae.finetune import FinetuneConfig, finetune

    run = tmp_path_factory.mktemp("finetuned") / "run"
    raw = {
        "plan": {"file": str(small_plans)},
        "data": {"augmentation": "none", "validation": 4},
        "train": {"steps": 80, "save_every": 40, "optimizer": "adamw", "lr": 5e-3},
    }
    finetune(labelled, run, FinetuneConfig.model_validate(raw))
    return run


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
