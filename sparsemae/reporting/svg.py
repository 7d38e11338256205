"""Scales and frames of charts as SVG text: sharp at any width, a few KB each."""

import html
import math
from collections.abc import Sequence

import numpy as np


class Scale:
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


def widened(low: float, high: float) -> tuple[float, float]:
    """Room around values that are all but equal: less than a thousandth says nothing."""
    least = 0.05 * max(abs(low), abs(high), 1e-9)
    if high - low < least:
        middle = (low + high) / 2
        return middle - least, middle + least
    return low, high


def points(x: Scale, y: Scale, xs: np.ndarray, ys: np.ndarray) -> str:
    """Places of a polyline."""
    places = zip(xs.tolist(), ys.tolist(), strict=True)
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in places)


def svg(label: str, shapes: Sequence[str], size: tuple[int, int]) -> str:
    """The whole chart, named for those who do not see it."""
    return (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{html.escape(label)}">'
        f"{''.join(shapes)}</svg>"
    )
