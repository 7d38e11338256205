"""Which cases of a data set a fold trains on and which it is validated on.

`splits_final.json` beside `dataset.json` decides where there is one; nnU-Net makes it too. Without
it the folds are those that nnU-Net would make: five, of the sorted ids, shuffled with its seed.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsemae.data.finding.entry import mistake
from sparsemae.data.finding.written import read_json_list
from sparsemae.errors import UserError, listed
from sparsemae.segmentation.dataset import Dataset

SPLITS = "splits_final.json"
FOLDS = 5
ALL = "all"  # a fold that trains on everything, and is validated on what it was trained on
_SEED = 12345  # nnU-Net's


@dataclass(frozen=True)
class Split:
    """The ids of a fold's cases."""

    train: tuple[str, ...]
    val: tuple[str, ...]


def make_split(dataset: Dataset, fold: int | str, splits: Path | None = None) -> Split:
    """Fold `fold`, from 0, or "all".

    Args:
        splits: A file in the form of `splits_final.json`; that of the data set if None.

    Raises:
        UserError: There is no such fold, or its file names cases that do not exist.
    """
    ids = [case.id for case in dataset.training]
    if fold == ALL:
        return Split(tuple(ids), tuple(ids))
    path = dataset.path / SPLITS if splits is None else splits
    if splits is not None or path.is_file():
        folds, source = _read(path, ids), str(path)
    else:
        folds, source = nnunet_folds(ids), f"{dataset.path} without {SPLITS}"
    if not isinstance(fold, int) or not 0 <= fold < len(folds):
        raise UserError(
            f"--fold {fold}: {source} has folds 0 to {len(folds) - 1}; choose one of them, or all"
        )
    return folds[fold]


def nnunet_folds(ids: list[str]) -> list[Split]:
    """nnU-Net's folds of sorted ids; of fewer than five cases, each is left out once.

    Source: nnunetv2 2.8.1 `generate_crossval_split`, scikit-learn's `KFold`.
    """
    count = min(FOLDS, len(ids))
    if count < 2:
        raise UserError(
            "one labelled case leaves none to validate on; add cases, or use --fold all"
        )
    order = np.arange(len(ids))
    np.random.RandomState(_SEED).shuffle(order)
    folds = []
    for part in np.array_split(order, count):
        held_out = set(part.tolist())
        folds.append(
            Split(
                tuple(case for i, case in enumerate(ids) if i not in held_out),
                tuple(case for i, case in enumerate(ids) if i in held_out),
            )
        )
    return folds


def _read(path: Path, ids: list[str]) -> list[Split]:
    content = read_json_list(str(path))
    if not content:
        raise mistake(path, 'no folds in it; write [{"train": [...], "val": [...]}, ...]')
    return [_fold(path, number, entry, set(ids)) for number, entry in enumerate(content)]


def _fold(path: Path, number: int, entry: Any, known: set[str]) -> Split:
    parts = []
    for key in ("train", "val"):
        names = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise mistake(path, f"fold {number}: {key} is not a list of case ids; correct it")
        if unknown := sorted(set(names) - known):
            raise mistake(
                path,
                f"fold {number}: {key} names {listed(unknown, 1)}, which is no case of the data "
                f"set; correct it",
            )
        if len(set(names)) < len(names):
            raise mistake(path, f"fold {number}: {key} names a case twice; correct it")
        parts.append(tuple(sorted(names)))
    train, val = parts
    if not train:
        raise mistake(path, f"fold {number}: train is empty; name the cases to train on")
    if both := sorted(set(train) & set(val)):
        raise mistake(
            path,
            f"fold {number}: {both[0]} is in train and in val, where it would say nothing; take "
            f"it out of one, or use --fold all",
        )
    return Split(train, val)
