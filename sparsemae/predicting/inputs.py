"""What is to be predicted: the images of every case in a folder, or one file."""

import os
from pathlib import Path

from sparsemae.data.codes import one_line
from sparsemae.data.finding.place import split_channel
from sparsemae.data.finding.scan import split_suffix, volumes
from sparsemae.data.read import SUFFIXES
from sparsemae.errors import UserError
from sparsemae.segmentation.dataset import SegCase


def find_cases(source: Path, channels: tuple[str, ...]) -> list[SegCase]:
    """The cases of a folder by their ids, or the one that a file is.

    Of one channel a case is CASE.nii.gz or CASE_0000.nii.gz; of several, CASE_0000, CASE_0001, ...
    in the order of `channels`, those the network was trained with; one of them stands for all.

    Raises:
        UserError: There is nothing, a channel is missing or too many, or two files are one case.
    """
    if source.is_file():
        files = [source] if len(channels) == 1 else _siblings(source)
    elif source.is_dir():
        files = [source / name for name in sorted(volumes(os.listdir(source)))]
    else:
        raise UserError(one_line(f"{source}: no such file or folder; check the path"))
    if not files:
        raise UserError(
            one_line(f"{source}: no volumes in it ({', '.join(SUFFIXES)}); name the folder of them")
        )
    return [SegCase(case, paths) for case, paths in _grouped(files, channels).items()]


def _siblings(file: Path) -> list[Path]:
    case, number = _split(file.name)
    if number is None:
        return [file]
    names = sorted(volumes(os.listdir(file.parent)))
    return [file.parent / name for name in names if _split(name)[0] == case]


def _split(name: str) -> tuple[str, int | None]:
    return split_channel(split_suffix(name)[0])


def _grouped(files: list[Path], channels: tuple[str, ...]) -> dict[str, tuple[Path, ...]]:
    named = {path: _split(path.name) for path in files}
    if len(channels) == 1:  # without a channel's number, all of a name is the case's
        numbered = {case for case, number in named.values() if number == 0}
        for path, (case, number) in named.items():
            if number is None or (number and case not in numbered):
                named[path] = (split_suffix(path.name)[0], 0)
    found: dict[str, dict[int, Path]] = {}
    for path, (case, number) in named.items():
        if number is None or number >= len(channels):
            raise UserError(one_line(f"{path}: {_wanted(channels)}"))
        other = found.setdefault(case, {}).setdefault(number, path)
        if other != path:
            raise UserError(
                one_line(f"{path} and {other.name} are one case by their names; rename one")
            )
    out = {}
    for case, numbers in sorted(found.items()):
        if missing := [n for n in range(len(channels)) if n not in numbers]:
            path = os.path.commonpath([p.parent for p in numbers.values()])
            raise UserError(
                one_line(
                    f"{path}: case {case} has no channel {missing[0]:04} "
                    f"({channels[missing[0]]}); {_wanted(channels)}"
                )
            )
        out[case] = tuple(numbers[n] for n in range(len(channels)))
    return out


def _wanted(channels: tuple[str, ...]) -> str:
    names = ", ".join(f"CASE_{i:04} {name}" for i, name in enumerate(channels))
    count = f"{len(channels)} channel{'s' if len(channels) > 1 else ''}"
    return f"the network was trained on {count}: name the files {names}"
