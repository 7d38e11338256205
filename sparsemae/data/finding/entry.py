"""What a layout yields: a file, what is known of it, and what is wrong with it."""

import os
from dataclasses import dataclass

from sparsemae.data.codes import Notice, one_line
from sparsemae.errors import UserError


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
