"""Which prediction belongs to which reference, and the scores of one such pair of files."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from sparsemae.data.codes import Notice, one_line
from sparsemae.data.finding.scan import preference, split_suffix, volumes
from sparsemae.data.read import SUFFIXES, read_labels
from sparsemae.errors import UserError, listed
from sparsemae.evaluation.metrics import Score, score_case
from sparsemae.segmentation.dataset import PROBABILITIES, Classes

SHOWN = 5  # names in a message


@dataclass(frozen=True)
class Pair:
    """The two files of a case."""

    case: str  # the name of the reference without suffix, in one line
    pred: Path
    ref: Path


@dataclass(frozen=True)
class Job:
    """All that a worker needs to score a case."""

    pair: Pair
    classes: Classes | None  # None: whatever the two maps have
    tolerance: float | Mapping[int, float]  # of NSD, in mm


@dataclass(frozen=True)
class Scored:
    """What came of a job."""

    pair: Pair
    scores: dict[int, Score]  # by class
    predicted: frozenset[int]  # classes of the prediction
    known: frozenset[int]  # classes of the reference
    warnings: tuple[Notice, ...]


def find_pairs(pred: Path, ref: Path, *, only_predicted: bool = False) -> list[Pair]:
    """The cases of two folders, matched and ordered by name, or of two files, whatever their names.

    Args:
        only_predicted: Leave out references without a prediction.

    Raises:
        UserError: A map has no partner, two maps have one name, or there are none.
    """
    for path in (pred, ref):
        if not path.exists():
            raise UserError(one_line(f"{path}: no such file or folder; check the path"))
    if pred.is_dir() != ref.is_dir():
        folder, file = (pred, ref) if pred.is_dir() else (ref, pred)
        raise UserError(
            one_line(f"{folder} is a folder, {file} a file: give two folders, or two files")
        )
    if not ref.is_dir():
        return [Pair(_case(ref.name), pred, ref)]
    preds, refs = _maps(pred), _maps(ref)
    beside = {f"{name}{PROBABILITIES}" for name in preds} - refs.keys()
    preds = {name: path for name, path in preds.items() if name not in beside}
    if (missing := refs.keys() - preds.keys()) and not only_predicted:
        raise UserError(
            one_line(
                f"{pred}: no prediction of {listed(sorted(missing), SHOWN)}; predict what "
                f"is missing, or leave it out by --only-predicted"
            )
        )
    if unknown := preds.keys() - refs.keys():
        raise UserError(
            one_line(
                f"{ref}: no reference of {listed(sorted(unknown), SHOWN)}; add what is "
                f"missing, or move these predictions elsewhere"
            )
        )
    return [Pair(_case(refs[name].name), preds[name], refs[name]) for name in sorted(preds)]


def score_pair(job: Job) -> Scored:
    """Read both maps and score them; a job for a worker.

    Raises:
        VolumeError: A map is unfit, has a class that is not in `job.classes`, or lies elsewhere
            than its partner.
        UserError: A class has no tolerance.
    """
    known, allowed, ignore = None, None, None
    if job.classes is not None:
        known, allowed = range(len(job.classes)), job.classes.numbers
        ignore = job.classes.ignore
    ref = read_labels(job.pair.ref, classes=allowed)
    pred = read_labels(job.pair.pred, like=ref, classes=known)
    predicted, present = (_classes_of(labels.array) for labels in (pred, ref))
    classes = sorted(predicted | present) if known is None else list(known[1:])
    if isinstance(job.tolerance, Mapping) and (bare := set(classes) - job.tolerance.keys()):
        raise UserError(
            one_line(
                f"--tolerance: none for class {min(bare)}, which {job.pair.case} has; "
                f"add {min(bare)}=MM"
            )
        )
    scores = []
    if classes:
        scores = score_case(pred.array, ref.array, ref.spacing, classes, job.tolerance, ignore)
    return Scored(
        pair=job.pair,
        scores={score.label: score for score in scores},
        predicted=predicted,
        known=present,
        warnings=(*ref.warnings, *pred.warnings),
    )


def _classes_of(array: Int[np.ndarray, "D H W"]) -> frozenset[int]:
    """All numbers but 0."""
    found: set[int] = set()
    for part in array:
        found.update(np.unique(part).tolist())
    return frozenset(found - {0})


def _maps(folder: Path) -> dict[str, Path]:
    """The label maps in a folder by their name without suffix."""
    try:
        names = sorted(volumes(os.listdir(folder)), key=preference)
    except OSError as error:
        raise UserError(one_line(f"{folder}: {error.strerror}; check its permissions")) from None
    found: dict[str, Path] = {}
    for name in names:
        case = split_suffix(name)[0]
        if case in found:
            raise UserError(
                one_line(f"{folder}: {found[case].name} and {name} are one case; keep one of them")
            )
        found[case] = folder / name
    if not found:
        raise UserError(
            one_line(f"{folder}: no label map in it; it needs files with {', '.join(SUFFIXES)}")
        )
    return found


def _case(name: str) -> str:
    return one_line(split_suffix(name)[0])
