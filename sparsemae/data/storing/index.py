"""STORE/index.json: the only list of what a store holds, written last and atomically.

It is JSON with one case per line. Its first line holds a CRC-32 of all that follows, so bit rot is
an error with a name, not another training set; its fingerprint is equal for equal data.
"""

import hashlib
import itertools
import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
from pydantic import ValidationError

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.storing.stored import Case, Cases, case_line
from sparsemae.errors import UserError
from sparsemae.files import sync_folder, write_atomically

FORMAT = "sparsemae-store"
VERSION = 2
INDEX = "index.json"
PLACE = ("source", "stamp")  # where and when, not what: no part of the fingerprint
_FIRST = f'{{"format": "{FORMAT}", "version": {VERSION}, "crc32": "'.encode()
_FIRST_LINE = re.compile(re.escape(_FIRST) + b'([0-9a-f]{8})",\n')
_CASES = b'"cases": [\n'


@dataclass(frozen=True)
class Index:
    """An index that was read whole."""

    config: PreprocessConfig
    cases: Cases
    fingerprint: str


def write_index(store: Path, cases: Iterable[Case], config: PreprocessConfig) -> None:
    """Make `store` a store of these cases: once this returns, it and they survive a power failure.

    ValueError if two cases have one id. Equal cases and config give equal bytes.
    """
    ordered = sorted(cases, key=lambda case: case.id)
    for one, other in itertools.pairwise(ordered):
        if one.id == other.id:
            raise ValueError(f"two cases have the id {one.id!r}")
    head = config.model_dump_json()
    digest = hashlib.sha256(head.encode())
    for case in ordered:
        digest.update(case_line(case, without=PLACE) + b"\n")
    lines = b",\n".join(map(case_line, ordered))
    body = f'"config": {head},\n"fingerprint": "{digest.hexdigest()}",\n'.encode()
    body += _CASES + lines + b"\n]}\n"
    for folder in sorted({(store / file.file).parent for case in ordered for file in case.files}):
        sync_folder(folder)
    first = _FIRST + f'{zlib.crc32(body):08x}",\n'.encode()
    write_atomically(store / INDEX, first + body)


def read_index(store: Path) -> Index:
    """Read and check the index; `UserError` if it is missing, damaged or of another kind."""
    path = store / INDEX
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{store}: no store there; make it with `sparsemae preprocess SRC -o {store}`"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; check the disk and its permissions") from None
    first = _FIRST_LINE.match(data)
    if first is None:
        _refuse(store, data)
    if zlib.crc32(memoryview(data)[first.end() :]) != int(first[1], 16):
        _damaged(store)
    start = data.find(_CASES) + len(_CASES)
    try:
        head = json.loads(data[:start] + b"]}")
        config = PreprocessConfig.model_validate_json(json.dumps(head["config"]))
        fingerprint = head["fingerprint"]
    except (ValueError, KeyError, TypeError, ValidationError):
        _damaged(store)
    ends = [m.start() for m in re.compile(rb"\n").finditer(data, start)][:-1]
    if not ends or data[start : ends[0]].strip() == b"":
        raise UserError(f"{store}: the store has no cases; {_again(store)}")
    stops = np.array(ends, np.int64)
    starts = np.concatenate([[start], stops[:-1] + 1])
    stops[:-1] -= 1  # the comma
    return Index(config, Cases(data, starts, stops, str(path)), fingerprint)


def _refuse(store: Path, data: bytes) -> NoReturn:
    """Say what the file is instead."""
    path = store / INDEX
    try:
        index = json.loads(data)
    except (ValueError, RecursionError):
        _damaged(store)
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UserError(f"{path}: not the index of a sparsemae store; choose another folder")
    if index.get("version") == VERSION:
        _damaged(store)
    raise UserError(
        f"{path}: store version {index.get('version')}, this program reads {VERSION}; "
        f"{_again(store)}"
    )


def _damaged(store: Path) -> NoReturn:
    raise UserError(f"{store / INDEX}: damaged index; {_again(store)}") from None


def _again(store: Path) -> str:
    return f"make the store again with `sparsemae preprocess SRC -o {store} --overwrite`"
