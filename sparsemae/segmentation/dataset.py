"""Labelled data sets in nnU-Net's raw layout: what there is, before any voxel is read.

`dataset.json` names channels, labels and the file ending; `imagesTr/CASE_0000.nii.gz` is channel 0
of a case, `labelsTr/CASE.nii.gz` its label map, `imagesTs` the cases without one.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemae.data.codes import one_line
from sparsemae.data.finding.entry import mistake
from sparsemae.data.finding.nnunet import DESCRIPTION, IMAGES, channel_names, file_ending
from sparsemae.data.finding.place import split_channel
from sparsemae.data.finding.written import json_kind, read_json
from sparsemae.errors import UserError, listed

LABELS, TEST = "labelsTr", "imagesTs"
PROBABILITIES = "_probabilities"  # after a case's name: predicted beside its label map
_LONGEST = 200  # bytes of a case's id: endings are added to it
IGNORE = "ignore"  # the label of voxels that nobody knows the class of


@dataclass(frozen=True)
class SegCase:
    """The files of one case: an image per channel, in order, and a label map where there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class Classes:
    """What voxels are told apart; class 0 is background, and the others follow without a gap."""

    names: tuple[str, ...]  # by number
    ignore: int | None = None  # the number that stands for unknown, after the last class

    def __len__(self) -> int:
        return len(self.names)

    @property
    def numbers(self) -> tuple[int, ...]:
        """All that may stand in a label map."""
        known = tuple(range(len(self.names)))
        return known if self.ignore is None else (*known, self.ignore)


@dataclass(frozen=True)
class Dataset:
    """A data set on disk."""

    path: Path
    name: str  # of the folder, Dataset501_Brains
    channels: tuple[str, ...]
    classes: Classes
    training: tuple[SegCase, ...]  # in the order of their ids


def read_dataset(path: Path) -> Dataset:
    """Read `dataset.json` and look which files there are.

    Raises:
        UserError: The description cannot be understood, uses regions, or a file is missing; names
            the file or the key.
    """
    description = path / DESCRIPTION
    if not path.is_dir() or not description.is_file():
        raise UserError(
            one_line(f"{path}: no data set in nnU-Net's layout there: {DESCRIPTION} is missing")
        )
    about = read_json(os.fspath(description))
    named = channel_names(os.fspath(description), about)
    if sorted(named) != list(range(len(named))):
        raise mistake(description, "channel_names: number them 0, 1, 2, ... without a gap")
    classes = _classes(description, about.get("labels"))
    ending = file_ending(os.fspath(description), about)
    channels = tuple(named[i] for i in range(len(named)))
    if "dataset" in about:
        cases = _written_cases(path, about["dataset"], len(channels))
    else:
        images = find_images(path / IMAGES, ending, len(channels))
        cases = {
            case: SegCase(case, files, path / LABELS / f"{case}{ending}")
            for case, files in images.items()
        }
    _require_labels(path, cases)
    ordered = tuple(cases[case] for case in sorted(cases))
    return Dataset(path, path.resolve().name, channels, classes, ordered)


def read_classes(description: Path) -> Classes:
    """The classes that a `dataset.json` names.

    Raises:
        UserError: It cannot be understood, or uses regions; names the key.
    """
    return _classes(description, read_json(os.fspath(description)).get("labels"))


def find_images(folder: Path, ending: str, channels: int) -> dict[str, tuple[Path, ...]]:
    """The images of every case in `folder`, by the case's id: CASE_0000, CASE_0001, ...

    Raises:
        UserError: There are none, a channel is missing, or a name is none of a case.
    """
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(ending) and n[0] != ".")
    except OSError as error:
        raise UserError(
            one_line(f"{folder}: {error.strerror}; a data set has this folder")
        ) from None
    if not names:
        raise UserError(one_line(f"{folder}: no *{ending} in it; check file_ending"))
    found: dict[str, dict[int, Path]] = {}
    for name in names:
        case, number = split_channel(name.removesuffix(ending))
        if not _is_name(case):
            raise UserError(one_line(f"{folder / name}: no name for a case; shorten it"))
        if number is None or number >= channels:
            what = f"CASE_0000 to CASE_{channels - 1:04}" if channels > 1 else "CASE_0000"
            raise UserError(
                one_line(
                    f"{folder / name}: {channels} channel{'s' * (channels > 1)}, so its name must "
                    f"be {what}{ending}; rename it, or correct {DESCRIPTION}"
                )
            )
        found.setdefault(case, {})[number] = folder / name
    out = {}
    for case, files in found.items():
        if missing := [n for n in range(channels) if n not in files]:
            raise UserError(
                one_line(
                    f"{folder / f'{case}_{missing[0]:04}{ending}'}: missing; a case has "
                    f"{channels} channels, and of this one there are {len(files)}"
                )
            )
        out[case] = tuple(files[n] for n in range(channels))
    return out


