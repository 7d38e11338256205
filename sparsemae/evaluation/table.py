"""What a person sees of an evaluation: a row per class."""

import math

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from sparsemae.evaluation.summary import Spread, Summary


def class_table(summary: Summary) -> Table:
    """Mean and standard deviation over the cases that have a class, and in how many it was missed.

    It fits in 80 columns. A tolerance that all classes have in common is in the heading.
    """
    statistics, means = summary.class_statistics(), summary.means()
    limits = {known.tolerance_mm for known in summary.classes}
    alike = len(limits) == 1
    counts = [n for n in ("missed", "spurious") if any(getattr(s, n) for s in statistics)]
    caption = "mean ± standard deviation" + ("" if alike else "; NSD within the mm in brackets")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption=caption)
    table.add_column("class", overflow="fold", min_width=8)
    nsd = f"NSD, {min(limits):g} mm" if alike else "NSD"
    for heading in ("Dice", nsd, "HD95, mm", "cases", *counts):
        table.add_column(heading, justify="right", no_wrap=True)
    for known, found in zip(summary.classes, statistics, strict=True):
        table.add_row(
            Text(known.name if alike else f"{known.name} ({known.tolerance_mm:g})"),
            _spread(found.dice, 3),
            _spread(found.nsd, 3),
            _spread(found.hd95, 1),
            f"{found.scored}/{len(summary.cases)}",
            *(str(getattr(found, name)) for name in counts),
        )
    table.add_section()
    table.add_row("mean", _number(means.dice, 3), _number(means.nsd, 3), _number(means.hd95, 1))
    return table


def _spread(spread: Spread, digits: int) -> str:
    around = "" if math.isnan(spread.std) else f" ± {_number(spread.std, digits)}"
    return f"{_number(spread.mean, digits)}{around}"


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
