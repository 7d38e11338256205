"""Weights from anywhere: a safetensors or torch file of unknown origin, read without running it.

The first bytes decide what a file is, not its name. Nothing is renamed or stripped, and what cannot
be trusted is refused: damage, code, archives that grow, weights that are not finite. A torch file
has checksums, which are compared; a safetensors file has none, so a changed value in it goes
unnoticed. Memory stays below the size of the file and some hundred MB until the file is accepted.
"""

import contextlib
import errno
import itertools
import os
import stat
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch
from torch import Tensor

from sparsemae.errors import UserError
from sparsemae.files import open_checked
from sparsemae.weights_pickle import LARGEST_PICKLE, RESAVE, SAFE_GLOBALS, check_pickle
from sparsemae.weights_zip import AGAIN, PICKLE, Entry, check_sums, damaged, read_directory

TOP_LEVEL = "top level"
NAMES = ("network_weights", "state_dict", "model", "model_state_dict")  # where weights lie
_HEAD = 512  # bytes that tell a format
_LARGEST_HEADER = 2**24  # bytes, of a safetensors file
_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}
_PART = 2**22  # values looked at together
_MOST_VALUES, _DEEPEST = 2**20, 64  # of what comes along with the weights
_OTHERS = (  # where, what the file begins with, what it is and what to do
    (0, b"version https://git-lfs.github.com/spec/", "a git-LFS pointer; run `git lfs pull`"),
    (257, b"ustar", f"a tar archive, or a torch file from before 2018; unpack it, or {RESAVE}"),
    (0, b"\x1f\x8b", "a gzip file; unpack it"),
    (0, b"\x89HDF", "an HDF5 file (Keras?); convert it to safetensors"),
    (0, b"\x93NUMPY", "a NumPy array; save the weights as safetensors"),
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19", f"torch's old, unguarded format; {RESAVE}"),
    *[(0, bytes((0x80, n)), f"a bare pickle, which might run code; {RESAVE}") for n in range(2, 6)],
)


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, under the names that they have there.

    Attributes:
        tensors: Contiguous, finite, on the CPU, of floating, integer or bool dtype; aliases may
            share memory.
        extra: What else there is of plain data, such as nnU-Net's `init_args`; numpy's numbers and
            arrays as Python's numbers and lists, devices as strings. An entry that holds a tensor,
            such as an optimiser's state, is left out.
        origin: The file.
        kind: "safetensors", or where in a torch file the tensors lay: `TOP_LEVEL` or one of
            `NAMES`.
    """

    tensors: dict[str, Tensor]
    extra: dict[str, Any]
    origin: Path
    kind: str


def read_weights(path: Path) -> Weights:
    """Read a `.safetensors` file or a torch zip file, whatever its extension.

    Raises:
        UserError: It is missing, damaged, of another format, would run code, holds no weights or
            several sets of them, or weights that are not finite.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEAD)
        if head.startswith(b"PK\3\4"):
            kind, tensors, extra = _read_torch(file, path, size)
        elif head[8:9] == b"{" and head[6:8] == b"\0\0":
            kind = "safetensors"
            tensors, extra = _read_safetensors(path, size, int.from_bytes(head[:8], "little"))
        else:
            raise UserError(f"{path}: {_what_it_is(head)}")
    _check_finite(path, tensors)
    # safetensors maps the file: what is written over it later would change the weights
    return Weights(_contiguous(tensors, copy=kind == "safetensors"), extra, path, kind)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """The file, for reading; a pipe or device is refused without waiting for it."""
    try:
        descriptor = open_checked(path, lambda status: _check_kind(path, status))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; check the path") from None
    except PermissionError:
        raise UserError(f"{path}: permission denied; change the file's permissions") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise UserError(f"{path}: {error.strerror}; check the path") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{str(path)!a}: no file can have this name; check the path") from None
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _check_kind(path: Path, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{path}: a folder; name the file with the weights in it")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path}: not a regular file; name a file with weights")
    if status.st_size == 0:
        raise UserError(f"{path}: the file is empty; {AGAIN}")


