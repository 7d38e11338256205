"""What the place of a file says about it: subject, session, modality and data set."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict

Parts = tuple[str, ...]

# Endings of BIDS names of anatomical images, deprecated ones included; masks are not among them.
CONTRASTS = frozenset(
    (
        *("T1w", "T2w", "PDw", "T2starw", "FLAIR", "inplaneT1", "inplaneT2", "PDT2", "angio"),
        *("UNIT1", "T1rho", "FLASH", "PD", "T2star", "T1map", "T2map", "T2starmap", "R1map"),
        *("R2map", "R2starmap", "PDmap", "PDT2map", "MTRmap", "MTsat", "MTVmap"),
    )
)
_SUBJECT = re.compile(r"(?:^|_)(sub-[^_]+)")
_SESSION = re.compile(r"(?:^|_)(ses-[^_]+)")
_INSIDE = re.compile(r"/(?P<parts>sub-[^_/]+(/ses-[^_/]+)?(/anat)?)$")
_CHANNEL = re.compile(r"(?P<case>.+)_(?P<number>\d{4})", re.DOTALL)
_NNUNET_IMAGES = ("imagesTr", "imagesTs")


class Facts(TypedDict):
    """What is derived from a place."""

    subject: str
    session: str | None
    modality: str | None
    dataset: str | None


@dataclass(frozen=True, slots=True)
class Root:
    """A folder that is a source, or from which places are counted."""

    path: str  # as it was written
    name: str
    dataset: str | None  # the folder above that of the subject it is in, else itself
    inside: Parts  # sub-X, ses-Y, anat: where in a BIDS data set it is; () if at its top or in none

    @classmethod
    def of(cls, path: str) -> "Root":
        whole = os.path.abspath(path)
        name = os.path.basename(whole)
        found = _INSIDE.search(whole)
        if found is not None or name in _NNUNET_IMAGES:
            dataset = os.path.basename(
                os.path.dirname(whole) if found is None else whole[: found.start()]
            )
        else:
            dataset = name
        return cls(path, name, dataset or None, tuple(found["parts"].split("/")) if found else ())

    def facts(self, folders: Parts, stem: str, shared: int = 0) -> Facts:
        """Of the file `stem` without suffix, in `folders` below this one.

        The subject is the entity sub-X of the name, else of the innermost folder that has one, else
        the first folder beyond the `shared` ones that hold everything, else the name, in nnU-Net's
        folders of images without the channel. The session is ses-Y likewise, the modality what a
        BIDS name ends in, as _T1w, and the data set the folder above that of the subject, else this
        one.
        """
        around = (*self.inside, *folders)
        names = (stem, *reversed(around))
        alone = split_channel(stem)[0] if self.name in _NNUNET_IMAGES else stem
        start, _, ending = stem.rpartition("_")
        return {
            "subject": _first(_SUBJECT, names) or (*folders[shared:], alone)[0],
            "session": _first(_SESSION, names),
            "modality": ending if start and ending in CONTRASTS else None,
            "dataset": self._dataset(folders),
        }

    def id_parts(self, folders: Parts, stem: str) -> Parts:
        """What names that file: its folders and itself, but none of BIDS that its name repeats."""
        around = (*self.inside, *folders)
        chain = subject_folders(around)
        complete = chain[-1:] == ("anat",) and leads_to_anat(chain)
        if complete and all(f"{folder}_" in stem for folder in chain[:-1]):
            folders = around[: len(around) - len(chain)]
        return (*folders, stem)

    def _dataset(self, folders: Parts) -> str | None:
        above = folders[: len(folders) - len(subject_folders(folders))]
        return self.dataset if self.inside or above in ((), folders) else above[-1]


def subject_folders(folders: Parts) -> Parts:
    """The folders from the first that is a subject's of BIDS on; () if there is none."""
    first = next((i for i, name in enumerate(folders) if is_subject(name)), len(folders))
    return folders[first:]


def leads_to_anat(inside: Parts) -> bool:
    """Whether `inside`, which begins with sub-X, is or leads to sub-X/[ses-Y/]anat."""
    below = inside[2:] if len(inside) > 1 and is_session(inside[1]) else inside[1:]
    return below in ((), ("anat",))


def is_subject(folder: str) -> bool:
    """Whether a folder has the name sub-X."""
    return folder.startswith("sub-") and len(folder) > 4 and "_" not in folder


def is_session(folder: str) -> bool:
    """Whether a folder has the name ses-Y."""
    return folder.startswith("ses-") and len(folder) > 4 and "_" not in folder


def split_channel(stem: str) -> tuple[str, int | None]:
    """CASE and 0 of nnU-Net's CASE_0000; None where there is no such number."""
    found = _CHANNEL.fullmatch(stem)
    return (stem, None) if found is None else (found["case"], int(found["number"]))


def common_folder(paths: Iterable[str]) -> str:
    """The innermost folder that holds all `paths`, absolute."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])


def folders_below(root: str, path: str) -> Parts:
    """The folders that lead from `root` to the file, which is below it."""
    return tuple(os.path.relpath(os.path.abspath(path), root).split(os.sep)[:-1])


def _first(entity: re.Pattern[str], names: Iterable[str]) -> str | None:
    return next((found[1] for name in names if (found := entity.search(name))), None)
