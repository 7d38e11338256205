"""nnU-Net's raw data sets: `dataset.json` and `imagesTr/CASE_0000.nii.gz`, a file per channel.

Each channel is a volume of its own, with the channel's name as modality, and CASE is the subject.
Labels are never taken, nor is imagesTs: a test set is for testing, unless it is named itself.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

from sparsemae.data.finding.entry import Entry, mistake, problem
from sparsemae.data.finding.folder import found_at
from sparsemae.data.finding.place import Root, split_channel
from sparsemae.data.finding.scan import walk
from sparsemae.data.finding.written import Row, json_kind, listed, read_json
from sparsemae.data.read import SUFFIXES

DESCRIPTION = "dataset.json"
IMAGES = "imagesTr"
_NUMBER = re.compile(r"[0-9]{1,4}")


def is_nnunet(root: str) -> bool:
    """Whether `root` has what every such data set has."""
    return os.path.isfile(os.path.join(root, DESCRIPTION)) and os.path.isdir(
        os.path.join(root, IMAGES)
    )


def nnunet(root: str) -> Iterator[Entry]:
    """The training images of the data set in `root`."""
    path = os.path.join(root, DESCRIPTION)
    about = read_json(path)
    ending = file_ending(path, about)
    channels = channel_names(path, about)
    if "dataset" in about:
        yield from listed(path, list(_cases(path, about, channels)))
        return
    top = Root.of(os.path.join(root, IMAGES))
    folder = next(walk(top.path, lambda parts: False))
    if folder.error is not None:
        raise mistake(folder.path, f"{folder.error.strerror}; a data set has this folder")
    names = [n for n in folder.files if n.endswith(ending)]
    if not names:
        raise mistake(folder.path, f"no *{ending} in it; check file_ending in {DESCRIPTION}")
    split = any(name.endswith(f"_0000{ending}") for name in names)  # the Decathlon's are not
    for name in names:
        entry = found_at(top, (), name)
        stem = name[: -len(ending)]
        case, number = split_channel(stem) if split else (stem, 0 if len(channels) == 1 else None)
        entry.parts, entry.subject, entry.modality = (stem,), case, channels.get(number)
        entry.origin = f"{top.dataset}/{name}"
        if split and number not in channels:
            text = f"not CASE_0000 with a channel of {DESCRIPTION}; rename it, or add the channel"
            entry.problem = problem("source.channel", entry.path, text)
        yield entry


def file_ending(path: str, about: dict[str, Any]) -> str:
    """What image names end in."""
    ending = about.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending.lower() not in SUFFIXES:
        raise mistake(path, f"file_ending {ending!r} is none of {', '.join(SUFFIXES)}; convert")
    return ending


def channel_names(path: str, about: dict[str, Any]) -> dict[int, str]:
    """The names of the channels by number; nnU-Net 1 and the Decathlon call them modality."""
    names = about.get("channel_names", about.get("modality"))
    if not isinstance(names, dict) or not all(map(_NUMBER.fullmatch, names)):
        found = "missing" if names is None else json_kind(names)
        raise mistake(path, f'channel_names: {found}; write {{"0": NAME, ...}}')
    return {int(key): str(name) for key, name in names.items()}


def _cases(path: str, about: dict[str, Any], channels: dict[int | None, str]) -> Iterator[Row]:
    """Images that are listed in place of a folder: {"dataset": {CASE: {"images": [...]}}}."""
    cases = about["dataset"]
    for case, files in cases.items() if isinstance(cases, dict) else [("", None)]:
        images = files.get("images") if isinstance(files, dict) else None
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            place = f"dataset.{case}".rstrip(".")
            raise mistake(path, f'{place}: write {{CASE: {{"images": [FILE, ...]}}}}')
        for number, image in enumerate(images):
            yield Row(
                path=image,
                subject=case,
                modality=channels.get(number),
                dataset=Root.of(os.path.dirname(path)).dataset,
                parts=(f"{case}_{number:04}",),
            )
