"""Curves over the steps of a run. Thinned out, but no spike gets lost: the band behind a line goes
from the least to the largest value of the steps it stands for."""

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from sparsemae.reporting.svg import Scale, points, svg, widened

STYLE = """
.curves { display: grid; gap: 20px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)) }
figcaption + .curve { margin-top: -2px } .curve svg { max-width: none; touch-action: pan-y }
.curve output { display: block; min-height: 18px; font-size: 12px;
  font-variant-numeric: tabular-nums }
.curve .band { fill: var(--blue); opacity: .25 }
.curve .main { stroke: var(--blue); stroke-width: 1.3 } .curve circle.main { fill: var(--blue) }
.curve .points { stroke: var(--ink); stroke-width: 1.3 } .curve circle.points { fill: var(--ink) }
.skipped { stroke: var(--red); stroke-width: 2 } .spike { stroke: #d28a00; stroke-width: 2 }
.curve text.end { text-anchor: end }
.cursor { stroke: var(--soft); stroke-dasharray: 3 3 }
.legend { font-weight: 600 } .legend.main { color: var(--blue) }
.legend.points { color: var(--ink) }
.legend.skipped { color: var(--red) } .legend.spike { color: #a86e00 }
@media (max-width: 600px) { .curve svg text { font-size: 15px } }
"""

_WIDTH, _HEIGHT = 520, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 26  # around the drawing area
_BINS = 300
_DOTS = 60  # more would hide the line
_LOG_DECADES = 1.5  # a positive curve that spans more is drawn on a logarithmic axis
_DECADES = 6  # that have a number on the axis, at most about


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    steps: Float[np.ndarray, "n"]
    values: Float[np.ndarray, "n"]  # finite
    kind: str = "main"  # CSS class; "points" has dots, if they are few


def draw_curves(
    label: str, curves: Sequence[Curve], *, marks: Sequence[tuple[str, float]] = (), floor=None
) -> str:
    """A chart of curves that share their axes; a pointer over it reads values off.

    Args:
        marks: Kind (CSS class) and step of what is worth a mark at the foot of the chart.
        floor: The least value of the axis, if it has one by nature; then it is never logarithmic.
    """
    curves = [curve for curve in curves if len(curve.steps)]
    if not curves:
        return '<p class="soft">Nothing yet.</p>'
    thinned = [_thinned(curve) for curve in curves]
    ends = [t[0][i] for t in thinned for i in (0, -1)] + [step for _, step in marks]
    x = Scale(*widened(min(ends), max(ends)), _LEFT, _WIDTH - _RIGHT)
    low, high = min(t[2].min() for t in thinned), max(t[3].max() for t in thinned)
    y = _Vertical(float(low), float(high), floor)
    shapes = _frame(x, y)
    for curve, (steps, mean, least, most) in zip(curves, thinned, strict=True):
        if curve.kind != "points" and (most > least).any():
            edge = np.concatenate([steps, steps[::-1]])
            band = np.concatenate([most, least[::-1]])
            shapes.append(f'<polygon class="band" points="{y.points(x, edge, band)}"/>')
        line = y.points(x, steps, mean)
        shapes.append(f'<polyline class="{curve.kind}" points="{line}"/>')
        if (curve.kind == "points" and len(steps) <= _DOTS) or len(steps) == 1:
            places = (place.split(",") for place in line.split())
            shapes += [
                f'<circle class="{curve.kind}" cx="{a}" cy="{b}" r="2.2"/>' for a, b in places
            ]
    foot = _HEIGHT - _BOTTOM
    for kind, place in dict.fromkeys((kind, round(x(step))) for kind, step in marks):
        at = f'x1="{place}" x2="{place}" y1="{foot}" y2="{foot - 9}"'
        shapes.append(f'<line class="{kind}" {at}/>')
    drawn = svg(label, shapes, (_WIDTH, _HEIGHT))
    read = html.escape(json.dumps(_readable(x, curves, thinned), separators=(",", ":")))
    return f'<div class="curve" data-read="{read}"><output></output>{drawn}</div>'


def _readable(x: Scale, curves: Sequence[Curve], thinned: Sequence[tuple]) -> list[dict]:
    """What the pointer reads off: places, and step, mean, least and largest value at each."""
    return [
        {
            "name": curve.name,
            "x": [round(x(step), 1) for step in steps.tolist()],
            "steps": steps.round().astype(int).tolist(),
            "values": [
                [f"{v:.3g}" for v in ((mean,) if least == most else (mean, least, most))]
                for mean, least, most in zip(*(a.tolist() for a in values), strict=True)
            ],
        }
        for curve, (steps, *values) in zip(curves, thinned, strict=True)
    ]


class _Vertical:
    """The vertical axis, logarithmic if the values ask for it."""

    def __init__(self, low: float, high: float, floor: float | None):
        self.log = floor is None and low > 0 and math.log10(high / low) > _LOG_DECADES
        if self.log:
            low, high = math.log10(low), math.log10(high)
        elif floor is not None:
            low, high = floor, max(high, floor + 1e-9) if high > floor else floor + 1
        else:
            low, high = widened(low, high)
        room = 0.04 * (high - low)
        bottom = low if floor is not None else low - room
        self.scale = Scale(bottom, high + room, _HEIGHT - _BOTTOM, _TOP)

    def points(self, x: Scale, steps: np.ndarray, values: np.ndarray) -> str:
        return points(x, self.scale, steps, np.log10(values) if self.log else values)

    def ticks(self) -> list[tuple[float, str]]:
        """Place and text."""
        if not self.log:
            return [(self.scale(t), f"{round(t, 12):g}") for t in self.scale.ticks(5)]
        low, high = self.scale.low, self.scale.high
        first, last = math.ceil(low), math.floor(high)
        each = 1 + (last - first) // _DECADES
        within = (1,) if last - first > 2 else (1, 2, 5)
        values = [n * 10.0**d for d in range(first - 1, last + 1, each) for n in within]
        inside = [v for v in values if low <= math.log10(v) <= high]
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
    for tick in x.ticks(5):
        if tick == int(tick):
            last = x(tick) > _WIDTH - _RIGHT - 20  # centred, it would leave the chart
            at = f'x="{_WIDTH - 2 if last else x(tick):.1f}" y="{_HEIGHT - 7}"'
            kind = "x end" if last else "x"
            shapes.append(f'<text class="{kind}" {at}>{int(tick):,}</text>')
    return shapes
