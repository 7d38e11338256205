"""Charts as SVG text for a page that stands alone: sharp at any width, a few KB each."""

import html
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

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
    low, high = _widened(low, high)
    counts, edges = np.histogram(values.clip(low, high), bins=_BARS, range=(low, high))
    x, y = _Scale(low, high, _LEFT, _WIDTH - _RIGHT), _vertical(counts.max())
    shapes = [
        f'<rect class="bar" x="{x(a) + 0.5:.1f}" y="{y(n):.1f}" width="{x(b) - x(a) - 1:.1f}" '
        f'height="{y(0) - y(n):.1f}"><title>{n} from {a:.4g} to {b:.4g}</title></rect>'
        for n, a, b in zip(counts.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True)
        if n
    ]
    if beyond:
        more = f"{beyond} larger, up to {values.max():.4g}"
        shapes.append(f'<text class="note" x="{_WIDTH - _RIGHT}" y="16">{more}</text>')
    return _svg(label, [*_frame(x, y, _count), *shapes])


def lines(edges: Float[np.ndarray, "bins+1"], rows: Sequence[np.ndarray], label: str) -> str:
    """One thin line per row of shares, and their mean. Its scale is that of the inner bins: what
    the end bins gather from beyond may run out of the chart."""
    rows = np.asarray(rows)
    centres = (edges[:-1] + edges[1:]) / 2
    top = float(rows[:, 1:-1].max()) or float(rows.max())
    x, y = _Scale(edges[0], edges[-1], _LEFT, _WIDTH - _RIGHT), _vertical(top)
    shapes = [
        f'<polyline class="{name}" points="{_points(x, y, centres, row.clip(0, top))}"/>'
        for name, row in [*(("one", row) for row in rows), ("mean", rows.mean(0))]
    ]
    return _svg(label, [*_frame(x, y, lambda share: f"{100 * share:.3g} %"), *shapes])


class _Scale:
    """Numbers to places."""

    def __init__(self, low: float, high: float, start: float, stop: float):
        self.low, self.high, self.start, self.stop = float(low), float(high), start, stop

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside, about `count`."""
        rough = (self.high - self.low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * n for n in (1, 2, 5, 10) if size * n >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def _vertical(top: float) -> _Scale:
    return _Scale(0, top or 1, _HEIGHT - _BOTTOM, _TOP)


def _span(values: np.ndarray) -> tuple[float, float]:
    return float(values.min()), float(values.max())


def _widened(low: float, high: float) -> tuple[float, float]:
    """Room around values that are all but equal: bars narrower than a thousandth say nothing."""
    least = 0.05 * max(abs(low), abs(high), 1e-9)
    if high - low < least:
        middle = (low + high) / 2
        return middle - least, middle + least
    return low, high


def _count(tick: float) -> str:
    """There is no half volume, nor a line for it."""
    return f"{tick:.0f}" if tick == int(tick) else ""


def _frame(x: _Scale, y: _Scale, write: Callable[[float], str]) -> list[str]:
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


def _points(x: _Scale, y: _Scale, xs: np.ndarray, ys: np.ndarray) -> str:
    places = zip(xs.tolist(), ys.tolist(), strict=True)
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in places)


def _svg(label: str, shapes: Sequence[str]) -> str:
    name = html.escape(label)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{name}">'
        f"{''.join(shapes)}</svg>"
    )
