"""The loop: its schedule, its records, clipping, and the refusal of a step that diverged."""

import itertools
import math
import re
import time

import pytest
import torch
from torch import nn

from sparsemae.errors import DivergedError, LoaderError, UserError
from sparsemae.training import (
    State,
    TrainConfig,
    fit,
    make_optimizer,
    pick_device,
    poly_lr,
    to_device,
)


class Toy:
    """A linear fit: its state, its batches, and what `fit` called."""

    def __init__(self, **options):
        torch.manual_seed(0)
        self.config = TrainConfig(**{"steps": 40, "lr": 0.05, "momentum": 0.9, **options})
        model = nn.Linear(3, 1)
        self.state = State(model, make_optimizer(model, self.config))
        self.records, self.saved, self.asked = [], [], []
        generator = torch.Generator().manual_seed(1)
        self.target = torch.tensor([[1.0, -2.0, 0.5]])
        xs = torch.randn(1000, 8, 3, generator=generator)
        self.batches = [{"case": ["a"], "x": x} for x in xs]

    def loss_of(self, batch, step):
        self.asked.append(step)
        return (self.state.model(batch["x"]) - batch["x"] @ self.target.T).square().mean()

    def fit(self, *, on_step=None, loss_of=None, batches=None):
        fit(
            *(self.state, loss_of or self.loss_of, batches or self.batches, self.config),
            on_step=on_step or self.records.append,
            save=lambda state: self.saved.append((state.step, len(self.records))),
        )

    def weights(self):
        return torch.cat([p.detach().clone().flatten() for p in self.state.model.parameters()])


def test_poly_lr_falls_from_the_peak_to_zero():
    assert poly_lr(0, 250_000, 1e-2) == 1e-2
    assert poly_lr(125_000, 250_000, 1e-2) == pytest.approx(1e-2 * 0.5**0.9)
    assert poly_lr(10, 10, 1e-2) == 0
    assert poly_lr(1, 4, 2.0, power=2) == pytest.approx(2 * 0.75**2)
    values = [poly_lr(i, 100, 1.0) for i in range(101)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "lr": 0.3}])
def test_the_loss_falls_and_every_step_is_recorded(options):
    toy = Toy(**options)
    toy.fit()
    assert toy.records[-1].loss < 0.01 * toy.records[0].loss
    assert [r.step for r in toy.records] == list(range(1, 41))  # steps done
    assert toy.asked == list(range(40))  # the step being done keys the masks
    assert [r.lr for r in toy.records] == [poly_lr(i, 40, toy.config.lr) for i in range(40)]
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
        loss = toy.loss_of(batch, 0)
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
    assert all(0.05 <= r.wait_seconds < r.seconds for r in toy.records)


def test_saves_every_so_many_steps_and_at_the_end():
    toy = Toy(steps=7, save_every=3)
    toy.fit()
    assert toy.saved == [(3, 3), (6, 6), (7, 7)]  # after the step was recorded
    toy.fit()  # nothing is left to do
    assert len(toy.saved) == 3


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_step_updates_nothing_and_says_where(what, value):
    toy = Toy(save_every=1)

    class Break(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * value

    def loss_of(batch, step):
        loss = toy.loss_of(batch, step)
        if step != 5:
            return loss
        return loss * value if what == "loss" else Break.apply(loss)

    kept = {}

    def on_step(record):
        toy.records.append(record)
        state = toy.state.optimizer.state_dict()["state"]
        kept["weights"] = toy.weights()
        kept["momentum"] = [s["momentum_buffer"].clone() for s in state.values()]

    with pytest.raises(DivergedError, match=r"^step 5: loss .* lower train\.lr$"):
        toy.fit(loss_of=loss_of, on_step=on_step)
    assert toy.state.step == len(toy.records) == len(toy.saved) == 5
    assert torch.equal(toy.weights(), kept["weights"])
    momentum = [s["momentum_buffer"] for s in toy.state.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, kept["momentum"], strict=True))


def test_frozen_parameters_stay_and_are_not_decayed():
    toy = Toy(weight_decay=0.5)
    toy.state.model.bias.requires_grad_(False)
    toy.state.optimizer = make_optimizer(toy.state.model, toy.config)
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