def _classes(description: Path, labels: Any) -> Classes:
    """The classes of `labels`; regions are refused."""
    if not isinstance(labels, dict) or not labels:
        found = "missing" if labels is None else json_kind(labels)
        raise mistake(description, f'labels: {found}; write {{"background": 0, NAME: 1, ...}}')
    numbers: dict[int, str] = {}
    for name, number in labels.items():
        if isinstance(number, list):
            raise mistake(
                description,
                f"labels.{name}: a region, made of several labels; sparsemae segments classes that "
                f"exclude each other: give every label a name and a number of its own",
            )
        if isinstance(number, str) and number.isdecimal():  # nnU-Net 1 and the Decathlon
            name, number = number, name
        if isinstance(name, str) and name.isdecimal() and isinstance(number, str):
            name, number = number, int(name)
        if type(number) is not int or number < 0:
            raise mistake(description, f"labels.{name}: {number!r}; give a whole number from 0")
        if number in numbers:
            raise mistake(
                description, f"labels: {name} and {numbers[number]} are both {number}; renumber one"
            )
        numbers[number] = name
    ignore = next((k for k, name in numbers.items() if name == IGNORE), None)
    known = sorted(k for k in numbers if k != ignore)
    if known and 0 not in known:
        raise mistake(description, 'labels: none is number 0; add "background": 0')
    if known != list(range(len(known))):
        raise mistake(description, f"labels: numbers {known}; use 0 to {len(known) - 1}")
    if len(known) < 2:
        raise mistake(description, "labels: background alone; name what is to be segmented")
    if ignore is not None and ignore != len(known):
        raise mistake(description, f"labels.{IGNORE}: {ignore}; it must be {len(known)}, the last")
    return Classes(tuple(numbers[k] for k in known), ignore)


def _written_cases(root: Path, cases: Any, channels: int) -> dict[str, SegCase]:
    """Cases listed in `dataset.json`: {CASE: {"images": [FILE, ...], "label": FILE}}."""
    out = {}
    for case, files in cases.items() if isinstance(cases, dict) else [("", None)]:
        images = files.get("images") if isinstance(files, dict) else None
        label = files.get("label") if isinstance(files, dict) else None
        if not isinstance(images, list) or not isinstance(label, str):
            place = f"dataset.{case}".rstrip(".")
            raise mistake(
                root / DESCRIPTION,
                f'{place}: write {{CASE: {{"images": [FILE, ...], "label": FILE}}}}',
            )
        if not _is_name(case):
            raise mistake(
                root / DESCRIPTION, f"dataset.{case}: no name for files; give it another id"
            )
        if len(images) != channels:
            raise mistake(
                root / DESCRIPTION,
                f"dataset.{case}: {len(images)} images for {channels} channels; list one for each",
            )
        out[case] = SegCase(case, tuple(root / str(i) for i in images), root / label)
        for image in out[case].images:
            if not image.is_file():
                raise UserError(one_line(f"{image}: missing; correct dataset.{case}"))
    if not out:
        raise mistake(root / DESCRIPTION, "dataset: no cases")
    return out


def _is_name(case: str) -> bool:
    """Whether files of other folders can be called by it."""
    odd = case in ("", ".", "..") or any(letter in case for letter in ("/", "\0"))
    return not odd and len(os.fsencode(case)) <= _LONGEST


def _require_labels(root: Path, cases: dict[str, SegCase]) -> None:
    missing = sorted(c.label for c in cases.values() if not c.label.is_file())
    if missing:
        raise UserError(
            one_line(
                f"{listed([str(path) for path in missing], 1)}: no label map for that image; "
                f"add it, or move the image out of {root / IMAGES}"
            )
        )
