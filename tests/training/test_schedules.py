"""Learning rates: functions of the step alone."""

import math

import pytest

from sparsemae.errors import UserError
from sparsemae.training.options import TrainConfig, check_train
from sparsemae.training.schedules import cosine, learning_rate, poly


def rates(group="decoder", **options):
    config = TrainConfig(**{"steps": 100, "lr": 2.0, **options})
    return [learning_rate(step, config, group) for step in range(config.steps)]


def test_poly_falls_from_the_peak_to_zero():
    assert poly(0, 250_000, 1e-2) == 1e-2
    assert poly(125_000, 250_000, 1e-2) == pytest.approx(1e-2 * 0.5**0.9)
    assert poly(10, 10, 1e-2) == 0
    assert poly(1, 4, 2.0, power=2) == pytest.approx(2 * 0.75**2)
    assert rates() == [2 * (1 - i / 100) ** 0.9 for i in range(100)]


def test_cosine_falls_from_the_peak_to_zero():
    assert cosine(0, 10, 3.0) == 3.0
    assert cosine(5, 10, 3.0) == pytest.approx(1.5)
    assert cosine(10, 10, 3.0) == pytest.approx(0)
    values = rates(schedule="cosine")
    assert values == sorted(values, reverse=True)
    assert values[25] == pytest.approx(1 + math.sqrt(0.5))


def test_constant_stays():
    assert set(rates(schedule="constant")) == {2.0}


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant"])
def test_warm_up_rises_evenly_to_the_peak_and_the_rest_follows_from_there(schedule):
    values = rates(schedule=schedule, warmup=20)
    assert values[:20] == pytest.approx([0.1 * (i + 1) for i in range(20)])
    assert values[20:] == pytest.approx(rates(schedule=schedule, steps=80))


def test_sawtooth_warms_up_the_decoder_then_both_then_decays():
    encoder, decoder = (rates(g, schedule="sawtooth", warmup=10) for g in ("encoder", "decoder"))
    rise = [0.2 * (i + 1) for i in range(10)]
    assert encoder[:10] == [0] * 10
    assert decoder[:10] == decoder[10:20] == encoder[10:20] == pytest.approx(rise)
    assert encoder[20:] == decoder[20:] == rates(steps=80)


@pytest.mark.parametrize("schedule", ["poly", "cosine", "constant", "sawtooth"])
def test_no_rate_is_negative_or_above_the_peak(schedule):
    for warmup in (0, 1, 30):
        values = rates(schedule=schedule, warmup=warmup)
        assert all(0 <= value <= 2 for value in values)
        assert max(values) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cuda_graphs": True}, r"^train\.cuda_graphs: not offered\. .*train\.compile"),
        (
            {"warmup": 10},
            r"^train\.warmup 10 leaves nothing of train\.steps 10: take fewer steps of warm-up, or "
            r"more steps$",
        ),
        ({"warmup": 5, "schedule": "sawtooth"}, r"^train\.warmup 5, twice with sawtooth, leaves"),
    ],
)
def test_what_cannot_be_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        check_train(TrainConfig(**{"steps": 10, **options}))


def test_what_can_be_is_not():
    check_train(TrainConfig(steps=10, warmup=9))
    check_train(TrainConfig(steps=10, warmup=4, schedule="sawtooth"))
