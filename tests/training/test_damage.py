"""Checkpoints damaged in every way: said in a line, the one before is used, and nothing is run."""

import hashlib
import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

from sparsemae.checkpoint import load_checkpoint
from sparsemae.errors import UserError
from sparsemae.files import sealed

NEWEST, BEFORE = "step-00000024", "step-00000020"


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def replace(path, data):
    """The file anew: the one there is shared with the undisturbed run."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def change_meta(folder, change, *, seal=True):
    """The meta changed by a function, with the right checksum of its own."""
    meta = json.loads((folder / "meta.json").read_text())
    change(meta)
    replace(folder / "meta.json", json.dumps(sealed(meta) if seal else meta).encode())


def replace_rightly(folder, name, data):
    """A file anew, with size and checksum that fit."""
    replace(folder / name, data)
    listed = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_meta(folder, lambda meta: meta["files"].update({name: listed}))


def truncate(folder):
    data = (folder / "optimizer.safetensors").read_bytes()
    replace(folder / "optimizer.safetensors", data[:-1])


def flip_a_bit(folder):
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[len(data) // 3] ^= 4
    replace(folder / "ema.safetensors", data)


def a_nan(folder):
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    next(iter(tensors.values())).view(-1)[0] = torch.nan
    replace_rightly(folder, "model.safetensors", safetensors.torch.save(tensors))


def evil(folder):
    return pickle.dumps(Evil(folder.parent / "it-ran"))


def huge_sizes(folder):
    def change(meta):
        for listed in meta["files"].values():
            listed["size"] = 10**30

    change_meta(folder, change)


def huge_header(folder):
    data = (2**63 - 1).to_bytes(8, "little") + b"{}"
    replace_rightly(folder, "model.safetensors", data)


DAMAGES = {
    "truncated": (truncate, "optimizer.safetensors is damaged"),
    "a bit flipped": (flip_a_bit, "ema.safetensors is damaged"),
    "empty": (lambda f: replace(f / "model.safetensors", b""), "model.safetensors is damaged"),
    "empty meta": (lambda f: replace(f / "meta.json", b""), "meta.json is damaged"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "incomplete"),
    "a pickle": (lambda f: replace(f / "model.safetensors", evil(f)), "model.safetensors is dam"),
    "a pickle, listed": (
        lambda f: replace_rightly(f, "model.safetensors", evil(f)),
        "not a safetensors file",
    ),
    "a pickled optimiser, listed": (
        lambda f: replace_rightly(f, "optimizer.safetensors", evil(f)),
        "not a safetensors file",
    ),
    "a pickled meta": (lambda f: replace(f / "meta.json", evil(f)), "meta.json is damaged"),
    "huge sizes": (huge_sizes, "model.safetensors is damaged"),
    "a huge header": (huge_header, "not a safetensors file"),
    "deep brackets": (lambda f: replace(f / "meta.json", b"[" * 10**5), "meta.json is damaged"),
    "nan": (a_nan, "in model.safetensors is not finite"),
    "newer": (
        lambda f: change_meta(f, lambda m: m.update(format=99)),
        "format 99 is newer than this version of sparsemae reads",
    ),
    "older": (
        lambda f: change_meta(f, lambda m: m.update(format=1)),
        "format 1 is of an older version",
    ),
}


@pytest.fixture
def run(tmp_path, undisturbed):
    """A finished run; its checkpoints are those of `undisturbed`, by hard links."""

    def copied(source, target):
        (os.link if "checkpoints" in source else shutil.copy2)(source, target)

    return shutil.copytree(undisturbed, tmp_path / "run", copy_function=copied)


@pytest.fixture
def reconstruct(tmp_path, sparsemae_now, store):
    """`reconstruct(run)`: the exit code, and what was printed."""

    def call(run):
        volume = min((store.parent / "volumes").iterdir())
        done = sparsemae_now("reconstruct", run, volume, "-o", tmp_path / "out.png")
        return done.wait(), done.printed

    return call


@pytest.fixture
def go_on(sparsemae_now, varied):
    """`go_on(run)`: resume it; the exit code, and what was printed."""

    def call(run):
        done = sparsemae_now(*varied(run))
        return done.wait(), done.printed

    return call


def kept(run):
    """Everything in a run."""
    return {
        str(p.relative_to(run)): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in run.rglob("*")
        if p.is_file()
    }


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_is_used_and_without_one_it_ends(run, reconstruct, go_on, name):
    damage, words = DAMAGES[name]
    damage(run / "checkpoints" / NEWEST)
    code, printed = reconstruct(run)
    assert code == 0, printed
    warning = rf"warning: .*/{NEWEST}: .*{re.escape(words)}.*; using the checkpoint before it"
    assert len(re.findall(warning, printed)) == 1, printed

    damage(run / "checkpoints" / BEFORE)
    before = kept(run)
    for code, printed in (go_on(run), reconstruct(run)):
        assert code == 2, printed
        (line,) = printed.splitlines()
        assert line.startswith(f"sparsemae: error: no whole checkpoint ({run}/checkpoints/{NEWEST}")
        assert line.count(words) == 2
        assert line.endswith("): put back a copy, or start a new run")
    assert kept(run) == before
    assert not (run / "checkpoints" / "it-ran").exists()


def test_the_pickle_would_run_something(tmp_path):
    pickle.loads(evil(tmp_path / "folder"))
    assert (tmp_path / "it-ran").is_dir()


@pytest.mark.parametrize("name", ["truncated", "a pickled optimiser, listed", "a pickled meta"])
def test_a_run_goes_on_from_the_one_before_and_ends_the_same(
    run, go_on, run_bytes, undisturbed, name
):
    DAMAGES[name][0](run / "checkpoints" / NEWEST)
    code, printed = go_on(run)
    assert code == 0, printed
    assert "; using the checkpoint before it" in printed
    assert "resuming at step 20" in printed
    assert run_bytes(run) == run_bytes(undisturbed)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in history[-3:]] == ["resumed", "warning", "finished"]
    assert not (run / "checkpoints" / "it-ran").exists()


def test_no_flipped_bit_of_the_meta_goes_unnoticed(run):
    """The trainer's state is in it."""
    shutil.rmtree(run / "checkpoints" / BEFORE)
    file = run / "checkpoints" / NEWEST / "meta.json"
    whole = file.read_bytes()
    meta = load_checkpoint(run / "checkpoints")[0].meta
    chance, told = np.random.default_rng(0), 0
    for at in chance.choice(len(whole), 400, replace=False):
        data = bytearray(whole)
        data[at] ^= 1 << chance.integers(8)
        replace(file, data)
        try:
            found, _ = load_checkpoint(run / "checkpoints")
        except UserError:
            told += 1
        else:  # between words, where it says nothing
            assert found.meta == meta
    assert told > 300


