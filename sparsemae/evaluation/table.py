"""What a person sees of an evaluation: a row per class."""

import math

from rich.table import Table
from rich.text import Text

from sparsemae.evaluation.summary import Means, Spread, Summary


def class_table(summary: Summary) -> Table:
    """Mean and standard deviation over the cases, how many they are, and what was missed.

    Columns that would hold nothing but 0 are left out.
    """
    limits = sorted({known.tolerance_mm for known in summary.classes})
    statistics = summary.class_statistics()
    counts = [
        name
        for name in ("missed", "spurious", "absent")
        if any(getattr(s, name) for s in statistics)
    ]
    table = Table(caption=f"mean ± standard deviation over {len(summary.cases)} cases")
    table.add_column("class", overflow="fold")
    within = f"{limits[0]:g} mm" if len(limits) == 1 else "at mm"
    for heading in ("Dice", f"NSD {within}", "HD95 mm", "cases", *counts):
        table.add_column(heading, justify="right")
    for known, found in zip(summary.classes, statistics, strict=True):
        at = f" at {known.tolerance_mm:g}" if len(limits) > 1 else ""
        table.add_row(
            Text(known.name),
            _spread(found.dice, 3),
            _spread(found.nsd, 3) + at,
            _spread(found.hd95_mm, 2),
            *(str(getattr(found, name)) for name in ("scored", *counts)),
        )
    table.add_section()
    table.add_row("mean", *_means(summary.means()), "", *("" for _ in counts))
    return table


def _spread(spread: Spread, digits: int) -> str:
    if math.isnan(spread.mean):
        return "-"
    around = "" if math.isnan(spread.std) else f" ± {spread.std:.{digits}f}"
    return f"{spread.mean:.{digits}f}{around}"


def _means(means: Means) -> list[str]:
    pairs = ((means.dice, 3), (means.nsd, 3), (means.hd95_mm, 2))
    return ["-" if math.isnan(value) else f"{value:.{digits}f}" for value, digits in pairs]
