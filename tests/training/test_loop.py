"""The loop: its records, clipping, parts, and what it does about a step that went wrong."""

import itertools
import math
import random
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

from sparsemae.errors import DivergedError, LoaderError, OutOfMemoryError, UserError
from sparsemae.training.guard import LossScale
from sparsemae.training.loop import Loss, State, fit, split_batch, to_device
from sparsemae.training.optimizer import Ema, make_optimizer
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks, pick_device
from sparsemae.training.schedules import learning_rate

ALONE = Ranks(torch.device("cpu"))


class Toy:
    """A linear fit: its state, its batches, and what `fit` called."""

    def __init__(self, model=None, **options):
        torch.manual_seed(0)
        self.config = TrainConfig(**{"steps": 40, "lr": 0.05, "momentum": 0.9, **options})
        model = model or nn.Linear(3, 1)
        optimizer = make_optimizer({"all": model.parameters()}, self.config)
        ema = Ema(model, self.config.ema) if self.config.ema else None
        self.state = State(model, optimizer, ema, scale=LossScale.of(self.config.precision))
        self.records, self.saved, self.asked = [], [], []
        generator = torch.Generator().manual_seed(1)
        self.target = torch.tensor([[1.0, -2.0, 0.5]])
        xs = torch.randn(1000, 8, 3, generator=generator)
        self.batches = [{"case": list("abcdefgh"), "x": x} for x in xs]

    def loss_of(self, model, batch, step):
        self.asked.append(step)
        return Loss((model(batch["x"]) - batch["x"] @ self.target.T).square().mean())

    def fit(self, *, on_step=None, loss_of=None, batches=None, **options):
        return fit(
            *(self.state, loss_of or self.loss_of, batches or self.batches, self.config),
            ranks=ALONE,
            on_step=on_step or self.records.append,
            save=lambda state: self.saved.append((state.step, len(self.records))),
            **options,
        )

    def weights(self):
        return torch.cat([p.detach().clone().flatten() for p in self.state.model.parameters()])

    def momentum(self):
        states = self.state.optimizer.state_dict()["state"].values()
        return [s["momentum_buffer"].clone() for s in states]


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "lr": 0.3}])
def test_the_loss_falls_and_every_step_is_recorded(options):
    toy = Toy(**options)
    toy.fit()
    assert toy.records[-1].loss < 0.01 * toy.records[0].loss
    assert [r.step for r in toy.records] == list(range(1, 41))  # steps done
    assert toy.asked == list(range(40))  # the step being done keys the masks
    assert [r.lr for r in toy.records] == [learning_rate(i, toy.config) for i in range(40)]
    assert all(r.samples == 8 for r in toy.records)
    assert toy.state.step == 40


@pytest.mark.parametrize("error", [LoaderError, UserError])
@pytest.mark.parametrize(("done", "saved"), [(0, []), (3, [2, 3]), (4, [2, 4])])
def test_what_was_done_before_the_loader_failed_is_saved_once(error, done, saved):
    toy = Toy(save_every=2)

    def batches():
        yield from toy.batches[:done]
        raise error("case a")

    with pytest.raises(error, match="case a"):
        toy.fit(batches=batches())
    assert [step for step, _ in toy.saved] == saved


def test_a_record_is_the_loss_and_the_gradient_before_clipping_of_its_step():
    toy = Toy(steps=3, clip_norm=1e-3)
    expected, weights = [], toy.weights()
    for batch in toy.batches[:1]:
        loss = toy.loss_of(toy.state.model, batch, 0).total
        grads = torch.autograd.grad(loss, list(toy.state.model.parameters()))
        expected.append((loss.item(), torch.cat([g.flatten() for g in grads]).norm().item()))
    toy.fit()
    assert (toy.records[0].loss, toy.records[0].grad_norm) == pytest.approx(expected[0])
    assert toy.records[0].grad_norm > 1
    # Nesterov's first step is lr (1 + momentum) times the clipped gradient; weight decay is small
    assert (toy.weights() - weights).norm() < 3 * 0.05 * (1.9 * 2.71) * 1e-3 * 1.1


def test_clipping_bounds_a_step():
    moved = {}
    for clip in (1e-3, 1e9):
        toy = Toy(steps=1, clip_norm=clip, momentum=0.0, weight_decay=0.0, lr=1.0)
        before = toy.weights()
        toy.fit()
        moved[clip] = (toy.weights() - before).norm().item()
        expected = min(clip, toy.records[0].grad_norm)
        assert moved[clip] == pytest.approx(expected, rel=1e-3)
    assert moved[1e-3] < moved[1e9]


def test_waiting_for_the_loader_is_recorded_apart():
    toy = Toy(steps=3)

    def slow():
        for batch in toy.batches:
            time.sleep(0.05)
            yield batch

    toy.fit(batches=slow())
    # the next batch is fetched in a step, so that all ranks know in time if there is none
    first, second, last = toy.records
    assert 0.1 <= first.wait_seconds < first.seconds
    assert 0.05 <= second.wait_seconds < second.seconds
    assert last.wait_seconds == 0


