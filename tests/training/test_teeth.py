"""That byte-equality is worth something: whatever is left out of a resume makes it fail."""

import io
import itertools
import json
import shutil

import pytest
import torch
from rich.console import Console
from torch import nn

from sparsemae.checkpoint import Checkpoint
from sparsemae.config import load_config
from sparsemae.pretrain import PretrainConfig, pretrain
from sparsemae.pretraining import objective
from sparsemae.training import keeper, logs, loop
from sparsemae.training.guard import LossScale
from sparsemae.training.optimizer import make_optimizer
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "data.patch_size=16", "data.workers=0", "data.validation=1", "train.steps=8",
    "train.save_every=4", "train.ema=0.5",
)  # fmt: skip
OPTIMIZERS = {
    "sgd": ("train.optimizer=sgd", "train.lr=1e-3"),
    "adamw": ("train.optimizer=adamw", "train.lr=1e-3"),
}


def train(store, run, *overrides, **options):
    config = load_config(PretrainConfig, "tiny", [*SMALL, *overrides])
    console = Console(file=io.StringIO())
    return pretrain(store, run, config, console=console, resume=True, **options)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def halves(request, tmp_path_factory, store):
    """A whole run, one stopped at step 5 of 8, and the overrides of both."""
    folder, overrides = tmp_path_factory.mktemp(request.param), OPTIMIZERS[request.param]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(LossScale, "of", lambda precision: LossScale(8.0))  # as if of fp16
    train(store, folder / "whole", *overrides)
    asked = itertools.chain([0] * 4, itertools.repeat(85))
    assert train(store, folder / "half", *overrides, stop=lambda: next(asked)).step == 5
    patch.undo()
    torch.set_num_threads(threads)
    return request.param, folder, overrides


@pytest.fixture
def same_when_resumed(tmp_path, store, halves, run_bytes):
    """Resume the half run, and compare it with the whole one."""

    def compare():
        _, folder, overrides = halves
        run = tmp_path / "run"
        shutil.copytree(folder / "half", run)
        train(store, run, *overrides)
        return run_bytes(run) == run_bytes(folder / "whole")

    return compare


def test_with_everything_it_is_the_same(same_when_resumed):
    assert same_when_resumed()


def without(monkeypatch, kind, entry):
    """Checkpoints whose optimiser has lost an entry, or whose whole file is not loaded."""
    whole = getattr(Checkpoint, kind)

    def less(self):
        return {k: v for k, v in whole(self).items() if not k.endswith(f"/{entry}")}

    monkeypatch.setattr(Checkpoint, kind, less)


@pytest.mark.parametrize("entry", ["momentum_buffer", "exp_avg", "exp_avg_sq", "step"])
def test_without_a_part_of_the_optimizer_it_is_not(monkeypatch, halves, same_when_resumed, entry):
    if (entry == "momentum_buffer") != (halves[0] == "sgd"):
        pytest.skip("of the other optimiser")
    without(monkeypatch, "optimizer", entry)
    if entry == "momentum_buffer":
        assert not same_when_resumed()
    else:  # torch itself wants all three
        with pytest.raises((KeyError, AssertionError, RuntimeError)):
            same_when_resumed()


@pytest.mark.parametrize("which", [0, 1], ids=["model", "ema"])
def test_without_weights_it_is_not(monkeypatch, same_when_resumed, which):
    load, calls = keeper.load_model, []

    def some(*arguments):
        calls.append(1)
        if len(calls) - 1 != which:
            load(*arguments)

    monkeypatch.setattr(keeper, "load_model", some)
    assert not same_when_resumed()
    assert len(calls) == 2


def test_without_the_optimizer_it_is_not(monkeypatch, same_when_resumed):
    monkeypatch.setattr(keeper, "load_optimizer", lambda *_: None)
    assert not same_when_resumed()


@pytest.mark.parametrize("part", ["guard", "best", "scale"])
def test_without_the_trainers_own_counts_it_is_not(monkeypatch, same_when_resumed, part):
    find = keeper.Keeper._find

    def forgetful(self):
        found = find(self)
        trainer = found.meta["trainer"]
        trainer[part] = None if part == "best" else {}
        return found

    if part == "best":  # a worse one would be taken for the best
        monkeypatch.setattr(objective.Objective, "validate", lambda self, model: 1e9)
    monkeypatch.setattr(keeper.Keeper, "_find", forgetful)
    assert not same_when_resumed()


@pytest.mark.parametrize("step", [4, 6])
def test_at_another_step_it_is_not(monkeypatch, same_when_resumed, step):
    monkeypatch.setattr(Checkpoint, "step", property(lambda self: step))
    assert not same_when_resumed()


def test_with_a_loader_that_does_not_seek_it_is_not(monkeypatch, same_when_resumed):
    make = objective.make_loader

    def from_the_start(*arguments, **options):
        return make(*arguments, **(options | {"start_step": 0}))

    monkeypatch.setattr(objective, "make_loader", from_the_start)
    assert not same_when_resumed()


def test_with_masks_of_no_particular_step_it_is_not(monkeypatch, same_when_resumed):
    monkeypatch.setattr(objective, "_key", lambda *_: int(torch.randint(2**40, ())))
    assert not same_when_resumed()


def test_with_a_log_that_is_not_cut_back_it_is_not(monkeypatch, tmp_path, store, halves, run_bytes):
    _, folder, overrides = halves
    run = tmp_path / "run"
    shutil.copytree(folder / "half", run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0, "lr": 0.0, "grad_norm": 0.0}) + "\n")
    monkeypatch.setattr(logs, "_opened_at", lambda path, step: path.open("a", buffering=1))
    train(store, run, *overrides)
    assert run_bytes(run) != run_bytes(folder / "whole")


@pytest.mark.parametrize("seeded", [True, False])
def test_dropout_goes_on_with_the_same_numbers_only_if_steps_are_seeded(monkeypatch, seeded):
    if not seeded:
        monkeypatch.setattr(loop, "seed_step", lambda *_: None)
    xs = torch.randn(10, 4, 8)
    ends = []
    for parts in ((10,), (4, 10)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        config = TrainConfig(steps=10)
        state = loop.State(model, make_optimizer({"all": model.parameters()}, config))
        for end in parts:
            torch.manual_seed(end)
            loop.fit(
                state,
                lambda model, batch, step: loop.Loss(model(batch["x"]).square().mean()),
                [{"x": x} for x in xs[state.step :]],
                config,
                ranks=Ranks(torch.device("cpu")),
                on_step=lambda record: None,
                save=lambda state: None,
                stop=lambda state=state, end=end: state.step == end - 1,
            )
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends) == seeded
