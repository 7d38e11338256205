"""Pictures of a comparison: the critical-difference diagram, and differences with intervals."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sparsemae.comparison.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, LINE, BLUE = "#1c2733", "#5d6b7a", "#dfe4ea", "#2f6db3"  # as the page's
COLOURS = (BLUE, "#b3372f", "#2c7a4b", "#9a6700", "#7a4fa3", "#1f8a8a", "#8a5a44", "#5d6b7a")
MARKS = "osD^vP*X"
_LETTERS = 22  # of a name in a picture
_WIDTH, _SIDE, _ROW = 9.0, 2.9, 0.28  # inches: of all, for names on one side, of a line
_OVER = 0.07  # inches that a bar goes beyond its first and last method
_DPI = 130


def rank_diagram(
    methods: Sequence[str], ranks: Sequence[float], groups: Sequence[Sequence[int]], title: str
) -> "Figure":
    """Mean ranks on an axis, best left; a bar joins methods that do not differ significantly.

    Every method of a bar has a dot on it: a bar may pass over a method that is not one of them.
    """
    from matplotlib.figure import Figure  # no pyplot: no display, no global state

    count = len(methods)

    def x(rank: float) -> float:
        return _SIDE + (rank - 1) / max(count - 1, 1) * (_WIDTH - 2 * _SIDE)

    order = sorted(range(count), key=lambda i: ranks[i])
    left = order[: (count + 1) // 2]  # named on the left, the best on top; the others on the right
    rows = {method: row for row, method in enumerate(left)}
    rows |= {method: row for row, method in enumerate(reversed(order[len(left) :]))}
    bars = _levels([sorted(x(ranks[i]) for i in group) for group in groups])
    top, names = 0.85, 0.75 * _ROW * (1 + max((level for level, _ in bars), default=-1)) + 0.3
    height = top + names + _ROW * len(left) + 0.05
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(-height, 0)  # inches from the top
    axes.axis("off")

    def word(at: float, down: float, text: str, **options) -> None:
        axes.text(at, -down, text, parse_math=False, **{"color": INK, "fontsize": 10} | options)

    word(_WIDTH / 2, 0.2, title, ha="center", va="center", fontsize=11)
    axes.plot([x(1), x(count)], [-top, -top], color=INK, lw=1.2, solid_capstyle="butt")
    for rank in range(1, count + 1):
        axes.plot([x(rank)] * 2, [-top, -top + 0.1], color=INK, lw=1.2)
        word(x(rank), top - 0.2, str(rank), ha="center", va="center", color=SOFT)
    for level, places in bars:
        down = top + 0.22 + 0.75 * _ROW * level
        ends = [places[0] - _OVER, places[-1] + _OVER]
        axes.plot(ends, [-down] * 2, color=BLUE, lw=4, alpha=0.55, solid_capstyle="butt")
        axes.plot(places, [-down] * len(places), "o", color=BLUE, ms=5.5, mec="white", zorder=4)
    for method in order:
        down = top + names + _ROW * (rows[method] + 0.4)
        on_left = method in left
        edge = _SIDE - 0.25 if on_left else _WIDTH - _SIDE + 0.25
        place = x(ranks[method])
        axes.plot([place, place, edge], [-top, -down, -down], color=SOFT, lw=0.9, zorder=1)
        label = f"{short(methods[method])}  {ranks[method]:.2f}"
        side = "right" if on_left else "left"
        word(edge + (-0.08 if on_left else 0.08), down, label, ha=side, va="center")
    return figure


def difference_plot(
    methods: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Estimate]]],
    baseline: str,
) -> "Figure":
    """Differences of Dice to the baseline in points, with their intervals, a data set to a row.

    Args:
        methods: All but the baseline.
        rows: A name, and an estimate for each of the methods.
    """
    from matplotlib.figure import Figure

    space = 0.16 * len(methods) + 0.2
    figure = Figure(
        figsize=(_WIDTH, space * len(rows) + 1.0 + 0.2 * -(-len(methods) // 4)),
        layout="constrained",
    )
    axes = figure.add_subplot()
    axes.axvline(0, color=SOFT, lw=1)
    for k, method in enumerate(methods):
        places = [row * space + 0.16 * (k - (len(methods) - 1) / 2) for row in range(len(rows))]
        found = [estimates[k] for _, estimates in rows]
        style = {"color": COLOURS[k % len(COLOURS)], "lw": 1.6}
        axes.hlines(places, [100 * e.low for e in found], [100 * e.high for e in found], **style)
        values, mark = [100 * e.value for e in found], MARKS[k % len(MARKS)]
        axes.plot(values, places, mark, color=style["color"], ms=5, label=short(method))
    axes.set_yticks(
        [row * space for row in range(len(rows))], [short(name) for name, _ in rows], color=INK
    )
    axes.set_ylim((len(rows) - 0.5) * space, -0.5 * space)
    axes.set_xlabel(f"Dice minus that of {short(baseline)}, points", color=INK)
    axes.grid(axis="x", color=LINE)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for row in range(1, len(rows)):
        axes.axhline((row - 0.5) * space, color=LINE, lw=0.8)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, labelcolor=INK)
    return figure


def drawn(figure: "Figure", kind: str) -> bytes:
    """A picture as the bytes of a PNG or SVG file; the same for the same figure."""
    from matplotlib import rc_context

    file = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "sparsemae"}):
        figure.savefig(file, format=kind, dpi=_DPI, metadata=metadata)
    return file.getvalue()


def embedded(svg: bytes, label: str) -> str:
    """An SVG file as an image of a page; the label is HTML-safe."""
    data = base64.b64encode(svg).decode()
    return f'<img class="plot" alt="{label}" src="data:image/svg+xml;base64,{data}">'


def short(name: str) -> str:
    """What has room in a picture."""
    if len(name) <= _LETTERS:
        return name
    return f"{name[: _LETTERS // 2]}…{name[-_LETTERS // 2 + 1 :]}"


def _levels(bars: Sequence[Sequence[float]]) -> list[tuple[int, Sequence[float]]]:
    """Bars, as sorted places in inches, with the row each has room in, from above."""
    ends, out = [], []  # of the last bar of every row
    for places in sorted(bars, key=lambda places: (places[0], -places[-1])):
        level = next((i for i, end in enumerate(ends) if end < places[0] - 3 * _OVER), len(ends))
        ends[level : level + 1] = [places[-1]]
        out.append((level, places))
    return out