def test_saves_every_so_many_steps_and_at_the_end():
    toy = Toy(steps=7, save_every=3)
    toy.fit()
    assert toy.saved == [(3, 3), (6, 6), (7, 7)]  # after the step was recorded
    toy.fit()  # nothing is left to do
    assert len(toy.saved) == 3


class Break(torch.autograd.Function):
    """Identity whose gradient is multiplied."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def breaking(toy, steps, what, value):
    """A loss that is not finite in some steps."""

    def loss_of(model, batch, step):
        loss = toy.loss_of(model, batch, step).total
        if step not in steps:
            return Loss(loss)
        return Loss(loss * value if what == "loss" else Break.apply(loss, value))

    return loss_of


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 5])
def test_a_step_that_is_not_finite_updates_nothing_and_the_next_goes_on(optimizer, what, value, at):
    toy = Toy(optimizer=optimizer, steps=8, ema=0.5)
    kept = []

    def on_step(record):
        toy.records.append(record)
        state = toy.state.optimizer.state_dict()["state"]
        kept.append([toy.weights(), *(v.clone() for s in state.values() for v in s.values())])

    start = toy.weights()
    toy.fit(loss_of=breaking(toy, [at], what, value), on_step=on_step)
    assert [r.skipped for r in toy.records] == [i == at for i in range(8)]
    assert not math.isfinite(toy.records[at].loss if what == "loss" else toy.records[at].grad_norm)
    before, after = (kept[at - 1], kept[at]) if at else ([start], kept[at][:1])
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(torch.isfinite(t).all() for t in kept[-1])
    assert not torch.equal(kept[at][0], kept[-1][0])
    if not at:  # as if it had never been
        twin = Toy(optimizer=optimizer, steps=8)
        twin.fit(loss_of=breaking(twin, [0], "loss", math.nan))
        assert torch.equal(twin.weights(), toy.weights())


@pytest.mark.parametrize("most", [0, 2])
def test_too_many_such_steps_in_a_row_end_the_run_and_say_where(most):
    toy = Toy(save_every=1, max_skipped=most)
    bad = [2, *range(5, 20)] if most else [5]
    words = rf"^step {5 + most}: loss nan, .* {most + 1} steps? in a row.* lower train\.lr"
    with pytest.raises(DivergedError, match=words):
        toy.fit(loss_of=breaking(toy, bad, "loss", math.nan))
    assert [r.step for r in toy.records if r.skipped] == [i + 1 for i in bad if i <= 5 + most]
    assert toy.saved[-1][0] == 5 + most  # the steps before, and those left out before the last
    assert toy.weights().isfinite().all()
    assert all(m.isfinite().all() for m in toy.momentum())


def test_frozen_parameters_stay_and_are_not_decayed():
    toy = Toy(weight_decay=0.5)
    toy.state.model.bias.requires_grad_(False)
    toy.state.optimizer = make_optimizer({"all": toy.state.model.parameters()}, toy.config)
    before = toy.state.model.bias.clone()
    toy.fit()
    assert torch.equal(toy.state.model.bias, before)


def test_bf16_runs_the_forward_in_bf16_and_keeps_fp32_weights():
    toy, seen = Toy(precision="bf16", steps=2), []
    toy.state.model.register_forward_hook(lambda *a: seen.append(a[2].dtype))
    toy.fit()
    assert seen == [torch.bfloat16] * 2
    assert toy.weights().dtype == torch.float32


def test_a_run_in_two_parts_is_the_run_in_one():
    whole, parts = Toy(steps=12), Toy(steps=12)
    whole.fit()

    class Interrupt(Exception):
        pass

    def stop_after_five(record):
        parts.records.append(record)
        if record.step == 5:
            raise Interrupt

    with pytest.raises(Interrupt):
        parts.fit(on_step=stop_after_five)
    assert parts.state.step == 5
    parts.fit(batches=parts.batches[5:])
    assert torch.equal(whole.weights(), parts.weights())
    assert [r.loss for r in whole.records] == [r.loss for r in parts.records]


def test_only_as_many_batches_are_drawn_as_there_are_steps():
    toy, drawn = Toy(steps=3), itertools.count()
    toy.fit(batches=(b for b in toy.batches if next(drawn) >= 0))
    assert next(drawn) == 3


def test_devices_are_checked_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99", "", "meta"):
        words = f"train.device {name}: not on this machine, choose auto, cpu"
        with pytest.raises(UserError, match=re.escape(words)):
            pick_device(name)


def test_a_batch_moves_with_all_that_is_not_a_tensor():
    batch = to_device({"x": torch.zeros(2), "case": ["a", "b"]}, torch.device("meta"))
    assert batch["x"].device.type == "meta"
    assert batch["case"] == ["a", "b"]


def test_it_stops_when_asked_saves_and_says_so():
    toy = Toy(save_every=100)
    assert not toy.fit(stop=lambda: toy.state.step == 6)
    assert toy.state.step == 7  # asked in the seventh step
    assert toy.saved == [(7, 7)]
    assert toy.fit(batches=toy.batches[7:])
    assert toy.saved == [(7, 7), (40, 40)]


def test_a_stop_in_the_last_step_is_the_end():
    toy = Toy(steps=3)
    assert toy.fit(stop=lambda: toy.state.step == 2)
    assert toy.saved == [(3, 3)]


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_a_batch_in_parts_is_the_batch(accumulate):
    whole, parts = Toy(steps=10), Toy(steps=10, accumulate=accumulate)

    def loss_of(model, batch, step):
        """Samples of different weight, as with excluded voxels: a mean of means would be wrong."""
        weights = torch.arange(1.0, 9.0)[list(batch["slots"])]
        error = (model(batch["x"]) - batch["x"] @ whole.target.T)[:, 0].square()
        return Loss((weights * error).mean(), weights.mean())

    for toy in (whole, parts):
        toy.fit(loss_of=loss_of)
    for one, other in zip(whole.records, parts.records, strict=True):
        assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=1e-5)
        assert one.samples == other.samples == 8
    assert torch.allclose(whole.weights(), parts.weights(), rtol=1e-5)
    assert len(parts.asked) == 0


def test_parts_know_their_place_in_the_batch_of_all_ranks():
    batch = {"x": torch.arange(6), "case": list("abcdef")}
    parts = list(split_batch(batch, 3, Ranks(torch.device("cpu"), rank=1, world_size=2)))
    assert [p["slots"] for p in parts] == [range(6, 8), range(8, 10), range(10, 12)]
    assert [p["case"] for p in parts] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert [p["x"].tolist() for p in parts] == [[0, 1], [2, 3], [4, 5]]


def test_the_host_one_step_ahead_computes_and_records_the_same(monkeypatch):
    """As on a GPU: numbers are read a step later, and all of them before anything is saved."""
    usual, ahead = Toy(save_every=3, steps=11), Toy(save_every=3, steps=11)
    bad = [4, 5]
    usual.fit(loss_of=breaking(usual, bad, "loss", math.nan))
    monkeypatch.setattr("sparsemae.training.loop.steps_ahead", lambda device: 1)
    seen = []

    def on_step(record):
        ahead.records.append(record)
        seen.append((record.step, ahead.state.step))

    ahead.fit(loss_of=breaking(ahead, bad, "loss", math.nan), on_step=on_step)
    assert torch.equal(usual.weights(), ahead.weights())
    assert usual.saved == ahead.saved == [(3, 3), (6, 6), (9, 9), (11, 11)]
    for one, other in zip(usual.records, ahead.records, strict=True):
        assert (one.step, one.skipped, one.lr) == (other.step, other.skipped, other.lr)
        assert one.loss == other.loss or one.skipped
    assert (1, 2) in seen  # read when the second had been launched
    assert (3, 3) in seen  # before a save
    assert usual.state.guard == ahead.state.guard


def test_random_numbers_follow_from_the_step_and_leave_the_global_generators_alone():
    drawn = {}

    def loss_of(model, batch, step):
        numbers = torch.rand(()).item(), np.random.rand(), random.random()
        assert drawn.setdefault(step, numbers) == numbers
        return Loss(model(batch["x"]).square().mean())

    for start in (0, 3):
        toy = Toy(steps=6)
        toy.state.step = start
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        toy.fit(loss_of=loss_of, batches=toy.batches[start:], seed=9)
        after = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
        torch.manual_seed(5), np.random.seed(5), random.seed(5)
        assert after == (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random())
    assert len({value for numbers in drawn.values() for value in numbers}) == 18


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_running_out_of_memory_names_three_settings(error):
    toy = Toy()

    def loss_of(model, batch, step):
        if step == 2:
            raise error
        return toy.loss_of(model, batch, step)

    with pytest.raises(OutOfMemoryError, match=r"^step 2: out of memory") as caught:
        toy.fit(loss_of=loss_of)
    for key in ("train.accumulate", "data.batch_size", "data.patch_size"):
        assert key in str(caught.value)


def test_any_other_error_is_itself():
    toy = Toy()

    def loss_of(model, batch, step):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match=r"^a bug$"):
        toy.fit(loss_of=loss_of)


def test_a_group_at_a_rate_of_zero_is_left_alone_altogether():
    """Neither decayed, nor given momentum, nor counted in the norm: the encoder in a sawtooth."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    toy = Toy(model, schedule="sawtooth", warmup=5, steps=30, weight_decay=0.1)
    encoder, decoder = (list(layer.parameters()) for layer in model)
    optimizer = make_optimizer({"encoder": encoder, "decoder": decoder}, toy.config)
    toy.state.optimizer = optimizer
    first = [p.clone() for p in encoder]
    moved = []

    def on_step(record):
        same = all(torch.equal(p, q) for p, q in zip(encoder, first, strict=True))
        still = all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in encoder)
        moved.append((not same, not still))

    toy.fit(on_step=on_step)
    assert moved == [(False, False)] * 5 + [(True, True)] * 25
