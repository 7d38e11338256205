"""OUT/report.html: a comparison to look at, in one file that needs nothing else."""

import time
from collections.abc import Iterator, Sequence

from sparsemae.comparison.plots import difference_plot, drawn, embedded
from sparsemae.comparison.scores import Collected
from sparsemae.comparison.statistics import ALPHA, LEVEL, RESAMPLES
from sparsemae.comparison.suite import Suite
from sparsemae.comparison.summary import Block, method_rows, title
from sparsemae.reporting.page import listing, page, settings, text, tile

_STYLE = """
.wide { max-width: 1000px } td.n, th.n { white-space: nowrap; padding: 6px 0 6px 18px }
img.plot { display: block; width: 100%; max-width: 900px; height: auto; margin: 14px 0 }
h3 { font-size: 15px; margin: 24px 0 6px }
"""
_SHARE = f"{LEVEL:.0%}".replace("%", " %")


def draw_page(
    suite: Suite,
    jobs: dict[str, int],
    found: Sequence[Block],
    collected: Collected,
    diagrams: dict[str, bytes],
) -> str:
    """The whole page.

    Args:
        jobs: How many are in which state.
        diagrams: The rank diagram of every block as SVG, by its role.
    """
    name = suite.options.name
    parts = [
        f"<h1>{text(name)}</h1>",
        f'<div class="soft">sparsemae comparison · page written '
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}</div>",
        _tiles(suite, jobs),
        f"<h2>Missing</h2>{listing(collected.missing)}" if collected.missing else "",
        *(part for block in found for part in _block(block, diagrams[block.role])),
        _explanation(found),
        f"<h2>Suite</h2>{settings(_settings(suite))}",
    ]
    return page(f"{name}: comparison", parts, style=_STYLE)


def _tiles(suite: Suite, jobs: dict[str, int]) -> str:
    total, finished = sum(jobs.values()), jobs.get("finished", 0)
    tiles = [
        tile(len(suite.methods), "methods"),
        tile(len(suite.datasets), "data sets"),
        tile(f"{finished} / {total}", "jobs finished", "odd" if finished < total else ""),
    ]
    if failed := jobs.get("failed", 0):
        tiles.append(tile(failed, "jobs failed", "bad"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _block(block: Block, diagram: bytes) -> Iterator[str]:
    names, numbers = block.methods, block.statistics
    what = "Development sets" if block.role == "development" else "Test sets"
    yield f'<h2>{what}</h2><p class="soft">{title(block)}</p>'
    heads = ("mean Dice, %", "mean rank", f"Dice minus {names[0]}")
    yield _table(("method", *heads), method_rows(block))
    yield embedded(diagram, f"mean ranks on {block.role} sets")
    yield "<h3>Data set by data set: mean Dice, %, and rank</h3>"
    rows = []
    for i, dataset in enumerate(block.datasets):
        ranks = numbers.dataset_ranks[i]
        cells = [
            f"{100 * e.value:.2f} ({rank:g})"
            for e, rank in zip(numbers.dice[i], ranks, strict=True)
        ]
        rows.append((dataset.name, str(len(dataset.cases)), *cells))
    yield _table(("data set", "cases", *names), rows)
    differences = [
        (dataset.name, estimates[1:])
        for dataset, estimates in zip(block.datasets, numbers.dataset_differences, strict=True)
    ]
    if len(names) > 1:
        differences.append(("mean of data sets", numbers.differences[1:]))
        figure = difference_plot(names[1:], differences, names[0])
        yield embedded(drawn(figure, "svg"), f"differences on {block.role} sets")
        yield "<h3>Every two methods, over the cases of all data sets</h3>"
        rows = [
            (
                f"{names[p.second]} minus {names[p.first]}",
                f"{100 * p.difference:+.2f}",
                _probability(p.p),
                _probability(p.adjusted),
                "yes" if p.adjusted < ALPHA else "no",
            )
            for p in numbers.pairs
        ]
        yield _table(("", "Dice, points", "p", "p, Holm", f"below {ALPHA:g}"), rows)


def _explanation(found: Sequence[Block]) -> str:
    if not found:
        return ""
    lines = [
        "Dice of a case: mean over its classes; 1 if neither map has any. Of a method: mean over "
        "folds, seeds and cases. Over data sets: their mean, each counts the same.",
        "Rank: 1 is the best mean Dice on a data set; equal ones share. Mean over data sets.",
        f"Brackets: {_SHARE} percentile intervals of {RESAMPLES} bootstrap samples of cases within "
        "data sets and of seeds; data sets themselves are not resampled.",
        "p: Wilcoxon's signed-rank test of paired cases, means over seeds; Holm: adjusted for all "
        "pairs of a block. Large data sets weigh more in it. In the diagram a bar joins, by dots, "
        "methods of which no two differ significantly.",
    ]
    if min(block.seeds for block in found) < 2:
        lines.append("One seed: intervals do not know how much a result depends on it.")
    return f"<h2>How to read it</h2>{''.join(f'<p class=soft>{line}</p>' for line in lines)}"


def _settings(suite: Suite) -> Iterator[tuple[str, object]]:
    yield from (("folds", list(suite.options.folds)), ("seeds", list(suite.options.seeds)))
    for kind, entries in (("data set", suite.datasets), ("method", suite.methods)):
        for entry in entries:
            values = entry.model_dump(mode="json", exclude={"name"})
            yield f"{kind} {entry.name}", {k: v for k, v in values.items() if v not in (None, [])}


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Numbers right, but for the first column."""
    top = "".join(f"<th{' class=n' if i else ''}>{text(h)}</th>" for i, h in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(f'<td{_right(i)}>{text(cell)}</td>' for i, cell in enumerate(row))}</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def _right(column: int) -> str:
    return ' class="n"' if column else ""


def _probability(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
