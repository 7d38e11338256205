"""Lists of volumes: CSV with a header, or JSONL with an object per line.

The column `path` is required; subject, session, modality, dataset, excluded, anatomy and id may be
left out or empty. Paths are relative to the list's folder.
"""

import csv
import difflib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

from sparsemae.data.finding.entry import Entry, mistake
from sparsemae.data.finding.written import Row, json_kind, listed, read_text

COLUMNS = ("path", "subject", "session", "modality", "dataset", "excluded", "anatomy", "id")
_PATHS = ("path", "excluded", "anatomy")


def read_list(source: str) -> Iterator[Entry]:
    """The entries of a list, which is JSONL if its name says so."""
    text = read_text(source)
    rows = _jsonl(source, text) if source.lower().endswith(".jsonl") else _csv(source, text)
    rows = list(rows)
    if not rows:
        raise mistake(source, "this list has no entry; add a line per volume")
    return listed(source, rows)


def _csv(source: str, text: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header: list[str] = []
        for cells in reader:
            place = f"{source}:{reader.line_num}"
            if not any(cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                _check_columns(place, header)
                if missing := {"path"} - set(header):
                    raise mistake(place, f"no column {', '.join(missing)} in the header; add it")
                continue
            if len(cells) != len(header):
                raise mistake(
                    place,
                    f"{len(cells)} values for {len(header)} columns; quote values with commas",
                )
            yield _row(place, dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise mistake(f"{source}:{reader.line_num}", f"not valid CSV ({error}); quote it") from None


def _jsonl(source: str, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{source}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise mistake(place, f"not valid JSON ({error}); write an object per line") from None
        if not isinstance(fields, dict):
            raise mistake(place, f"{json_kind(fields)}; write an object per line")
        _check_columns(place, list(fields))
        yield _row(place, {key: _text(place, key, value) for key, value in fields.items()})


def _text(place: str, key: str, value: Any) -> str:
    """Text as it is, null as nothing, and a whole number, such as a subject's, by its digits."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool) and key not in _PATHS:
        return str(value)
    raise mistake(place, f"{key}: {json_kind(value)}; write text")


def _row(place: str, fields: dict[str, str]) -> Row:
    """Spaces around a value do not count, but they may be part of a path."""
    values = {key: value if key in _PATHS else value.strip() for key, value in fields.items()}
    if not values.get("path"):
        raise mistake(place, "no path; name the volume's file")
    return Row(**{key: value for key, value in values.items() if value})


def _check_columns(place: str, names: Iterable[str]) -> None:
    seen = set()
    for name in names:
        if name not in COLUMNS:
            raise mistake(place, f"unknown column {name!r}; {_remedy(name)}")
        if name in seen:
            raise mistake(place, f"column {name} occurs twice; remove one")
        seen.add(name)


def _remedy(name: str) -> str:
    if ";" in name or "\t" in name:
        return "separate columns by commas"
    if near := difflib.get_close_matches(name.lower(), COLUMNS, 1):
        return f"did you mean {near[0]}?"
    return f"columns are {', '.join(COLUMNS)}"
