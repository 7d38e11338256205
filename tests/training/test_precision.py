"""Half precision, averaged weights and compilation."""

import math

import pytest
import torch
from torch import nn

from sparsemae.checkpoint import load_checkpoint, load_model, take_snapshot, write_checkpoint
from sparsemae.training.guard import GROWTH_STEPS, START_SCALE, LossScale
from sparsemae.training.loop import Loss, State, fit
from sparsemae.training.optimizer import Ema, make_optimizer
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks


def train(model, steps=30, seen=None, scale=None, loss_of=None, **options):
    """Fit `model` to a line; its state and the records."""
    config = TrainConfig(steps=steps, lr=0.02, momentum=0.9, **options)
    ema = Ema(model, config.ema) if config.ema else None
    optimizer = make_optimizer({"all": model.parameters()}, config)
    state = State(model, optimizer, ema, scale=scale or LossScale.of(config.precision))
    generator, records = torch.Generator().manual_seed(1), []
    xs = torch.randn(steps, 16, 3, generator=generator)

    def usual(model, batch, step):
        out = model(batch["x"])
        if seen is not None:
            seen.append(out.dtype)
        return Loss((out.float() - batch["x"].sum(1, keepdim=True)).square().mean())

    fit(
        *(state, loss_of or usual, [{"x": x} for x in xs], config),
        ranks=Ranks(torch.device("cpu")),
        on_step=records.append,
        save=lambda state: None,
    )
    return state, records


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_learns_as_well_with_weights_in_float32(name, dtype):
    seen, results = [], {}
    for precision in ("fp32", name):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        scale = LossScale(256.0) if precision == "fp16" else None  # what it would settle at
        _, records = train(model, precision=precision, seen=seen, scale=scale)
        results[precision] = records[-1].loss
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert not any(r.skipped for r in records)
    assert seen == [torch.float32] * 30 + [dtype] * 30
    assert results[name] < 0.1 * records[0].loss
    assert results[name] == pytest.approx(results["fp32"], abs=0.02)


def test_gradients_too_small_for_fp16_come_through_the_scale():
    """Of 1e-9: zero in float16, unless the loss is scaled."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.half().float()

    def loss_of(model, batch, step):
        return Loss(Half.apply(model(batch["x"]).float()).sum() * 1e-9)

    norms = {}
    for scale in (1.0, START_SCALE):
        torch.manual_seed(0)
        _, [record] = train(
            nn.Linear(3, 1), steps=1, precision="fp16", scale=LossScale(scale), loss_of=loss_of
        )
        norms[scale] = record.grad_norm
    assert norms[1.0] == 0
    assert norms[START_SCALE] == pytest.approx(1.9e-8, rel=0.5)


def test_an_overflow_halves_the_scale_and_does_not_count_against_the_run():
    """With nothing allowed to be skipped, the run finds its scale and goes on."""
    overflowing = 2.0**12

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.inf if grad > overflowing else grad

    def loss_of(model, batch, step):
        return Loss(Overflow.apply(model(batch["x"]).float().square().mean()))

    torch.manual_seed(0)
    state, records = train(nn.Linear(3, 1), precision="fp16", max_skipped=0, loss_of=loss_of)
    assert [r.skipped for r in records] == [True] * 4 + [False] * 26
    assert state.scale.value == overflowing


def test_the_scale_grows_after_a_while_and_is_one_where_it_is_not_needed():
    scale = LossScale.of("fp16")
    for _ in range(GROWTH_STEPS):
        assert not scale.update(True, "fp16")
    assert scale == LossScale(2 * START_SCALE, 0)
    assert scale.update(False, "fp16")
    assert scale == LossScale(START_SCALE, 0)
    least = LossScale(1.0)
    assert not least.update(False, "fp16")  # nothing left to blame: the network diverged
    assert LossScale.of("bf16") == LossScale.of("fp32") == LossScale(1.0)
    plain = LossScale(1.0)
    assert not plain.update(False, "fp32")
    assert plain == LossScale(1.0)


def test_averaged_weights_are_the_moving_average_and_nothing_else_changes():
    decay, weights = 0.8, []
    for ema in (None, decay):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        expected = model.weight.detach().clone()

        def keep(model, batch, step, expected=expected):
            if step:
                expected.lerp_(model.weight.detach(), 1 - decay)
            return Loss((model(batch["x"]) - 1).square().mean())

        state, _ = train(model, ema=ema, loss_of=keep)
        weights.append(model.weight.detach().clone())
    expected.lerp_(model.weight.detach(), 1 - decay)
    assert torch.equal(*weights)
    assert torch.allclose(state.ema.model.weight, expected, rtol=1e-6)
    assert not torch.allclose(state.ema.model.weight, model.weight, rtol=1e-3)
    assert not any(p.requires_grad for p in state.ema.model.parameters())


def test_averaged_buffers_are_the_models():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    state, _ = train(model, ema=0.9)
    assert torch.equal(state.ema.model[1].running_mean, model[1].running_mean)
    assert state.ema.model[1].num_batches_tracked == 30
    assert not state.ema.model.training
    assert model.training


def test_a_compiled_model_learns_the_same_and_its_checkpoint_has_plain_names(tmp_path):
    results = {}
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
        calls = []
        model.register_forward_hook(
            lambda *_, calls=calls: calls.append(torch.compiler.is_compiling())
        )
        state, records = train(model, steps=5, compile=compiled)
        results[compiled] = [r.loss for r in records]
        assert all(calls) if compiled else not any(calls)
    assert results[True] == pytest.approx(results[False], rel=1e-5)
    snapshot = take_snapshot(5, state.model, state.optimizer, {})
    path = write_checkpoint(tmp_path, snapshot, keep=2, best=None)
    tensors = load_checkpoint(tmp_path)[0].model()
    assert set(tensors) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    load_model(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), tensors, path)
