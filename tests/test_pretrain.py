"""Runs: the folder they leave, and that a resumed one ends bit-equal to one never interrupted."""

import io
import json
import os
import re
import shutil
import signal

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from sparsemae.config import load_config
from sparsemae.data.loading.samples import SampleReader
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import preprocess
from sparsemae.data.store import Store
from sparsemae.errors import DivergedError, LoaderError, UserError
from sparsemae.pretrain import PretrainConfig, load_run, pretrain
from sparsemae.pretraining import objective
from sparsemae.training import keeper
from sparsemae.training.progress import TrainingProgress

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "data.patch_size=16", "data.workers=0", "data.validation=2", "train.steps=6",
    "train.save_every=2",
)  # fmt: skip


def config(*overrides):
    return load_config(PretrainConfig, "tiny", [*SMALL, *overrides])


def start(store, run, *overrides, **options):
    console = Console(file=io.StringIO(), width=60)
    pretrain(store, run, config(*overrides), console=console, **options)
    return console.file.getvalue()


def resume(store, run, *overrides):
    console = Console(file=io.StringIO(), width=60)
    pretrain(store, run, None, overrides=overrides, resume=True, console=console)
    return console.file.getvalue()


def metrics(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if "loss" in line]


def losses(run):
    return [(r["step"], r["loss"], r["lr"], r["grad_norm"]) for r in metrics(run)]


def last(run):
    """Name and tensors of the newest checkpoint."""
    folder = max((run / "checkpoints").iterdir())
    return folder.name, {
        f"{kind}/{name}": tensor
        for kind in ("model", "optimizer", "ema")
        if (folder / f"{kind}.safetensors").exists()
        for name, tensor in load_file(folder / f"{kind}.safetensors").items()
    }


class Killed(Exception):
    pass


def killed_at(monkeypatch, step, go, *arguments):
    """`go(*arguments)`, a run that dies in this step, after its line of metrics is written."""
    update = TrainingProgress.update

    def die(self, record):
        update(self, record)
        if record.step == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", die)
        with pytest.raises(Killed):
            go(*arguments)


def assert_same_run(one, other):
    assert losses(one) == losses(other)
    (name, expected), (found_name, found) = last(one), last(other)
    assert name == found_name
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[k], found[k]) for k in expected)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["train.optimizer=sgd", "train.lr=1e-3", "decode=0.5", "densify=false"],
        ["sparse=false", "decode=masked", "mask.block_size=16", "data.patch_size=32"],
    ],
    ids=["adamw, all", "sgd, fraction", "dense mae"],
)
def test_a_resumed_run_ends_bit_equal(tmp_path, monkeypatch, store, overrides):
    start(store, tmp_path / "whole", *overrides)
    killed_at(monkeypatch, 5, start, store, tmp_path / "parts", *overrides)
    resume(store, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    for file in ("metrics.jsonl", "config.toml"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()


VARIED = ("data.rotation_probability=0.5", "data.scale_probability=0.5", "data.foreground=0.5")


def test_killed_twice_resumed_with_workers_and_other_random_numbers(tmp_path, monkeypatch, store):
    start(store, tmp_path / "whole", *VARIED)
    torch.manual_seed(123)  # the global generator is no part of a run
    changes = "data.workers=1", "train.save_every=3"
    killed_at(monkeypatch, 3, start, store, tmp_path / "parts", *VARIED)
    killed_at(monkeypatch, 5, resume, store, tmp_path / "parts", *changes)
    resume(store, tmp_path / "parts", *changes)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_killed_loader_worker_costs_no_step(tmp_path, monkeypatch, store):
    start(store, tmp_path / "whole")
    read, run = SampleReader.__call__, tmp_path / "parts"

    def killed(self, sample):
        if sample == 9:  # of the fifth step
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(SampleReader, "__call__", killed)
        with pytest.raises(LoaderError, match=r"^case head_\d+: loader worker 0 was killed"):
            start(store, run, "data.workers=1", "train.save_every=100")
    done = len(metrics(run))
    assert done in (3, 4)  # it died making the batch of step 5, asked for when step 3 had its own
    assert last(run)[0] == f"step-{done:08d}"
    resume(store, run, "data.workers=1")
    assert_same_run(tmp_path / "whole", run)


def test_cases_held_out_are_not_trained_on(tmp_path, monkeypatch, store):
    seen = set()
    to_device_ahead = objective.to_device_ahead

    def watched(*arguments):
        for batch in to_device_ahead(*arguments):
            seen.update(batch["case"])
            yield batch

    monkeypatch.setattr(objective, "to_device_ahead", watched)
    start(store, tmp_path / "run")
    cases = {case.id: case.split for case in Store.open(store).cases}
    assert set(cases.values()) == {"train", "val"}
    assert seen == {name for name, split in cases.items() if split == "train"}


def test_seed_and_data_decide_a_run_and_the_global_generator_is_left_alone(tmp_path, store):
    torch.manual_seed(1)
    start(store, tmp_path / "a")
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(3))
    start(store, tmp_path / "b")
    start(store, tmp_path / "c", "seed=1")
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path, monkeypatch, store):
    run = tmp_path / "run"
    killed_at(monkeypatch, 5, start, store, run)
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # cut off in mid-line
    before = (run / "metrics.jsonl").read_text().splitlines()[:4]
    killed_at(monkeypatch, 5, resume, store, run)  # in the first step after the checkpoint
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5]
    assert (run / "metrics.jsonl").read_text().splitlines()[:4] == before


