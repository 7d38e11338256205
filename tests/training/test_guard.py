"""Spikes of the loss, and steps that were left out."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from sparsemae.errors import DivergedError
from sparsemae.training.guard import SETTLED, Guard


def fed(losses, guard=None):
    guard = guard or Guard()
    return guard, [guard.accept(float(loss)) for loss in losses]


def losses(count, seed=0, scatter=0.1):
    """A loss that falls and scatters by a tenth, as with random masks."""
    rng = np.random.default_rng(seed)
    level = 0.3 + np.exp(-np.arange(count) / 100)
    return level * np.exp(scatter * rng.standard_normal(count))


@pytest.mark.parametrize("seed", range(20))
def test_usual_scatter_is_no_spike(seed):
    _, spikes = fed(losses(2000, seed))
    assert not any(spikes)


@pytest.mark.parametrize("factor", [5.0, 50.0])
def test_a_loss_far_above_is_one(factor):
    values = losses(300)
    values[200] *= factor
    _, spikes = fed(values)
    assert [i for i, spike in enumerate(spikes) if spike] == [200]


def test_nothing_is_said_before_the_loss_has_settled():
    values = losses(SETTLED + 1)
    values[SETTLED - 1] *= 50
    assert not any(fed(values)[1])
    values = losses(SETTLED + 1)
    values[SETTLED] *= 50
    assert fed(values)[1][SETTLED]


def test_a_constant_loss_has_no_spikes_until_it_jumps():
    assert not any(fed([0.5] * 200)[1])
    assert fed([0.5] * 200 + [0.76])[1][-1]
    assert not fed([0.5] * 200 + [0.74])[1][-1]


def test_it_goes_on_from_a_checkpoint_bit_for_bit():
    values = losses(400)
    whole, spikes = fed(values)
    half, first = fed(values[:150])
    back = Guard(**json.loads(json.dumps(asdict(half))))
    _, second = fed(values[150:], back)
    assert first + second == spikes
    assert back == whole


def test_steps_left_out_count_in_a_row_only():
    guard = Guard()
    for _ in range(5):
        guard.skip(1, float("nan"), 1.0, 1)
        guard.accept(0.5)
    guard.skip(7, float("nan"), 1.0, 1)
    with pytest.raises(DivergedError, match=r"^step 8: loss inf, gradient norm nan, .* 2 steps in"):
        guard.skip(8, float("inf"), float("nan"), 1)
