"""Code in a torch file: none of it runs, and the message names what it asked for."""

import argparse
import collections
import datetime
import os
import pathlib
import random
import zipfile

import numpy as np
import pytest
import torch

from sparsemae import weights
from sparsemae.errors import UserError
from sparsemae.weights import read_weights


def problem(path) -> str:
    with pytest.raises(UserError) as error:
        read_weights(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    assert "; " in message, "no remedy"
    return message


def saved(tmp_path, content, **options):
    torch.save(content, tmp_path / "w.pth", **options)
    return tmp_path / "w.pth"


def written(tmp_path, pickled: bytes):
    """A torch file around a pickle."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
        archive.writestr("w/data.pkl", pickled)
        archive.writestr("w/version", b"3\n")
    return tmp_path / "w.pth"


class Attack:
    """Runs a command when an ordinary `torch.load` of old reads it."""

    def __init__(self, marker):
        self.command = f"touch {marker}"

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_file_that_would_run_code_is_refused_and_nothing_runs(tmp_path, protocol):
    marker = tmp_path / "ran"
    for content in (
        Attack(marker),
        {"model": {"a": torch.ones(2), "b": Attack(marker)}},
        {"network_weights": {"a": torch.ones(2)}, "logging": [{"x": (Attack(marker),)}]},
    ):
        path = saved(tmp_path, content, pickle_protocol=protocol)
        message = problem(path)
        assert "if you trust it, save its weights as safetensors: safetensors.torch." in message
        if protocol == 2:
            assert "asks for posix.system, and might run code" in message
        assert not marker.exists()
    torch.load(saved(tmp_path, Attack(marker), pickle_protocol=protocol), weights_only=False)
    assert marker.exists(), "the attack is none"


def test_torch_is_the_second_guard(tmp_path, monkeypatch):
    """Even with our own look at the pickle gone."""
    marker = tmp_path / "ran"
    monkeypatch.setattr(weights, "check_pickle", lambda *_: None)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert "torch cannot read it" in problem(saved(tmp_path, {"a": Attack(marker)}))
    assert not marker.exists()


@pytest.mark.parametrize(
    "name",
    [
        "os system",
        "builtins eval",
        "__builtin__ eval",
        "builtins getattr",
        "builtins bytearray",
        "subprocess Popen",
        "pathlib PosixPath",
        "torch load",
        "torch Tensor",
        "torch FloatTensor",
        "torch.storage UntypedStorage",
        "torch.storage _load_from_bytes",
        "torch._utils _rebuild_wrapper_subclass",
        "torch.serialization FloatStorage",
        "numpy load",
        "numpy frombuffer",
        "numpy.core.multiarray _reconstruct2",
        "collections Counter",
        "a b.c",
    ],
)
def test_a_forbidden_global_is_named(tmp_path, name):
    asked = b"\x80\x02}" + b"c" + name.replace(" ", "\n").encode() + b"\n"
    for pickled in (asked + b".", asked + b")R.", asked + b")\x81."):
        assert f"asks for {name.replace(' ', '.')}, and" in problem(written(tmp_path, pickled))


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (pathlib.PurePosixPath("x"), "pathlib.PurePosixPath"),
        (argparse.Namespace(lr=1), "argparse.Namespace"),
        (datetime.date(2026, 1, 1), "datetime.date"),
        (collections.Counter(), "collections.Counter"),
        (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear"),
        (np.random.default_rng(0), "numpy.random._pickle"),
    ],
)
def test_objects_that_training_scripts_save_are_named(tmp_path, value, name):
    assert f"asks for {name}" in problem(
        saved(tmp_path, {"model": {"a": torch.ones(1)}, "x": value})
    )


def test_a_long_or_odd_global_does_not_fill_the_screen(tmp_path):
    message = problem(written(tmp_path, b"\x80\x02cos\n\x1b[2J" + b"x" * 10000 + b"\n."))
    assert len(message) < 600
    assert "\x1b" not in message


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), "complex"),
        (lambda: torch.ones(2, dtype=torch.complex128), "complex"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.eye(3).to_sparse(), "sparse"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8 or unsigned"),
        (lambda: torch.ones(2, dtype=torch.uint16), "float8 or unsigned"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]), "nested"),
        (lambda: torch.ones(2, device="meta"), "empty (meta)"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_refused(tmp_path, make, kind):
    message = problem(saved(tmp_path, {"a": torch.ones(2), "b": make()}))
    assert f"holds {kind} tensors; convert them" in message


def test_a_damaged_pickle_with_a_right_checksum_never_crashes(tmp_path):
    """Bytes changed, taken out, doubled: read, or refused, and nothing else."""
    content = {
        "model": torch.nn.Linear(2, 2).state_dict(),
        "log": [np.float64(1), np.arange(3), torch.device("cuda", 0), torch.Size([1]), 2.0, None],
    }
    with zipfile.ZipFile(saved(tmp_path, content)) as archive:
        files = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    draw, outcomes = random.Random(0), collections.Counter()
    good = files["data.pkl"]
    for case in range(2 * len(good)):
        place = case % len(good)
        length = draw.randrange(1, 9)
        new = draw.choice([b"", good[place : place + length] * 2, draw.randbytes(length)])
        files["data.pkl"] = good[:place] + new + good[place + length :]
        with zipfile.ZipFile(tmp_path / "w.pth", "w") as archive:
            for name, data in files.items():
                archive.writestr(f"w/{name}", data)
        try:
            found = read_weights(tmp_path / "w.pth")
            assert all(tensor.numel() <= 4 for tensor in found.tensors.values())
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0


def test_what_was_allowed_for_one_file_is_not_left_allowed(tmp_path):
    read_weights(saved(tmp_path, {"a": torch.ones(1), "b": np.float64(1)}))
    problem(saved(tmp_path, {"a": torch.ones(1), "b": pathlib.PurePosixPath()}))
    left = torch.serialization.get_safe_globals()
    assert not [entry for entry in left if entry in (np.dtype, np.ndarray) or type(entry) is tuple]
