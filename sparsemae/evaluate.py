"""`sparsemae evaluate`: label maps scored against references, case by case and class by class."""

import math
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from sparsemae.data.codes import one_line
from sparsemae.data.finding.nnunet import DESCRIPTION
from sparsemae.data.making.workers import Lost, processes, run_jobs
from sparsemae.errors import UserError
from sparsemae.evaluation.cases import Job, Scored, find_pairs, score_pair
from sparsemae.evaluation.metrics import Score, score_case
from sparsemae.evaluation.summary import (
    CaseScores,
    ScoredClass,
    Summary,
    check_output,
    read_summary,
    write_summary,
)
from sparsemae.evaluation.table import class_table
from sparsemae.live import LiveLine
from sparsemae.segmentation.dataset import Classes, read_classes

__all__ = ["Score", "Summary", "evaluate", "parse_tolerance", "read_summary", "score_case"]

SHOWN = 10  # warnings on the console


def evaluate(
    pred: Path,
    ref: Path,
    output: Path,
    *,
    labels: Path | None = None,
    tolerance: float | Mapping[str, float] = 1.0,
    only_predicted: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> Summary:
    """Score the label maps of `pred` against those of `ref`, and write the result to `output`.

    Args:
        pred: A folder, or a single file.
        ref: The same; the maps of two folders are matched by their names without suffix.
        output: A new folder, or that of an earlier evaluation, which is replaced.
        labels: `dataset.json` or its folder: the classes, and the number to be ignored. Without it
            the classes are those of the references, and their names are their numbers.
        tolerance: Of NSD in mm; for all classes, or for each by its name.
        only_predicted: Leave out references without a prediction, as of cases of other folds.
        workers: Processes; 1 is this one.
        console: For progress and the table of classes; None for silence.

    Raises:
        UserError: A map has no partner, or lies elsewhere than it; an unknown class; a tolerance of
            no class; a folder `output` of something else. Nothing is written then.
    """
    console = Console(quiet=True) if console is None else console
    check_output(output)
    classes = None if labels is None else _read_classes(labels)
    limits = _by_number(tolerance, classes)
    pairs = find_pairs(pred, ref, only_predicted=only_predicted)
    jobs = [Job(pair, classes, limits) for pair in pairs]
    found = _run(jobs, workers, console)
    names = _names(found, limits) if classes is None else dict(enumerate(classes.names[1:], 1))
    summary = Summary(
        classes=tuple(
            ScoredClass(label=label, name=one_line(name), tolerance_mm=_limit(limits, label))
            for label, name in names.items()
        ),
        ignore=None if classes is None else classes.ignore,
        cases=tuple(
            CaseScores(
                case=scored.pair.case,
                scores=tuple(scored.scores.get(label) or _absent(label) for label in names),
            )
            for scored in found
        ),
    )
    write_summary(summary, output)
    console.print(class_table(summary))
    return summary


def parse_tolerance(text: str) -> float | dict[str, float]:
    """What `--tolerance` says: mm for all classes, or NAME=mm,NAME=mm.

    Raises:
        UserError: It is neither.
    """
    if "=" not in text:
        return _millimetres(text, text)
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not name.strip() or name.strip() in limits:
            raise _wrong(text)
        limits[name.strip()] = _millimetres(number, text)
    return limits


def _millimetres(number: str, text: str) -> float:
    try:
        value = float(number)
    except ValueError:
        raise _wrong(text) from None
    if not 0 <= value < math.inf:
        raise _wrong(text)
    return value


def _wrong(text: str) -> UserError:
    return UserError(
        one_line(f"--tolerance {text}: give mm, from 0, or mm for every class as NAME=1,OTHER=2")
    )


def _read_classes(labels: Path) -> Classes:
    return read_classes(labels / DESCRIPTION if labels.is_dir() else labels)


def _by_number(
    tolerance: float | Mapping[str, float], classes: Classes | None
) -> float | dict[int, float]:
    """The tolerances by the numbers of classes, which are their names where they have no others."""
    if not isinstance(tolerance, Mapping):
        return _millimetres(str(tolerance), str(tolerance))
    if classes is None:
        if wrong := [name for name in tolerance if not name.isdecimal()]:
            raise UserError(
                one_line(f"--tolerance: {wrong[0]}: give a class's number, or --labels for names")
            )
        return {int(name): float(limit) for name, limit in tolerance.items()}
    numbers = {name: i for i, name in enumerate(classes.names) if i > 0}
    if unknown := tolerance.keys() - numbers.keys():
        raise UserError(
            one_line(f"--tolerance: no class {min(unknown)}; choose from {', '.join(numbers)}")
        )
    if missing := [name for name in numbers if name not in tolerance]:
        raise UserError(one_line(f"--tolerance: none for {missing[0]}; add {missing[0]}=MM"))
    return {numbers[name]: float(limit) for name, limit in tolerance.items()}


def _run(jobs: list[Job], workers: int, console: Console) -> list[Scored]:
    """All jobs done, in their order."""
    found: dict[str, Scored] = {}
    with LiveLine(console, "cases", total=len(jobs), transient=True, at_once=False) as line:
        warned = 0
        for job, scored in run_jobs(score_pair, jobs, processes(workers, len(jobs))):
            case = job.pair.case
            if isinstance(scored, Lost):
                raise UserError(f"{case}: {scored.reason}; use fewer --workers")
            found[case] = scored
            for notice in scored.warnings:
                warned += 1
                if warned <= SHOWN:
                    line.say(f"warning: {notice.message}")
            line.update(len(found), len(jobs), case, f"cases {len(found)}/{len(jobs)}  {case}")
    if warned > SHOWN:
        line.say(f"and {warned - SHOWN} warnings more")
    return [found[job.pair.case] for job in jobs]


def _names(found: list[Scored], limits: float | dict[int, float]) -> dict[int, str]:
    """The classes of the references, if predictions and tolerances have no others."""
    known = frozenset[int]().union(*(scored.known for scored in found))
    if not known:
        raise UserError("no reference has a class; give the classes by --labels")
    for scored in found:
        if unseen := scored.predicted - known:
            raise UserError(
                one_line(
                    f"{scored.pair.pred}: class {min(unseen)} is in no reference; correct the map, "
                    f"or give the classes by --labels"
                )
            )
    names = {label: str(label) for label in sorted(known)}
    if isinstance(limits, dict) and (unknown := limits.keys() - known):
        raise UserError(
            f"--tolerance: no class {min(unknown)}; choose from {', '.join(names.values())}"
        )
    return names


def _limit(limits: float | dict[int, float], label: int) -> float:
    return limits[label] if isinstance(limits, dict) else limits


def _absent(label: int) -> Score:
    """Of a class that a case has in neither map."""
    nothing = {"dice": math.nan, "nsd": math.nan, "hd95": math.nan}
    return Score(label=label, **nothing, prediction_ml=0.0, reference_ml=0.0)
