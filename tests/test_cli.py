"""The commands: end to end on drawn heads, and one clear line for every kind of bad input."""

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from matplotlib.image import imread

from sparsemae import cli, doctor
from sparsemae.data.phantom import write_heads
from sparsemae.data.store import Store
from sparsemae.pretrain import load_run
from sparsemae.training import keeper

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ("--set", "data.patch_size=16", "--set", "data.workers=0", "--set", "train.steps=3")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two volumes, in LPI and PIR, and what the commands make of them."""
    folder = tmp_path_factory.mktemp("made")
    heads = write_heads(folder / "volumes", 3, size=24)
    heads[0].unlink()
    assert call("preprocess", folder / "volumes", "-o", folder / "store", "--spacing", "keep") == 0
    assert call("pretrain", folder / "store", "-o", folder / "run", "--config", "tiny", *SMALL) == 0
    return folder


def call(*words):
    """The exit code of `sparsemae words`, run in this process."""
    before, sys.argv = sys.argv, ["sparsemae", *map(str, words)]
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code or 0
    finally:
        sys.argv = before
    raise AssertionError("the command did not exit")


def refused(capfd, *words, code=2):
    """The one line on stderr of a command that must fail."""
    capfd.readouterr()
    assert call(*words) == code
    printed = capfd.readouterr()
    assert "Traceback" not in printed.out + printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("sparsemae: error: ")
    return printed.err.removeprefix("sparsemae: error: ").rstrip("\n")


def listing(folder):
    return sorted((p, p.stat().st_mtime_ns) for p in folder.rglob("*"))


def test_the_main_job_leaves_what_it_says(made):
    assert len(Store.open(made / "store")) == 2
    run = load_run(made / "run")
    assert run.checkpoint.step == 3
    assert run.config.data.patch_size == (16, 16, 16)
    lines = [json.loads(x) for x in (made / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3]
    assert 'id="volumes"' in (made / "run" / "report.html").read_text()


@pytest.mark.parametrize("head", ["head_01", "head_02"])
def test_a_reconstruction_lies_where_its_volume_lies(made, tmp_path, capfd, head):
    volume = made / "volumes" / f"{head}.nii.gz"
    output = tmp_path / "new folder" / "out.v1.png"
    assert call("reconstruct", made / "run", volume, "-o", output) == 0
    printed = capfd.readouterr()
    assert printed.err == ""
    assert f"picture: {output}" in printed.out
    assert sorted(p.name for p in output.parent.iterdir()) == ["out.v1.nii.gz", "out.v1.png"]
    picture = imread(output)
    assert picture.shape == (990, 990, 4)
    for row, column in np.ndindex(3, 3):  # every panel shows something
        panel = picture[330 * row + 60 : 330 * row + 270, 330 * column + 60 : 330 * column + 270]
        assert panel[..., :3].std() > 0.05

    source, result = nibabel.load(volume), nibabel.load(output.parent / "out.v1.nii.gz")
    assert nibabel.aff2axcodes(result.affine) == ("R", "A", "S")
    assert result.header.get_xyzt_units()[0] == "mm"
    values = result.get_fdata()
    grid = np.stack(np.meshgrid(*map(np.arange, values.shape), indexing="ij"), -1)
    index = nibabel.affines.apply_affine(np.linalg.inv(source.affine) @ result.affine, grid)
    assert np.allclose(index, index.round(), atol=1e-3)  # `keep`: the source's own voxels
    there = source.get_fdata()[tuple(np.moveaxis(index.round().astype(int), -1, 0))]
    same = np.isclose(values, there, rtol=1e-3, atol=0.5)
    # a quarter of the cells is visible, and kept; a volume that lay elsewhere would match nowhere
    assert 0.15 < same[there > 0].mean() < 0.45
    inside = np.argwhere(source.get_fdata() != 0)
    extent = inside.max(0) - inside.min(0) + 1
    assert sorted(values.shape) == sorted(extent)  # the whole head, cropped to it
    mse = float(printed.out.split("z-scored: ")[1].split()[0])
    assert mse > 0
    assert np.isfinite(values).all()


@pytest.mark.parametrize("shape", [(9, 40, 17), (30, 16, 5)])
def test_reconstruct_takes_any_size_and_either_output_name(made, tmp_path, shape):
    array = np.random.default_rng(0).uniform(1, 100, shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([1, 2, 3, 1.0])), tmp_path / "odd size.nii")
    output = tmp_path / "x.nii.gz"
    assert call("reconstruct", made / "run", tmp_path / "odd size.nii", "-o", output) == 0
    result = nibabel.load(output)
    assert result.shape == shape
    np.testing.assert_allclose(result.affine, np.diag([1, 2, 3, 1.0]))
    kept = np.isclose(result.get_fdata(), array, rtol=1e-3, atol=1e-3).mean()
    assert 0.1 < kept < 0.4
    assert (tmp_path / "x.png").is_file()


def test_the_seed_draws_the_mask_of_a_reconstruction(made, tmp_path):
    volume, found = made / "volumes" / "head_01.nii.gz", []
    for i, seed in enumerate((0, 0, 1)):
        output = tmp_path / f"{i}.nii.gz"
        assert call("reconstruct", made / "run", volume, "-o", output, "--seed", seed) == 0
        found.append(nibabel.load(output).get_fdata())
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_bad_files_are_rejected_and_the_good_ones_stored(tmp_path, capfd):
    good = write_heads(tmp_path / "in", 2, size=24)
    (tmp_path / "in" / "text.nii.gz").write_text("no volume")
    cut = tmp_path / "in" / "cut.nii.gz"
    cut.write_bytes(good[0].read_bytes()[:-20])
    with gzip.open(tmp_path / "in" / "empty.nii.gz", "wb"):
        pass
    store = tmp_path / "store"
    assert call("preprocess", tmp_path / "in", "-o", store, "--spacing", "10,10,12") == 3
    printed = capfd.readouterr()
    assert printed.err == ""
    assert f"2 volumes stored in {store}" in printed.out
    assert f"3 rejected, see {store}/failures.jsonl" in printed.out
    assert sum(line.startswith("rejected: ") for line in printed.out.splitlines()) == 3
    records = [json.loads(line) for line in (store / "failures.jsonl").read_text().splitlines()]
    assert [Path(r["path"]).name for r in records] == ["cut.nii.gz", "empty.nii.gz", "text.nii.gz"]
    opened = Store.open(store)
    assert [c.id for c in opened.cases] == ["head_00", "head_01"]
    np.testing.assert_allclose([c.spacing for c in opened.cases], [(10, 10, 12)] * 2)


PRETRAIN = ("pretrain", "{made}/store", "-o", "run", "--config", "tiny")
RESUME = ("pretrain", "{made}/store", "-o", "{made}/run", "--resume")
PREPROCESS = ("preprocess", "{made}/volumes", "-o", "out")
RECONSTRUCT = ("reconstruct", "{made}/run", "{made}/volumes/head_01.nii.gz", "-o")
BAD = {  # words of a command; what its one line must say: the place, and the remedy
    "unknown key": ((*PRETRAIN, "--set", "mask_ratio=0.5"), "mask_ratio", "mean mask.ratio?"),
    "wrong type": ((*PRETRAIN, "--set", "train.steps=1.5"), "train.steps", "valid integer"),
    "no value": ((*PRETRAIN, "--set", "train.steps"), "--set train.steps", "key=value"),
    "patch": (
        (*PRETRAIN, "--set", "data.patch_size=60"),
        "data.patch_size (60, 60, 60)",
        "(56, 56, 56) and (64, 64, 64)",
    ),
    "block": (
        (*PRETRAIN, "--set", "mask.block_size=12"),
        "mask.block_size (12, 12, 12)",
        "use (8, 8, 8) or a multiple",
    ),
    "patch and block": (
        (*PRETRAIN, "--set", "data.patch_size=40", "--set", "mask.block_size=16"),
        "data.patch_size (40, 40, 40)",
        "(32, 32, 32) and (48, 48, 48)",
    ),
    "mask ratio 0": ((*PRETRAIN, "--set", "mask.ratio=0"), "mask.ratio", "greater than 0"),
    "mask ratio 1": ((*PRETRAIN, "--set", "mask.ratio=1"), "mask.ratio", "less than 1"),
    "recipe": ((*PRETRAIN[:-1], "large"), "--config large", "recipes: s3d-resenc-l, tiny"),
    "broken TOML": ((*PRETRAIN[:-1], "bad.toml"), "bad.toml", "not valid TOML"),
    "device": ((*PRETRAIN, "--set", "train.device=tpu"), "train.device tpu", "choose auto"),
    "existing run": (
        ("pretrain", "{made}/store", "-o", "{made}/run", "--config", "tiny"),
        "{made}/run holds a run already",
        "choose another -o",
    ),
    "missing store": (
        ("pretrain", "nowhere", "-o", "run", "--config", "tiny"),
        "nowhere: no store",
        "sparsemae preprocess",
    ),
    "a folder of volumes as store": (
        ("pretrain", "{made}/volumes", "-o", "run", "--config", "tiny"),
        "{made}/volumes: no store",
        "sparsemae preprocess",
    ),
    "nothing to resume": (
        ("pretrain", "{made}/store", "-o", "run", "--resume"),
        "run: no run there",
        "sparsemae pretrain",
    ),
    "resume with config": (
        (*RESUME, "--config", "tiny"),
        "--config: data.patch_size differ from those of the run in {made}/run",
        "drop --config",
    ),
    "resume with another lr": ((*RESUME, "--set", "train.lr=1"), "train.lr", "Start a new run"),
    "resume to fewer steps": (
        (*RESUME, "--set", "train.steps=2"),
        "train.steps 2",
        "give as many or more",
    ),
    "empty folder": (("preprocess", "empty", "-o", "out"), "empty", "it needs files with .nii.gz"),
    "missing source": (("preprocess", "nowhere", "-o", "out"), "nowhere", ""),
    "not NIfTI": (("preprocess", "notes.txt", "-o", "out"), "notes.txt", ""),
    "spacing word": ((*PREPROCESS, "--spacing", "fine"), "--spacing fine", "x,y,z, or keep"),
    "spacing of two": ((*PREPROCESS, "--spacing", "1,2"), "--spacing 1,2", "x,y,z, or keep"),
    "spacing 0": ((*PREPROCESS, "--spacing", "0"), "--spacing 0", "positive number of mm"),
    "spacing < 0": ((*PREPROCESS, "--spacing", "1,-1,1"), "--spacing 1,-1,1", "positive number"),
    "spacing nan": ((*PREPROCESS, "--spacing", "nan"), "--spacing nan", "positive number of mm"),
    "window": ((*PREPROCESS, "--window", "300,100"), "--window 300,100", "lower one first"),
    "normalization": ((*PREPROCESS, "--normalization", "minmax"), "normalization", "'percentile'"),
    "stored type": ((*PREPROCESS, "--dtype", "int8"), "dtype", "'float32'"),
    "unknown rule": ((*PREPROCESS, "--set", "filter.fov=9"), "filter.fov", "field_of_view"),
    "text for a number": ((*PREPROCESS, "--set", 'spacing=["1", "2", "3"]'), "spacing", "tuple"),
    "layout": ((*PREPROCESS, "--layout", "bid"), "--layout bid", "did you mean bids?"),
    "shard word": ((*PREPROCESS, "--shard", "first"), "--shard first", "such as 0/8"),
    "shard of none": ((*PREPROCESS, "--shard", "8/8"), "--shard 8/8", "from 0 to 7"),
    "run in the store": (
        ("pretrain", "{made}/store", "-o", "{made}/store/run", "--config", "tiny"),
        "{made}/store/run is inside the store",
        "choose another -o",
    ),
    "no time": ((*PREPROCESS, "--timeout", "0"), "--timeout 0", "positive number of seconds"),
    "merge of nothing": ((*PREPROCESS, "--merge"), "out: no shard has begun", "check -o"),
    "merge and shard": ((*PREPROCESS, "--merge", "--shard", "0/2"), "--shard and --merge", "then"),
    "failures in percent": (
        (*PREPROCESS, "--max-failures", "5"),
        "--max-failures 5",
        "from 0 to 1",
    ),
    "no cluster": ((*PREPROCESS, "--dask", "nonsense"), "--dask nonsense", "tcp://HOST:8786"),
    "store of other options": (
        ("preprocess", "{made}/volumes", "-o", "{made}/store"),
        "{made}/store",
        "--overwrite",
    ),
    "store in a folder of other files": (
        ("preprocess", "{made}/volumes", "-o", "."),
        "other files",
        "choose a new folder",
    ),
    "store in its source": (
        ("preprocess", "{made}/volumes", "-o", "{made}/volumes/store"),
        "overlap",
        "choose another -o",
    ),
    "output name": ((*RECONSTRUCT, "out.jpg"), "-o out.jpg", ".png or .nii.gz"),
    "output is a file's child": (
        (*RECONSTRUCT, "notes.txt/out.png"),
        "notes.txt",
        "choose another -o",
    ),
    "output replaces the volume": (
        (*RECONSTRUCT, "{made}/volumes/head_01.png"),
        "head_01.png would replace the volume itself",
        "choose another -o",
    ),
    "output without a name": ((*RECONSTRUCT, ".png"), "-o .png", ".png or .nii.gz"),
    "missing run": (
        ("reconstruct", "nowhere", "{made}/volumes/head_01.nii.gz", "-o", "out.png"),
        "nowhere: no run there",
        "sparsemae pretrain",
    ),
    "missing volume": (("reconstruct", "{made}/run", "nowhere.nii", "-o", "x.png"), "nowhere", ""),
    "volume is no NIfTI": (
        ("reconstruct", "{made}/run", "notes.txt", "-o", "x.png"),
        "notes.txt",
        "",
    ),
    "demo among other files": (("demo", "-o", "."), "not from a demo", "choose another -o"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_2_and_nothing_on_disk(made, tmp_path, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no volume")
    (tmp_path / "bad.toml").write_text("[train\n")
    words, place, remedy = BAD[case]
    before = listing(tmp_path) + listing(made)
    line = refused(capfd, *(w.format(made=made) for w in words))
    assert place.format(made=made) in line
    assert remedy in line
    assert listing(tmp_path) + listing(made) == before


def test_a_source_without_one_good_volume_is_refused_and_says_why(tmp_path, capfd):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "text.nii.gz").write_text("no volume")
    line = refused(capfd, "preprocess", tmp_path / "in", "-o", tmp_path / "store")
    assert line.startswith("none of the 1 volumes can be used, see ")
    assert "text.nii.gz" in line
    assert not (tmp_path / "store" / "index.json").exists()


def test_trouble_of_the_machine_is_one_line_and_exit_1(made, tmp_path, monkeypatch, capfd):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors")

    command = ["pretrain", made / "store", "-o", tmp_path / "run", "--config", "tiny", *SMALL]
    diverge = ["--set", "train.optimizer=sgd", "--set", "train.lr=1e30"]
    diverge += ["--set", "train.max_skipped=0"]
    line = refused(capfd, *command, *diverge, code=1)
    assert "lower train.lr" in line
    command[3] = tmp_path / "other"
    monkeypatch.setattr(keeper, "write_checkpoint", full)
    line = refused(capfd, *command, code=1)
    assert line.startswith("model.safetensors: No space left on device; free some space")


def test_a_killed_loader_process_is_one_line_exit_1(made, tmp_path, monkeypatch, capfd):
    def die(reader, sample):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("sparsemae.data.loading.samples.SampleReader.__call__", die)
    words = ["pretrain", made / "store", "-o", tmp_path / "run", "--config", "tiny", *SMALL]
    line = refused(capfd, *words, "--set", "data.workers=1", code=1)
    assert re.match(r"case head_0\d: loader worker 0 was killed by SIGKILL", line)


@pytest.mark.parametrize("words", [("pretrain",), ("preprocess", "x"), ("paint",), ("doctor", "x")])
def test_wrong_usage_exits_with_2_and_shows_how(capfd, words):
    assert call(*words) == 2
    assert "Usage: sparsemae" in capfd.readouterr().err


def test_doctor_names_every_backend_and_says_when_one_is_broken(monkeypatch, capfd):
    assert call("doctor") == 0
    printed = capfd.readouterr().out
    assert all(word in printed for word in ("python", "torch", "cpu", "reference"))
    assert printed.count("works") == len(doctor.registry.available())
    assert "BROKEN" not in printed

    def check(backend, device):
        if backend == "torch":
            raise RuntimeError("no such instruction")
        return 0.0

    monkeypatch.setattr(doctor, "check_backend", check)
    assert call("doctor") == 1
    printed = capfd.readouterr().out
    assert "BROKEN" in printed
    assert "no such instruction" in printed


def test_as_a_program(tmp_path):
    """What is not seen from inside: the exit code, and that nothing else speaks on stderr."""
    command = [sys.executable, "-m", "sparsemae"]
    bad = subprocess.run(
        [*command, "pretrain", "nowhere", "-o", "run", "--config", "tiny"],
        **{"cwd": tmp_path, "capture_output": True, "text": True},
    )
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("sparsemae: error: nowhere: no store there; ")
    assert bad.stderr.count("\n") == 1
    good = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert good.returncode == 0
    commands = ("preprocess", "pretrain", "reconstruct", "doctor", "demo")
    assert all(name in good.stdout for name in commands)
    assert list(tmp_path.iterdir()) == []
