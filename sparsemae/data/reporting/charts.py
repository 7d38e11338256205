"""Distributions as SVG text for a page that stands alone."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sparsemae.reporting.svg import Scale, points, svg, widened

_WIDTH, _HEIGHT = 340, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 22  # around the drawing area
_TAIL = 3.0  # times the 99th percentile: where values beyond it are drawn in the last bar
_BARS = 30


def bars(values: Sequence[float], label: str) -> str:
    """How often which value occurs. A few far larger ones are all counted in the last bar."""
    values = np.asarray(values, dtype=np.float64)
    low, high, beyond = *_span(values), 0
    if high > _TAIL * (usual := float(np.percentile(values, 99))) > 0:
        beyond, high = int(np.count_nonzero(values > usual)), usual
    low, high = widened(low, high)
    counts, edges = np.histogram(values.clip(low, high), bins=_BARS, range=(low, high))
    x, y = Scale(low, high, _LEFT, _WIDTH - _RIGHT), _vertical(counts.max())
    shapes = [
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{y(n):.1f}" width="{x(b) - x(a) - 1:.1f}" '
        f'height="{y(0) - y(n):.1f}"><title>{n} from {a:.4g} to {b:.4g}</title></rect>'
        for n, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if n
    ]
    if beyond:
        more = f"{beyond} larger, up to {values.max():.4g}"
        shapes.append(f'<text class="note" x="{_WIDTH - _RIGHT}" y="16">{more}</text>')
    return svg(label, [*_frame(x, y, _count), *shapes], (_WIDTH, _HEIGHT))


def lines(edges: Float[np.ndarray, "bins+1"], rows: Sequence[np.ndarray], label: str) -> str:
    """One thin line per row of shares, and their mean. Its scale is that of the inner bins: what
    the end bins gather from beyond may run out of the chart."""
    rows = np.asarray(rows)
    centres = (edges[:-1] + edges[1:]) / 2
    top = float(rows[:, 1:-1].max()) or float(rows.max())
    x, y = Scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT), _vertical(top)
    shapes = [
        f'<polyline class="{name}" points="{points(x, y, centres, row.clip(0, top))}"/>'
        for name, row in [*(("one", row) for row in rows), ("mean", rows.mean(0))]
    ]
    return svg(
        label, [*_frame(x, y, lambda share: f"{100 * share:.3g} %"), *shapes], (_WIDTH, _HEIGHT)
    )


def _vertical(top: float) -> Scale:
    return Scale(0, top or 1, _HEIGHT - _BOTTOM, _TOP)


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _count(tick: float) -> str:
    """There is no half volume, nor a line for it."""
    return f"{tick:.0f}" if tick == int(tick) else ""


def _frame(x: Scale, y: Scale, write: Callable[[float], str]) -> list[str]:
    """Axes, ticks and their numbers."""
    shapes = []
    for tick in y.ticks(4):
        if text := write(tick):
            at = f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
            shapes.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" {at}/>')
            shapes.append(f'<text class="y" x="{_LEFT - 4}" y="{y(tick) + 3.5:.1f}">{text}</text>')
    for tick in x.ticks(5):
        shapes.append(
            f'<text class="x" x="{x(tick):.1f}" y="{_HEIGHT - 6}">{round(tick, 9):g}</text>'
        )
    return shapes