def _what_it_is(head: bytes) -> str:
    for where, begin, what in _OTHERS:
        if head[where:].startswith(begin):
            return f"not a file of weights but {what}"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "not a file of weights but a web page; download the file itself"
    return f"neither a safetensors nor a torch file, or one cut short; {AGAIN}, or {RESAVE}"


def _read_safetensors(
    path: Path, size: int, header: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata; sizes and places are checked by the library, before it reads any."""
    if header > size - 8:
        raise UserError(f"{path}: cut short: {size} bytes, less than its header says; {AGAIN}")
    if header > _LARGEST_HEADER:
        raise UserError(f"{path}: a header of {header} bytes, which weights never need; {AGAIN}")
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        raise UserError(f"{str(path)!a}: a name that is not UTF-8; rename the file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            names = list(file.keys())
            for name in names:
                if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                    raise UserError(
                        f"{path}: tensor {_shown(name)} has dtype {dtype}; convert it to an "
                        f"ordinary float type and save again"
                    )
            tensors = {name: file.get_tensor(name) for name in names}
            extra: dict[str, Any] = dict(file.metadata() or {})
    except (safetensors.SafetensorError, RuntimeError, OverflowError) as error:
        raise damaged(path, f"not a whole safetensors file ({_first_line(error)})") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensors; save the network's state dict")
    return tensors, extra


def _read_torch(
    file: BinaryIO, path: Path, size: int
) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Where the state dict lay, its tensors, and the rest that is plain data."""
    entries = read_directory(file, path)
    if entries[PICKLE].size > LARGEST_PICKLE:
        raise UserError(
            f"{path}: its {PICKLE} has {entries[PICKLE].size} bytes, more than weights need; "
            f"{RESAVE}"
        )
    check_sums(file, path, entries)
    file.seek(entries[PICKLE].start)
    check_pickle(file.read(entries[PICKLE].size), path, entries)
    if "byteorder" in entries:
        file.seek(entries["byteorder"].start)
        if file.read(entries["byteorder"].size) != sys.byteorder.encode():
            raise UserError(f"{path}: saved on a machine of another byte order; {RESAVE}")
    file.seek(0)
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            # not mapped: what is written over the file later would change the weights
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # of many kinds, for a file that is not what it seems
        raise damaged(path, f"torch cannot read it ({_first_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds a {type(content).__name__}, not a state dict; save model.state_dict()"
        )
    kind, tensors = _state_dict(path, content)
    _check_storages(path, tensors, entries)
    used = tensors.keys() if kind == TOP_LEVEL else {kind}
    return kind, tensors, _plain_entries(path, content, used)


def _check_storages(
    path: Path, tensors: Mapping[str, Tensor], entries: Mapping[str, Entry]
) -> None:
    """That torch found the bytes whose checksums were compared: it reads the archive on its own."""
    known = {(entry.size, entry.crc) for entry in entries.values()}
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    for storage in {storage.data_ptr(): storage for storage in storages}.values():
        data = torch.empty(0, dtype=torch.uint8).set_(storage)
        if (storage.nbytes(), zlib.crc32(data.numpy())) not in known:
            raise damaged(path, "torch reads other bytes than those checked before")


def _state_dict(path: Path, content: Mapping[Any, Any]) -> tuple[str, dict[str, Tensor]]:
    """The one state dict in a checkpoint, and where it lay."""
    found = {
        name: content[name]
        for name in NAMES
        if isinstance(content.get(name), dict) and _has_tensor(content[name])
    }
    top = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    # beside a state dict, a lone number is an epoch or a score
    if any(tensor.ndim for tensor in top.values()) or (top and not found):
        found[TOP_LEVEL] = top
    if len(found) > 1:
        places = ", ".join(f"{place} ({len(there)} entries)" for place, there in found.items())
        raise UserError(f"{path}: weights in several places: {places}; save the wanted ones alone")
    if not found:
        there = _listed(content) or "nothing"
        if {"state", "param_groups"} <= content.keys() or "optimizer" in there:
            there += " (the state of an optimiser is no weights)"
        raise UserError(
            f"{path}: no weights at its top level or under {', '.join(NAMES)}, only {there}; save "
            f"model.state_dict()"
        )
    ((place, there),) = found.items()
    for name, value in there.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path}: {place} holds {_shown(name)}, which is a {type(value).__name__} and no "
                f"named tensor; save tensors only"
            )
    return place, {name: tensor.detach() for name, tensor in there.items()}


