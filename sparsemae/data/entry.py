"""What a layout yields: a file, what its place and name say about it, and what is wrong with it."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sparsemae.data.codes import Notice, one_line
from sparsemae.errors import UserError

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
_SUBJECT_FOLDER = re.compile(r"sub-[^_]+")


@dataclass(slots=True, kw_only=True)
class Entry:
    """A file on its way to become a source, or a problem."""

    path: str
    parts: tuple[str, ...]  # its id: folders below the source, and the name without suffix
    origin: str  # tells it from entries of other sources with equal parts; free of the mount point
    subject: str
    session: str | None = None
    modality: str | None = None
    dataset: str | None = None
    excluded: str | None = None
    anatomy: str | None = None
    id: str | None = None  # given by the user
    listed: bool = False  # its facts were written down, not derived from its place
    problem: Notice | None = None

    def facts(self) -> tuple[str | None, ...]:
        """All that is said about the file."""
        said = (self.subject, self.session, self.modality, self.dataset)
        return (*said, self.excluded, self.anatomy, self.id)


def mistake(path: str | os.PathLike[str], text: str) -> UserError:
    """What is wrong with `path` as a whole, in one line."""
    return UserError(one_line(f"{os.fspath(path)}: {text}"))


def problem(code: str, path: str, text: str) -> Notice:
    """What keeps a single entry from being used."""
    return Notice(code, one_line(f"{path}: {text}"))


def derive(root: str, folders: Sequence[str], stem: str) -> dict[str, str | None]:
    """Subject, session, modality and dataset of a file by its place below the folder `root`.

    An entity sub-X of the name, else of the innermost folder, is the subject; without any, it is
    the first folder below `root`, else the name. ses-Y is the session likewise, and the ending of
    a BIDS name (_T1w) the modality. The dataset is the folder above sub-X, else `root`'s name.
    """
    inner = (stem, *reversed(folders))
    around = [*os.path.abspath(root).split(os.sep), *folders]
    outer = (*inner, *reversed(around[: len(around) - len(folders)]))
    above = next((i for i in reversed(range(len(around))) if _is_subject(around[i])), 0)
    dataset = around[above - 1] if above > 0 else around[len(around) - len(folders) - 1]
    ending = stem.rpartition("_")
    return {
        "subject": _first(_SUBJECT, outer) or (*folders, stem)[0],
        "session": _first(_SESSION, outer),
        "modality": ending[2] if ending[0] and ending[2] in CONTRASTS else None,
        "dataset": dataset or None,
    }


def _is_subject(folder: str) -> bool:
    return _SUBJECT_FOLDER.fullmatch(folder) is not None


def _first(entity: re.Pattern[str], names: Sequence[str]) -> str | None:
    return next((found[1] for name in names if (found := entity.search(name))), None)
