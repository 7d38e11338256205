"""Pictures of the kernel benchmark's rows: time per layer, and speed against the mask ratio."""

from collections import defaultdict
from pathlib import Path

from sparsemae.bench.cases import OPERATORS

COLORS = {"reference": "#8c8c8c", "torch": "#2f6db3", "triton": "#d2572b", "spconv": "#5b8c3a"}
PANEL = (3.4, 2.9)  # inches
DPI = 150
Row = dict[str, object]


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Write the pictures; one of times per block, batch and ratio, one of speed per block, batch.

    Rows without a time, of totals and of ceilings are passed over. The dense reference is the
    better of its two layouts.
    """
    timed = _better([r for r in rows if r.get("operator") and r["ms"] is not None])
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    by_setting: dict[tuple, list[Row]] = defaultdict(list)
    by_input: dict[tuple, list[Row]] = defaultdict(list)
    for row in timed:
        by_setting[row["block"], row["batch"], row["mask_ratio"]].append(row)
        by_input[row["block"], row["batch"]].append(row)
    for (block, batch, ratio), group in by_setting.items():
        path = folder / f"time-block{block}-batch{batch}-hidden{ratio * 100:.0f}.png"
        title = f"cells of {block}$^3$, batch {batch}, {ratio:.0%} hidden"
        written.append(_times(group, title, path))
    for (block, batch), group in by_input.items():
        if len({row["mask_ratio"] for row in group}) > 1:
            path = folder / f"speed-block{block}-batch{batch}.png"
            written.append(_speeds(group, f"cells of {block}$^3$, batch {batch}", path))
    return written


def _better(rows: list[Row]) -> list[Row]:
    """The fastest row of each case and backend."""
    best: dict[tuple, Row] = {}
    for row in rows:
        key = row["case"], row["backend"]
        if key not in best or row["ms"] < best[key]["ms"]:
            best[key] = row
    return list(best.values())


def _panels(rows: list[Row], title: str, layers: int):
    """A figure with one panel per operator that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operators = [op for op in OPERATORS if any(row["operator"] == op for row in rows)]
    across = min(3, len(operators))
    down = -(-len(operators) // across)
    width = max(PANEL[0], 0.34 * layers + 1)
    figure, axes = pyplot.subplots(
        down, across, figsize=(width * across, PANEL[1] * down + 0.7), squeeze=False
    )
    figure.suptitle(f"{rows[0]['patch']}$^3$, {title}, {rows[0]['dtype']}\n{rows[0]['device']}")
    for axis in axes.flat[len(operators) :]:
        axis.set_visible(False)
    return figure, dict(zip(operators, axes.flat, strict=False))


def _times(rows: list[Row], title: str, path: Path) -> Path:
    """Bars per layer and backend on a logarithmic axis."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure, axes = _panels(rows, title, len(layers))
    backends = [b for b in COLORS if any(row["backend"] == b for row in rows)]
    for operator, axis in axes.items():
        times = {(r["layer"], r["backend"]): r for r in rows if r["operator"] == operator}
        here = [layer for layer in layers if any(key[0] == layer for key in times)]
        width = 0.8 / len(backends)
        for i, backend in enumerate(backends):
            bars = [(x, times[layer, backend]) for x, layer in enumerate(here)
                    if (layer, backend) in times]  # fmt: skip
            places = [x + (i - (len(backends) - 1) / 2) * width for x, _ in bars]
            axis.bar(places, [r["ms"] for _, r in bars], width, color=COLORS[backend])
        axis.set_yscale("log")
        axis.set_xticks(range(len(here)), here, rotation=60, ha="right", rotation_mode="anchor")
        _dress(axis, operator, "ms")
    return _save(figure, backends, path)


def _speeds(rows: list[Row], title: str, path: Path) -> Path:
    """Lines per stage and backend: how much faster than the dense reference."""
    rows = [row for row in rows if row["ratio"] is not None and row["backend"] != "reference"]
    rows = [row for row in rows if row["layer"].startswith("stage")]
    figure, axes = _panels(rows, title, 0)
    backends = [b for b in COLORS if any(row["backend"] == b for row in rows)]
    styles = dict(zip(dict.fromkeys(row["layer"] for row in rows), "osD^vX", strict=False))
    for operator, axis in axes.items():
        lines = defaultdict(list)
        for row in rows:
            if row["operator"] == operator:
                lines[row["layer"], row["backend"]].append((100 * row["mask_ratio"], row["ratio"]))
        for (layer, backend), points in lines.items():
            xs, ys = zip(*sorted(points), strict=True)
            axis.plot(xs, ys, marker=styles[layer], ms=4, lw=1.2, color=COLORS[backend])
        axis.axhline(1, color="black", lw=0.8)
        axis.set_yscale("log")
        axis.set_xticks(sorted({100 * row["mask_ratio"] for row in rows}))
        axis.set_xlabel("% hidden")
        _dress(axis, operator, "times dense")
    return _save(figure, backends, path, styles)


def _dress(axis, title: str, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_title(title, fontsize=10)
    axis.set_ylabel(unit)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure, backends: list[str], path: Path, styles: dict[str, str] | None = None) -> Path:
    from matplotlib import pyplot
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[b], label=b) for b in backends]
    for layer, marker in (styles or {}).items():
        handles.append(Line2D([], [], color="#444444", marker=marker, ms=4, lw=1.2, label=layer))
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path
