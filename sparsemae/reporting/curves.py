"""Curves over the steps of a run. Thinned out, but no spike gets lost: the band behind a line goes
from the least to the largest value of the steps it stands for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparsemae.reporting.svg import Scale, points, svg, widened

_WIDTH, _HEIGHT = 640, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 26  # around the drawing area
_BINS = 300
_LOG_DECADES = 1.5  # a positive curve that spans more is drawn on a logarithmic axis


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    steps: Float[np.ndarray, "n"]
    values: Float[np.ndarray, "n"]
    kind: str = "main"  # CSS class; "points" is drawn with a dot at each step


def draw_curves(
    label: str, curves: Sequence[Curve], *, marks: Sequence[tuple[str, float]] = (), floor=None
) -> str:
    """A chart of curves that share their axes.

    Args:
        marks: Kind (CSS class) and step of what is worth a mark at the foot of the chart.
        floor: The least value of the axis, if it has one by nature.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return '<p class="soft">Nothing yet.</p>'
    thinned = [_thinned(curve) for curve in curves]
    first = min(t[0][0] for t in thinned)
    last = max(t[0][-1] for t in thinned)
    x = Scale(*widened(first, last), _LEFT, _WIDTH - _RIGHT)
    low, high = min(t[2].min() for t in thinned), max(t[3].max() for t in thinned)
    y = _Vertical(float(low), float(high), floor)
    shapes = _frame(x, y)
    for curve, (steps, mean, least, most) in zip(curves, thinned, strict=True):
        if curve.kind != "points" and (most > least).any():
            edge = np.concatenate([steps, steps[::-1]])
            band = np.concatenate([most, least[::-1]])
            shapes.append(f'<polygon class="band" points="{y.points(x, edge, band)}"/>')
        line = y.points(x, steps, mean)
        name = f"<title>{curve.name}</title>"
        shapes.append(f'<polyline class="{curve.kind}" points="{line}">{name}</polyline>')
        if curve.kind == "points" or len(steps) == 1:
            places = (place.split(",") for place in line.split())
            shapes += [
                f'<circle class="{curve.kind}" cx="{a}" cy="{b}" r="2.5"/>' for a, b in places
            ]
    foot = _HEIGHT - _BOTTOM
    for kind, step in marks[-_BINS:]:
        at = f'x1="{x(step):.1f}" x2="{x(step):.1f}" y1="{foot}" y2="{foot - 9}"'
        shapes.append(f'<line class="{kind}" {at}><title>{kind} at step {step}</title></line>')
    return svg(label, shapes, (_WIDTH, _HEIGHT))


class _Vertical:
    """The vertical axis, logarithmic if the values ask for it."""

    def __init__(self, low: float, high: float, floor: float | None):
        self.log = low > 0 and math.log10(high / low) > _LOG_DECADES
        if self.log:
            low, high = math.log10(low), math.log10(high)
        else:
            low, high = widened(low if floor is None else min(low, floor), high)
            low = low if floor is None else max(low, floor)
        room = 0.04 * (high - low)
        bottom = low if floor is not None and not self.log else low - room
        self.scale = Scale(bottom, high + room, _HEIGHT - _BOTTOM, _TOP)

    def points(self, x: Scale, steps: np.ndarray, values: np.ndarray) -> str:
        return points(x, self.scale, steps, np.log10(values) if self.log else values)

    def ticks(self) -> list[tuple[float, str]]:
        """Place and text."""
        if not self.log:
            return [(self.scale(t), f"{round(t, 12):g}") for t in self.scale.ticks(5)]
        decades = range(math.ceil(self.scale.low), math.floor(self.scale.high) + 1)
        steps = (1,) if len(decades) > 3 else (1, 2, 5)
        values = [n * 10.0**d for d in range(decades.start - 1, decades.stop) for n in steps]
        inside = [v for v in values if self.scale.low <= math.log10(v) <= self.scale.high]
        return [(self.scale(math.log10(v)), f"{v:g}") for v in inside]


def _thinned(curve: Curve) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean, least and largest value of each bin of as many steps."""
    n = len(curve.steps)
    starts = np.unique(np.linspace(0, n, min(n, _BINS), endpoint=False).astype(int))
    counts = np.diff([*starts, n])
    steps = np.add.reduceat(curve.steps, starts) / counts
    mean = np.add.reduceat(curve.values, starts) / counts
    return (
        steps,
        mean,
        np.minimum.reduceat(curve.values, starts),
        np.maximum.reduceat(curve.values, starts),
    )


def _frame(x: Scale, y: _Vertical) -> list[str]:
    shapes = []
    for place, words in y.ticks():
        at = f'y1="{place:.1f}" y2="{place:.1f}"'
        shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {at}/>')
        shapes.append(f'<text class="y" x="{_LEFT - 5}" y="{place + 3.5:.1f}">{words}</text>')
    for tick in x.ticks(6):
        if tick == int(tick):
            at = f'x="{x(tick):.1f}" y="{_HEIGHT - 8}"'
            shapes.append(f'<text class="x" {at}>{int(tick):,}</text>')
    return shapes
