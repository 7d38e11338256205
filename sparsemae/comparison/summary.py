"""What a comparison found, as data: `summary.json`, `summary.csv` and tables for a terminal."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparsemae.comparison.scores import Collected, DatasetScores
from sparsemae.comparison.statistics import (
    ALPHA,
    LEVEL,
    RESAMPLES,
    BlockStatistics,
    Estimate,
    Pair,
    analyse,
)
from sparsemae.comparison.suite import ROLES

COLUMNS = (
    *("block", "dataset", "method", "cases", "folds", "seeds", "dice", "dice_low", "dice_high"),
    *("difference", "difference_low", "difference_high", "rank", "rank_low", "rank_high"),
)
MEAN = "mean of data sets"  # in the column of data sets


@dataclass(frozen=True)
class Block:
    """Data sets of one role, and what was found on them."""

    role: str
    methods: tuple[str, ...]  # the first is the baseline
    datasets: tuple[DatasetScores, ...]
    statistics: BlockStatistics

    @property
    def cases(self) -> int:
        return sum(len(d.cases) for d in self.datasets)

    @property
    def seeds(self) -> int:
        """The fewest of any data set."""
        return min(len(set(d.seeds)) for d in self.datasets)


def blocks(collected: Collected) -> list[Block]:
    """Analyse development and test sets, apart; a role without data sets is left out."""
    out = []
    for role in ROLES:
        datasets = tuple(d for d in collected.datasets if d.role == role)
        if datasets:
            out.append(Block(role, collected.methods, datasets, analyse(datasets)))
    return out


def as_data(name: str, found: Sequence[Block], collected: Collected) -> dict[str, Any]:
    """The content of `summary.json`; Dice from 0 to 1."""
    return {
        "suite": name,
        "methods": list(collected.methods),
        "baseline": next(iter(collected.methods), None),
        "interval": LEVEL,
        "resamples": RESAMPLES,
        "alpha": ALPHA,
        "missing": list(collected.missing),
        "blocks": {block.role: _block(block) for block in found},
    }


def as_csv(found: Sequence[Block]) -> str:
    """A row per block, data set and method, and one for the mean over data sets."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for block in found:
        numbers = block.statistics
        for i, dataset in enumerate(block.datasets):
            facts = (len(dataset.cases), len(_folds(dataset)), len(set(dataset.seeds)))
            for m, method in enumerate(block.methods):
                rank = (f"{numbers.dataset_ranks[i, m]:g}", "", "")
                values = (*_three(numbers.dice[i][m]), *_three(numbers.dataset_differences[i][m]))
                writer.writerow((block.role, dataset.name, method, *facts, *values, *rank))
        for m, method in enumerate(block.methods):
            three = (numbers.mean_dice[m], numbers.differences[m], numbers.mean_rank[m])
            values = [number for estimate in three for number in _three(estimate)]
            writer.writerow((block.role, MEAN, method, block.cases, "", "", *values))
    return file.getvalue()


def tables(block: Block) -> Iterator[Table]:
    """Methods over all data sets of a block, then data set by data set; Dice in percent."""
    over = Table(title=title(block), title_justify="left")
    over.add_column("method")
    for heading in ("mean Dice, %", "mean rank", f"minus {block.methods[0]}"):
        over.add_column(heading, justify="right")
    for row in method_rows(block):
        over.add_row(*row)
    yield over
    each = Table(title=f"{block.role}: mean Dice, %", title_justify="left")
    each.add_column("data set")
    each.add_column("cases", justify="right")
    for method in block.methods:
        each.add_column(method, justify="right")
    for i, dataset in enumerate(block.datasets):
        values = [f"{100 * estimate.value:.2f}" for estimate in block.statistics.dice[i]]
        each.add_row(dataset.name, str(len(dataset.cases)), *values)
    yield each


def method_rows(block: Block) -> list[tuple[str, str, str, str]]:
    """Name, mean Dice, mean rank and difference to the first of every method, the best first."""
    numbers = block.statistics
    return [
        (
            block.methods[m],
            percent(numbers.mean_dice[m]),
            ranked(numbers.mean_rank[m]),
            percent(numbers.differences[m], sign=True) if m else "",
        )
        for m in order(block)
    ]


def title(block: Block) -> str:
    """Of a block's tables and pictures."""
    sets = f"{len(block.datasets)} {block.role} set{'s' * (len(block.datasets) != 1)}"
    return f"{sets}, {block.cases} case{'s' * (block.cases != 1)}"


def order(block: Block) -> list[int]:
    """Methods from the best mean rank on; of equal ones, from the best mean Dice."""
    ranks, dice = block.statistics.mean_rank, block.statistics.mean_dice
    return sorted(range(len(block.methods)), key=lambda m: (ranks[m].value, -dice[m].value))


def percent(estimate: Estimate, *, sign: bool = False) -> str:
    """In percent, with its interval."""
    kind = "+.2f" if sign else ".2f"
    value, low, high = (f"{100 * n:{kind}}" for n in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def ranked(estimate: Estimate) -> str:
    """A mean rank with its interval."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _block(block: Block) -> dict[str, Any]:
    numbers, names = block.statistics, block.methods
    return {
        "cases": block.cases,
        "methods": {
            name: {
                "dice": asdict(numbers.mean_dice[m]),
                "difference": asdict(numbers.differences[m]),
                "rank": asdict(numbers.mean_rank[m]),
            }
            for m, name in enumerate(names)
        },
        "pairs": _pairs(numbers.pairs, names),
        "groups": [[names[m] for m in group] for group in numbers.groups],
        "datasets": {
            dataset.name: {
                "cases": len(dataset.cases),
                "folds": _folds(dataset),
                "seeds": sorted({seed for _, seed in dataset.runs}),
                "methods": {
                    name: {
                        "dice": asdict(numbers.dice[i][m]),
                        "difference": asdict(numbers.dataset_differences[i][m]),
                        "rank": float(numbers.dataset_ranks[i, m]),
                    }
                    for m, name in enumerate(names)
                },
                "pairs": _pairs(numbers.dataset_pairs[i], names),
            }
            for i, dataset in enumerate(block.datasets)
        },
    }


def _pairs(pairs: Sequence[Pair], names: Sequence[str]) -> list[dict[str, Any]]:
    return [asdict(p) | {"first": names[p.first], "second": names[p.second]} for p in pairs]


def _folds(dataset: DatasetScores) -> list[int]:
    return sorted({fold for fold, _ in dataset.runs})


def _three(estimate: Estimate) -> tuple[str, ...]:
    return tuple(f"{n:.6f}" for n in (estimate.value, estimate.low, estimate.high))
