"""Curves: thinned out without losing what matters, on an axis that shows it."""

import re

import numpy as np
import pytest

from sparsemae.reporting.curves import Curve, draw_curves


def places(drawn, kind="main"):
    text = re.search(rf'<polyline class="{kind}" points="([^"]*)"', drawn)[1]
    return np.array([[float(n) for n in pair.split(",")] for pair in text.split()])


def ticks(drawn, kind):
    return [w.replace(",", "") for w in re.findall(rf'<text class="{kind}"[^>]*>([^<]*)<', drawn)]


def test_a_short_curve_keeps_every_point_and_falls_where_it_falls():
    steps, values = np.arange(1.0, 41), np.linspace(2, 1, 40)
    drawn = places(draw_curves("loss", [Curve("loss", steps, values)]))
    assert len(drawn) == 40
    assert (np.diff(drawn[:, 0]) > 0).all()
    assert (np.diff(drawn[:, 1]) > 0).all()  # downwards on a screen


def test_a_long_one_is_bounded_and_one_spike_stays_in_sight():
    steps, values = np.arange(1.0, 250_001), np.ones(250_000)
    values[123_456] = 40.0
    drawn = draw_curves("loss", [Curve("loss", steps, values)])
    assert len(drawn) < 30_000
    band = re.search(r'<polygon class="band" points="([^"]*)"', drawn)[1]
    heights = [float(pair.split(",")[1]) for pair in band.split()]
    assert min(heights) < 30 < max(heights)


def test_the_axis_is_logarithmic_where_it_spans_decades_and_only_there():
    steps = np.arange(1.0, 101)
    wide = draw_curves("loss", [Curve("loss", steps, np.geomspace(1000, 0.1, 100))])
    assert np.allclose(np.diff(places(wide)[:, 1]), np.diff(places(wide)[:, 1])[0], atol=0.2)
    assert {"0.1", "1", "10", "100", "1000"} >= set(ticks(wide, "y")) >= {"1", "10", "100"}
    narrow = draw_curves("loss", [Curve("loss", steps, np.linspace(2, 1, 100))])
    assert {"1", "1.5", "2"} == set(ticks(narrow, "y"))
    zero = draw_curves("wait", [Curve("wait", steps, np.linspace(0, 50, 100))], floor=0)
    assert "0" in ticks(zero, "y")


def test_a_floor_is_kept_and_constants_are_drawn():
    for value in (0.0, 5.0):
        drawn = draw_curves("x", [Curve("x", np.arange(5.0), np.full(5, value))], floor=0)
        assert all(float(tick) >= 0 for tick in ticks(drawn, "y"))


@pytest.mark.parametrize("count", [1, 2])
def test_few_points_are_drawn(count):
    drawn = draw_curves("x", [Curve("x", np.arange(float(count)), np.ones(count), "points")])
    assert drawn.count("<circle") == count


def test_nothing_is_said_to_be_nothing():
    assert "Nothing yet" in draw_curves("x", [Curve("x", np.zeros(0), np.zeros(0))])


def test_what_has_a_floor_is_never_logarithmic():
    drawn = draw_curves("speed", [Curve("x", np.arange(3.0), np.array([9.0, 0.01, 9.0]))], floor=0)
    assert set(ticks(drawn, "y")) == {"0", "2", "4", "6", "8"}


def test_numbers_on_an_axis_of_very_many_decades_stay_few():
    drawn = draw_curves("loss", [Curve("x", np.arange(3.0), np.array([1e-3, 1.0, 1e38]))])
    assert 4 <= len(ticks(drawn, "y")) <= 9


def test_a_mark_after_the_last_finite_value_is_in_the_chart():
    curve = Curve("x", np.arange(1.0, 11), np.ones(10))
    drawn = draw_curves("x", [curve], marks=[("skipped", 20)])
    right = float(re.search(r'<line class="grid" x1="[\d.]*" x2="([\d.]*)"', drawn)[1])
    assert float(re.search(r'<line class="skipped" x1="([\d.]*)"', drawn)[1]) == right
    assert places(drawn)[-1, 0] < right / 1.5


def test_marks_are_at_their_steps():
    curve = Curve("x", np.arange(1.0, 101), np.arange(1.0, 101))
    drawn = draw_curves("x", [curve], marks=[("skipped", 50), ("spike", 100)])
    x = {
        m[1]: float(m[2])
        for m in re.finditer(r'<line class="(skipped|spike)" x1="([\d.]*)"', drawn)
    }
    line = places(drawn)
    assert x["skipped"] == pytest.approx(line[49, 0], abs=0.6)  # whole pixels
    assert x["spike"] == pytest.approx(line[99, 0], abs=0.6)  # whole pixels
