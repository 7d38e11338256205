"""What an evaluation found: scores of cases, statistics of classes, and the files that keep them.

The scores decide: statistics are computed from them whenever they are asked for, and stand in the
files for people and other programs.
"""

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ValidationError

from sparsemae.config import Strict
from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.evaluation.metrics import Measure, Measured, Score
from sparsemae.files import TEMPORARY, write_atomically

METRICS = ("dice", "nsd", "hd95")
RECORD, TABLE = "metrics.json", "metrics.csv"
_OURS = re.compile(rf"(metrics\.(json|csv))(\.[0-9a-f]+{re.escape(TEMPORARY)})?")
_DEFINITIONS = {
    "dice": "twice the voxels in both / the voxels of each",
    "nsd": "share of both surfaces, in mm2, within tolerance_mm of the other; surface elements "
    "and distances as in DeepMind's surface-distance",
    "hd95": "mm; larger of the two directed 95th percentiles of distances between the centres of "
    "surface voxels",
    "absent": "in neither map: null, left out of statistics; in one of them: 0, 0, and the "
    "diagonal of the volume",
}


class ScoredClass(Strict):
    """A class and what it was scored with."""

    label: int
    name: str
    tolerance_mm: float


class CaseScores(Strict):
    """A case and the scores of all classes, in their order."""

    case: str
    scores: tuple[Score, ...]


class Spread(Measured):
    """Of the values that are not NaN; all NaN if there are none."""

    mean: Measure
    median: Measure
    std: Measure  # of a sample, NaN for a single value


class ClassStatistics(Measured):
    """One class over all cases; `scored` of them have it in the reference or the prediction."""

    label: int
    name: str
    scored: int
    absent: int  # in neither; they are left out
    missed: int  # in the reference only
    spurious: int  # in the prediction only
    dice: Spread
    nsd: Spread
    hd95: Spread


class Means(Measured):
    """Means over the classes of their means over the cases."""

    dice: Measure
    nsd: Measure
    hd95: Measure


class Summary(Strict):
    """An evaluation: the scores of every case, in the order of their names."""

    classes: tuple[ScoredClass, ...]
    ignore: int | None  # the number of reference voxels that were left out
    cases: tuple[CaseScores, ...]

    def case_means(self, metric: str = "dice") -> dict[str, float]:
        """The mean over the classes of each case; NaN for a case that has none of them.

        Args:
            metric: dice, nsd or hd95.
        """
        return {c.case: _mean(getattr(score, metric) for score in c.scores) for c in self.cases}

    def class_statistics(self) -> tuple[ClassStatistics, ...]:
        """Over the cases, in the order of the classes."""
        columns = zip(*(case.scores for case in self.cases), strict=True)
        return tuple(
            _statistics(known, column) for known, column in zip(self.classes, columns, strict=True)
        )

    def means(self) -> Means:
        """One number per metric; a class that no case has counts for nothing."""
        statistics = self.class_statistics()
        return Means(**{name: _mean(getattr(s, name).mean for s in statistics) for name in METRICS})


class _Record(Strict):
    """The content of metrics.json."""

    format: Literal["sparsemae evaluation 1"]
    definitions: dict[str, str]
    mean: Means
    per_class: tuple[ClassStatistics, ...]
    classes: tuple[ScoredClass, ...]
    ignore: int | None
    cases: dict[str, dict[str, Score]]  # by case and label


def read_summary(path: Path) -> Summary:
    """Read the record of an evaluation, given its folder or its `metrics.json`.

    Raises:
        UserError: There is none, or it is not one.
    """
    file = path / RECORD if path.is_dir() else path
    try:
        record = _Record.model_validate_json(file.read_bytes())
    except OSError as error:
        raise UserError(
            one_line(f"{file}: {error.strerror}; sparsemae evaluate -o writes it")
        ) from None
    except ValidationError:
        record = None
    labels = [str(known.label) for known in record.classes] if record else []
    if record is None or not all(list(scores) == labels for scores in record.cases.values()):
        raise UserError(one_line(f"{file}: no record of sparsemae evaluate; run that"))
    cases = (
        CaseScores(case=case, scores=tuple(scores.values()))
        for case, scores in record.cases.items()
    )
    return Summary(classes=record.classes, ignore=record.ignore, cases=tuple(cases))


def write_summary(summary: Summary, folder: Path) -> None:
    """Write `metrics.json` and `metrics.csv`: whatever happens, a table is that of its record."""
    record = _Record(
        format="sparsemae evaluation 1",
        definitions=_DEFINITIONS,
        mean=summary.means(),
        per_class=summary.class_statistics(),
        classes=summary.classes,
        ignore=summary.ignore,
        cases={c.case: {str(s.label): s for s in c.scores} for c in summary.cases},
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name in os.listdir(folder):
        if _OURS.fullmatch(name) and name != RECORD:
            (folder / name).unlink(missing_ok=True)
    write_atomically(folder / RECORD, f"{record.model_dump_json(indent=1)}\n".encode())
    write_atomically(folder / TABLE, _table(summary).encode())


def check_output(folder: Path) -> None:
    """`UserError` unless `folder` is missing, empty, or holds an earlier evaluation alone."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir():
        raise UserError(one_line(f"{folder} is a file: choose another -o"))
    names = os.listdir(folder)
    if foreign := sorted(name for name in names if not _OURS.fullmatch(name)):
        raise UserError(
            one_line(f"{folder} holds {foreign[0]}, not from an evaluation: choose another -o")
        )
    if {RECORD, TABLE} & set(names):
        try:
            read_summary(folder)
        except UserError:
            raise UserError(
                one_line(f"{folder} holds no evaluation of sparsemae: choose another -o")
            ) from None


def _table(summary: Summary) -> str:
    """A row per case and class; a cell is empty where there is nothing to measure."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = [name for name in Score.model_fields if name != "label"]
    writer.writerow(["case", "label", "class", *measured])
    for case in summary.cases:
        for known, score in zip(summary.classes, case.scores, strict=True):
            values = (getattr(score, name) for name in measured)
            cells = ("" if math.isnan(value) else f"{value:.6g}" for value in values)
            writer.writerow([case.case, known.label, known.name, *cells])
    return text.getvalue()


def _statistics(known: ScoredClass, scores: tuple[Score, ...]) -> ClassStatistics:
    present = [(score.prediction_ml > 0, score.reference_ml > 0) for score in scores]
    return ClassStatistics(
        label=known.label,
        name=known.name,
        scored=sum(map(any, present)),
        absent=present.count((False, False)),
        missed=present.count((False, True)),
        spurious=present.count((True, False)),
        **{metric: _spread(getattr(score, metric) for score in scores) for metric in METRICS},
    )


def _spread(values: Iterable[float]) -> Spread:
    there = list(_there(values))
    return Spread(
        mean=_mean(there),
        median=float(np.median(there)) if there else math.nan,
        std=float(np.std(there, ddof=1)) if len(there) > 1 else math.nan,
    )


def _mean(values: Iterable[float]) -> float:
    there = list(_there(values))
    return math.fsum(there) / len(there) if there else math.nan


def _there(values: Iterable[float]) -> Iterator[float]:
    return (value for value in values if not math.isnan(value))