def test_a_damaged_newest_checkpoint_costs_two_steps_and_one_line(tmp_path, monkeypatch, store):
    start(store, tmp_path / "whole")
    run = tmp_path / "parts"
    killed_at(monkeypatch, 5, start, store, run)
    file = run / "checkpoints" / "step-00000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    output = resume(store, run)
    warnings = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert warnings[0].endswith("model.safetensors is damaged; using the checkpoint before it")
    assert_same_run(tmp_path / "whole", run)


def test_a_finished_run_resumes_to_nothing_or_to_more_steps(tmp_path, store):
    run = tmp_path / "run"
    start(store, run)
    finished = last(run)[0]
    resume(store, run)
    assert last(run)[0] == finished
    assert len(metrics(run)) == 6
    resume(store, run, "train.steps=8")
    assert last(run)[0] == "step-00000008"
    assert load_run(run).config.train.steps == 8
    before = (run / "config.toml").read_text()
    with pytest.raises(UserError, match=r"train\.steps 7: .* has done 8 steps already"):
        resume(store, run, "train.steps=7")
    assert (run / "config.toml").read_text() == before


def test_a_run_folder_is_complete_and_loads(tmp_path, store):
    start(store, tmp_path / "run", "mask.ratio=0.5")
    loaded = load_run(tmp_path / "run")
    assert loaded.config == config("mask.ratio=0.5")
    assert loaded.warnings == []
    assert not loaded.mae.training
    assert loaded.checkpoint.step == 6
    _, tensors = last(tmp_path / "run")
    for name, p in loaded.mae.named_parameters():
        assert torch.equal(p, tensors[f"model/{name}"])
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        ".lock",
        "checkpoints",
        "config.toml",
        "history.jsonl",
        "metrics.jsonl",
        "preview.npz",
        "preview.png",
        "report.html",
        "status.json",
        "timing.jsonl",
    }


def test_the_page_of_a_long_run_is_made_beside_the_training(tmp_path, monkeypatch, store):
    monkeypatch.setattr(keeper, "LONG_LOG", 0)
    start(store, tmp_path / "run", "train.save_every=6")
    assert "finished" in (tmp_path / "run" / "report.html").read_text()
    assert "warning" not in (tmp_path / "run" / "history.jsonl").read_text()


def test_the_resolved_cell_is_written_down(tmp_path, store):
    overrides = [o for o in SMALL if "patch" not in o]
    raw = load_config(PretrainConfig, "tiny", [*overrides, "data.patch_size=32"])
    raw = raw.model_copy(update={"mask": raw.mask.model_copy(update={"block_size": None})})
    pretrain(store, tmp_path / "run", raw, console=Console(file=io.StringIO()))
    assert load_run(tmp_path / "run").config.mask.block_size == (8, 8, 8)  # the total stride


def test_what_defines_a_run_cannot_change_when_it_is_resumed(tmp_path, store):
    run = tmp_path / "run"
    start(store, run)
    for item in ("train.lr=1", "seed=3", "mask.ratio=0.5", "data.batch_size=1", "decode=masked"):
        key = item.partition("=")[0]
        with pytest.raises(
            UserError, match=re.escape(f"--set {item}: a resumed run keeps its {key}")
        ):
            resume(store, run, item)
    other = tmp_path / "other"
    write_heads(tmp_path / "volumes", 2, seed=50, size=24)
    preprocess([tmp_path / "volumes"], other, PreprocessConfig(spacing=None))
    with pytest.raises(UserError, match="is not the data this run was started on") as error:
        resume(other, run)
    assert str(store) in str(error.value)
    shutil.copytree(store, tmp_path / "moved")
    resume(tmp_path / "moved", run)  # the same data somewhere else