def _has_tensor(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values.values())


def _listed(content: Mapping[Any, Any]) -> str:
    """The first entries of a checkpoint, for a message."""
    shown = []
    for key, value in itertools.islice(content.items(), 8):
        length = f" of {len(value)}" if isinstance(value, dict | list | tuple) else ""
        shown.append(f"{_shown(key)} ({type(value).__name__}{length})")
    return ", ".join(shown) + ", ..." * (len(content) > len(shown))


def _plain_entries(path: Path, content: Mapping[Any, Any], used: Collection[str]) -> dict[str, Any]:
    """All entries but `used` that are plain data throughout."""
    plain = _Plain(path)
    out = {}
    for key, value in content.items():
        if isinstance(key, str) and key not in used:
            with contextlib.suppress(_NotPlainError):
                out[key] = plain.copy(value)
    return out


class _NotPlainError(Exception):
    """A tensor or storage."""


@dataclass
class _Plain:
    """Copies plain data; a few bytes of pickle can stand for endless nested lists."""

    path: Path
    values: int = 0

    def copy(self, value: Any, depth: int = 0) -> Any:
        self.values += value.size if isinstance(value, np.ndarray) else 1
        if self.values > _MOST_VALUES or depth > _DEEPEST:
            raise UserError(
                f"{self.path}: too much or too deeply nested data beside the weights; {RESAVE}"
            )
        match value:
            case None | bool() | int() | float() | str() | bytes():
                # numpy's float64 is a float, too
                return value.item() if isinstance(value, np.generic) else value
            case np.generic():
                return value.item()
            case np.ndarray():
                return value.tolist()
            case torch.device():
                return str(value)
            case dict():
                return {key: self.copy(item, depth + 1) for key, item in value.items()}
            case list():
                return [self.copy(item, depth + 1) for item in value]
            case tuple():
                return tuple(self.copy(item, depth + 1) for item in value)
        raise _NotPlainError


def _check_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """UserError with the first tensor that has a value that is not finite."""
    seen = set()
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or (view := _view(tensor)) in seen:
            continue
        seen.add(view)
        bad = sum(part.numel() - int(part.isfinite().sum()) for part in _parts(tensor))
        if bad:
            raise UserError(
                f"{path}: tensor {_shown(name)} has {bad} of {tensor.numel()} values that are not "
                f"finite: the training diverged; use an earlier checkpoint"
            )


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The values in views of at most `_PART`, or of one slice."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_PART)
    else:
        longest = max(range(tensor.ndim), key=lambda dim: tensor.shape[dim])
        length = tensor.shape[longest]
        yield from tensor.split(max(1, _PART * length // tensor.numel()), longest)


def _contiguous(tensors: Mapping[str, Tensor], *, copy: bool) -> dict[str, Tensor]:
    """With copies of all or of those that are not; aliases stay aliases."""
    out: dict[str, Tensor] = {}
    copies: dict[Any, Tensor] = {}
    for name, tensor in tensors.items():
        if copy or not tensor.is_contiguous():
            if (view := _view(tensor)) not in copies:
                copies[view] = tensor.clone(memory_format=torch.contiguous_format)
            tensor = copies[view]
        out[name] = tensor
    return out


def _view(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same numbers in memory."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _shown(name: Any) -> str:
    """A name out of a file, on one line and not too long."""
    text = str(name)
    if len(text) <= 80 and text.isprintable():
        return text
    return f"{text[:80]!a}" + "..." * (len(text) > 80)


def _first_line(error: BaseException) -> str:
    return _shown((str(error) or type(error).__name__).splitlines()[0])