def test_checkpoints_of_another_network_are_refused(run, go_on, reconstruct):
    """Whole ones, copied in."""
    for folder in (run / "checkpoints").iterdir():
        for name in ("model.safetensors", "ema.safetensors"):
            tensors = safetensors.torch.load((folder / name).read_bytes())
            wider = {key: torch.cat([t, t]) for key, t in tensors.items() if t.ndim}
            replace_rightly(folder, name, safetensors.torch.save(tensors | wider))
    before = kept(run)
    for code, printed in (go_on(run), reconstruct(run)):
        assert code == 2, printed
        assert re.search(r"error: .*/step-00000024: weight \S+ has shape .*: another netw", printed)
        assert "Traceback" not in printed
    for folder in (run / "checkpoints").iterdir():
        change_meta(folder, lambda meta: meta["config"]["model"].update(preset="L"))
    code, printed = go_on(run)
    assert code == 2, printed
    assert f"{run}/config.toml: model.preset differ from what this run was started" in printed
    unchanged = {name for name in before if "meta.json" not in name}
    assert {name: kept(run)[name] for name in unchanged} == {n: before[n] for n in unchanged}


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(run, go_on, reconstruct):
    shutil.rmtree(run / "checkpoints")
    before = kept(run)
    code, printed = go_on(run)
    assert code == 2, printed
    assert "its checkpoints are gone, but metrics.jsonl has steps: put back a copy" in printed
    assert len(printed.splitlines()) == 1
    code, printed = reconstruct(run)
    assert code == 2, printed
    assert f"no checkpoint in {run}/checkpoints: put back a copy" in printed
    assert kept(run) == before