def test_excluded_voxels_are_not_scored(tmp_path, monkeypatch, store):
    to_device_ahead = objective.to_device_ahead

    def all_excluded(*arguments):
        for batch in to_device_ahead(*arguments):
            yield batch | {"excluded": torch.ones_like(batch["excluded"])}

    monkeypatch.setattr(objective, "to_device_ahead", all_excluded)
    start(store, tmp_path / "run")
    assert {record["loss"] for record in metrics(tmp_path / "run")} == {0.0}


def test_a_diverged_run_keeps_its_last_checkpoint(tmp_path, store):
    run = tmp_path / "run"
    with pytest.raises(DivergedError, match=r"^step \d: "):
        start(store, run, "train.optimizer=sgd", "train.lr=1e30", "train.save_every=1")
    assert [line.get("skipped", False) for line in metrics(run)] == [False, *[True] * 4]
    loaded = load_run(run)
    assert loaded.checkpoint.step == 4
    assert all(p.isfinite().all() for p in loaded.mae.parameters())
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["message"].startswith("step 4: loss ")


@pytest.mark.parametrize("content", ["file", "folder", "run"])
def test_an_existing_run_folder_is_refused_and_left_as_it_is(tmp_path, store, content):
    run = tmp_path / "run"
    if content == "file":
        run.write_text("mine")
    elif content == "folder":
        run.mkdir()
        (run / "mine.txt").write_text("mine")
    else:
        start(store, run)
    before = sorted((p, p.stat().st_mtime_ns) for p in [run, *run.rglob("*")])
    words = {"file": "is a file: choose", "folder": "holds no run: choose", "run": "or --resume to"}
    with pytest.raises(UserError, match=words[content]):
        start(store, run)
    assert sorted((p, p.stat().st_mtime_ns) for p in [run, *run.rglob("*")]) == before


def test_an_empty_run_folder_is_used(tmp_path, store):
    start(store, tmp_path)
    assert load_run(tmp_path).checkpoint.step == 6


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch, store):
    start(store, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(keeper, "write_checkpoint", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(store, tmp_path / "parts")
    (tmp_path / "parts" / "metrics.jsonl").write_text('{"step": 1, "lo')
    resume(store, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew_by_itself(tmp_path, store):
    run = tmp_path / "run"
    start(store, run)
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"its checkpoints are gone, but metrics\.jsonl has steps"):
        resume(store, run)
    assert (run / "metrics.jsonl").read_bytes() == before


def test_one_command_starts_a_run_and_goes_on_with_it(tmp_path, monkeypatch, store):
    start(store, tmp_path / "whole")
    killed_at(monkeypatch, 3, start, store, tmp_path / "parts")
    start(store, tmp_path / "parts", resume=True)  # as a scheduler runs it again
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(UserError, match=r"^--config: seed, train\.lr differ from those of the run"):
        start(store, tmp_path / "parts", "seed=4", "train.lr=1", resume=True)
    start(store, tmp_path / "parts", "train.steps=7", resume=True)
    assert last(tmp_path / "parts")[0] == "step-00000007"
    with pytest.raises(UserError, match="no run there"):
        resume(store, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    start(store, tmp_path / "new", resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "new")


def test_a_configuration_changed_by_hand_is_noticed(tmp_path, store):
    run = tmp_path / "run"
    start(store, run)
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 0.002", "lr = 0.001"))
    with pytest.raises(UserError, match=r"config\.toml: train\.lr differ from what this run was"):
        resume(store, run)


def test_what_makes_a_resumed_run_inexact_is_said_and_kept(tmp_path, monkeypatch, store):
    run = tmp_path / "run"
    killed_at(monkeypatch, 3, start, store, run)
    out = resume(store, run, "train.accumulate=2")
    words = "resumed, but not bit-exact, because accumulate 1 is now 2"
    assert f"warning: {words}\n" in out
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert words in [line["message"] for line in history]
    assert "not bit-exact" not in resume(store, run)


def test_progress_without_a_terminal_is_one_whole_line_at_a_time(tmp_path, store):
    lines = start(store, tmp_path / "run").splitlines()
    step = (
        r"step \d/6  loss \d+\.\d{4}  lr \d\.\d\de-\d\d  grad \d+(\.\d+)?  "
        r"samples/s \d+\.\d\d  data wait \d+%  left 0:00:\d\d"
    )
    validation = r"step \d/6  validation loss \d+\.\d{4}"
    assert all(re.fullmatch(f"{step}|{validation}", line) for line in lines)
    assert next(line for line in lines if re.fullmatch(validation, line)).startswith("step 2/6")
    assert lines[-2].startswith("step 6/6  loss")
