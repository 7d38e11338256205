"""What was written down about volumes: text and JSON files, rows of lists, and the paths in them.

A file that cannot be understood is a mistake as a whole; a row whose files cannot be used is a
problem of its own. Relative paths are relative to the folder of the file they are written in and
stay below it; absolute ones are taken as they are.
"""

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sparsemae.data.codes import Notice
from sparsemae.data.finding.entry import Entry, mistake, problem
from sparsemae.data.finding.ids import is_safe
from sparsemae.data.finding.place import Parts, Root, common_folder, folders_below
from sparsemae.data.finding.scan import split_suffix

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(slots=True, kw_only=True)
class Row:
    """One volume as it is written down; None is what was not."""

    path: str
    subject: str | None = None
    session: str | None = None
    modality: str | None = None
    dataset: str | None = None
    excluded: str | None = None  # a path, like `anatomy`
    anatomy: str | None = None
    id: str | None = None
    parts: Parts | None = None  # for the id, in place of those of the path


def read_text(path: str) -> str:
    """The text of a file in UTF-8, with or without a mark; bytes of other encodings as in names."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block
            raise mistake(path, "not a regular file; name the list itself")
        with open(path, "rb") as file:
            data = file.read()
    except OSError as error:
        raise mistake(path, f"{error.strerror}; check the path and its permissions") from None
    if data.startswith(_UTF16):
        raise mistake(path, "this text is UTF-16; save it as UTF-8")
    return data.decode("utf-8-sig", "surrogateescape")


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file."""
    data = _read_json(path)
    if not isinstance(data, dict):
        raise mistake(path, f"holds {json_kind(data)} where an object {{...}} is expected")
    return data


def read_json_list(path: str) -> list[Any]:
    """The list in a JSON file."""
    data = _read_json(path)
    if not isinstance(data, list):
        raise mistake(path, f"holds {json_kind(data)} where a list [...] is expected")
    return data


def _read_json(path: str) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise mistake(path, f"not valid JSON ({error}); export it again") from None


def json_kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def listed(source: str, rows: Sequence[Row]) -> Iterator[Entry]:
    """The entries of the rows of the file `source`.

    What a row does not say is derived from the file's place: below the folder of `source`, or below
    the folder that all absolute paths to elsewhere share.
    """
    base = os.path.dirname(source)
    home = os.path.abspath(base)
    paths = [_resolve(base, row.path) for row in rows]
    away = [p for row, p in zip(rows, paths, strict=True) if not _leaves(row.path)]
    away = [p for p in away if not _is_below(p, home)]
    near, far = Root.of(base), Root.of(common_folder(away)) if away else None
    for row, path in zip(rows, paths, strict=True):
        stem = split_suffix(os.path.basename(path))[0]
        if _is_below(path, home):
            folders = folders_below(home, path)
            parts, facts = near.id_parts(folders, stem), near.facts(folders, stem)
        else:  # its id must not depend on what else is listed
            folders = folders_below(os.sep, path)
            parts = Root.of(os.sep).id_parts(folders, stem)
            above = () if far is None or _leaves(row.path) else folders_below(far.path, path)
            facts = (far or near).facts(above, stem)
        facts |= {key: value for key in facts if (value := getattr(row, key)) is not None}
        excluded, anatomy = (m and _resolve(base, m) for m in (row.excluded, row.anatomy))
        yield Entry(
            path=path,
            parts=row.parts or parts,
            origin=os.path.join(*folders, os.path.basename(path)),
            excluded=excluded,
            anatomy=anatomy,
            id=row.id if row.id is not None and is_safe(row.id) else None,
            listed=True,
            problem=_trouble(source, row, path, (excluded, anatomy)),
            **facts,
        )


def _resolve(base: str, path: str) -> str:
    """Relative to `base`; `..` goes by the letter, so that no link leads astray."""
    return path if os.path.isabs(path) else os.path.join(base, os.path.normpath(path))


def _leaves(path: str) -> bool:
    return os.path.normpath(path).split(os.sep)[0] == os.pardir  # of an absolute path it is ""


def _is_below(path: str, root: str) -> bool:
    return os.path.abspath(path).startswith(os.path.join(root, ""))


def _trouble(
    source: str, row: Row, path: str, masks: tuple[str | None, str | None]
) -> Notice | None:
    """Why the row cannot be used."""
    for written in filter(None, (row.path, row.excluded, row.anatomy)):
        if _leaves(written):
            text = f"leaves the folder of {source}; write an absolute path"
            return problem("source.outside", written, text)
    if row.id is not None and not is_safe(row.id):
        text = (
            f"id {row.id!r} is no safe name; use up to 150 of A-Z a-z 0-9 _ . -, not . or - first"
        )
        return problem("source.id", path, text)
    for kind, file in (("file", path), ("excluded mask", masks[0]), ("anatomy mask", masks[1])):
        if file is not None and not os.path.exists(file):
            return problem("source.missing", file, f"no such {kind}; correct {source}")
    return None
