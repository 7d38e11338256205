"""The pickle in a torch file, followed step by step without calling anything it asks for.

A pickle is a program. This one is run here on placeholders first: only the instructions that
`torch.save` writes, only the few functions that plain data, tensors and numpy's numbers need, only
with arguments that fit the entries of the file. What passes can neither run code nor allocate more
than the file holds, so `torch.load` may have it, with `weights_only=True` and `SAFE_GLOBALS`.
"""

import math
import pickletools
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sparsemae.errors import UserError
from sparsemae.weights_zip import PICKLE, Entry, damaged

LARGEST_PICKLE = 2**24  # bytes: 1000 epochs of Dice of 100 classes take 6 MB
MOST_STEPS = 2**22
MOST_TENSORS = 2**16
_MOST_DIMS = 16
RESAVE = (
    "if you trust it, save its weights as safetensors: safetensors.torch.save_file({k: "
    "v.contiguous().clone() for k, v in model.state_dict().items()}, 'weights.safetensors')"
)

_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_MULTIARRAY = ("numpy._core.multiarray", "numpy.core.multiarray")  # of numpy 2, of numpy 1
SAFE_GLOBALS: list[Any] = [
    np.dtype,
    np.ndarray,
    *[(np.float64().__reduce__()[0], f"{module}.scalar") for module in _MULTIARRAY],
    *[(np.zeros(0).__reduce__()[0], f"{module}._reconstruct") for module in _MULTIARRAY],
    *[type(np.dtype(code)) for code in _NUMBERS],
]
_STORAGES = {  # bytes of an element
    "DoubleStorage": 8,
    "FloatStorage": 4,
    "HalfStorage": 2,
    "BFloat16Storage": 2,
    "LongStorage": 8,
    "IntStorage": 4,
    "ShortStorage": 2,
    "CharStorage": 1,
    "ByteStorage": 1,
    "BoolStorage": 1,
}
_FUNCTIONS = {
    "collections OrderedDict",
    "_codecs encode",
    "torch device",
    "torch Size",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "numpy dtype",
    "numpy ndarray",
    *[f"{module} {name}" for module in _MULTIARRAY for name in ("scalar", "_reconstruct")],
}
_KINDS = {  # of tensors that are no plain weights, by the end of a global's name
    "_rebuild_qtensor": "quantized",
    "_rebuild_sparse_tensor": "sparse",
    "_rebuild_nested_tensor": "nested",
    "_rebuild_tensor_v3": "float8 or unsigned",
    "_rebuild_meta_tensor_no_storage": "empty (meta)",
    "ComplexFloatStorage": "complex",
    "ComplexDoubleStorage": "complex",
}
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Global:
    name: str  # module, a space, name


@dataclass(frozen=True)
class _Storage:
    key: str
    kind: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """Or a parameter."""


@dataclass(frozen=True)
class _Dtype:
    """Of numpy."""

    itemsize: int  # bytes


@dataclass(frozen=True)
class _Array:
    """Of numpy; its shape and bytes follow in a second step."""


@dataclass(frozen=True)
class _Opaque:
    """A number of numpy's, or a device."""


class _Ordered(dict[Any, Any]):
    """An `OrderedDict`, which may carry the versions of a network's modules."""


def check_pickle(data: bytes, path: Path, entries: dict[str, Entry]) -> None:
    """Refuse the pickle of the torch file `path` unless it builds plain data and tensors only.

    Memory: some tens of bytes for each of at most `MOST_STEPS` instructions.

    Raises:
        UserError: It asks for anything else, or for more than `entries` hold.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in the names of a damaged pickle
            _Run(path, entries).follow(data)
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, OverflowError, UnicodeError):
        raise damaged(path, f"{PICKLE} is not what torch writes") from None


@dataclass
class _Run:
    """One walk through a pickle, with the state of the machine that would run it."""

    path: Path
    entries: dict[str, Entry]
    stack: list[Any] = field(default_factory=list)
    outer: list[list[Any]] = field(default_factory=list)  # stacks below the open marks
    memo: dict[int, Any] = field(default_factory=dict)
    storages: dict[str, _Storage] = field(default_factory=dict)
    copies: set[tuple[Any, ...]] = field(default_factory=set)  # views that are not contiguous
    copied: int = 0  # bytes these take when copied
    tensors: int = 0

    def follow(self, data: bytes) -> None:
        for step, (code, argument, _) in enumerate(pickletools.genops(data)):
            if step >= MOST_STEPS:
                raise self.refused(f"its {PICKLE} has more than {MOST_STEPS} steps")
            self.step(code.name, argument)

    def step(self, name: str, argument: Any) -> None:
        push, pop = self.stack.append, self.stack.pop
        match name:
            case "PROTO" if argument == 2:
                pass
            case "PROTO":
                raise self.refused("it was saved with another pickle protocol than torch's own, 2")
            case "STOP":
                pop()
            case "MARK":
                self.outer.append(self.stack)
                self.stack = []
            case "NONE":
                push(None)
            case "NEWTRUE":
                push(True)
            case "NEWFALSE":
                push(False)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                push(argument)
            case "EMPTY_DICT":
                push({})
            case "EMPTY_LIST":
                push([])
            case "EMPTY_TUPLE":
                push(())
            case "TUPLE":
                items = tuple(self.pop_mark())
                self.stack.append(items)
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(name[-1]))]
                push(tuple(reversed(items)))
            case "APPEND":
                item = pop()
                self.top(list).append(item)
            case "APPENDS":
                items = self.pop_mark()
                self.top(list).extend(items)
            case "SETITEM":
                value, key = pop(), pop()
                self.set_items([key, value])
            case "SETITEMS":
                self.set_items(self.pop_mark())
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "GLOBAL":
                push(self.named(argument))
            case "REDUCE":
                arguments, function = pop(), pop()
                push(self.call(_of(function, _Global).name, _of(arguments, tuple)))
            case "BUILD":
                state = pop()
                self.build(self.stack[-1], state)
            case "BINPERSID":
                push(self.storage(*_of(pop(), tuple)))
            case _:
                raise self.refused(f"its {PICKLE} has an instruction {name} torch does not write")

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def top(self, kind: type[_T]) -> _T:
        return _of(self.stack[-1], kind)

    def set_items(self, items: list[Any]) -> None:
        """Keys are names or small numbers: nothing that takes long to hash, or to tell apart."""
        target = self.stack[-1]
        _need(type(target) in (dict, _Ordered) and len(items) % 2 == 0)
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, bool, type(None)) and not _is_size(key, below=2**32):
                raise self.refused("it has a dict whose keys are neither names nor numbers")
            target[key] = value

    def named(self, name: str) -> _Global:
        module, _, last = name.partition(" ")
        if name in _FUNCTIONS or (module == "torch" and last in _STORAGES):
            return _Global(name)
        if module.partition(".")[0] == "torch":
            kind = "quantized" if last.startswith(("QInt", "QUInt")) else _KINDS.get(last)
            if kind is not None:
                raise UserError(
                    f"{self.path}: holds {kind} tensors; convert them to ordinary float tensors "
                    f"where they were made, and save again"
                )
        shown = f"{module}.{last}"
        shown = shown if len(shown) <= 80 and shown.isprintable() else f"{shown[:80]!a}..."
        raise self.refused(f"its pickle asks for {shown}, and might run code by it")

    def call(self, function: str, args: tuple[Any, ...]) -> Any:
        """What the function would return, or a placeholder for it."""
        match function.split(" ")[1], args:
            case "OrderedDict", ():
                return _Ordered()
            case "encode", (str(text), "latin1"):
                return text.encode("latin1")
            case "device", (str(_),) | (str(_), int(_)):
                return _Opaque()
            case "Size", (tuple(size),):
                return tuple(_of(length, int) for length in size)
            case "_rebuild_tensor_v2", (
                _Storage() as storage,
                start,
                tuple(size),
                tuple(stride),
                *more,
            ):
                _need(len(more) == 2 or (len(more) == 3 and more[2] in (None, {})))
                _need(type(more[0]) is bool and type(more[1]) is _Ordered and not more[1])
                return self.tensor(storage, start, size, stride)
            case "_rebuild_parameter", (_Tensor() as tensor, bool(_), _Ordered() as hooks):
                _need(not hooks)
                return tensor
            case "dtype", (str(code), False, True):
                _need(code in _NUMBERS)
                return _Dtype(int(code[1:]))
            case "scalar", (_Dtype() as dtype, bytes(data)):
                _need(len(data) == dtype.itemsize)
                return _Opaque()
            case "_reconstruct", (_Global("numpy ndarray"), (0,), b"b"):
                return _Array()
        raise ValueError(function)

    def build(self, target: Any, state: Any) -> None:
        """The second step of making an object."""
        match target, state:
            case _Ordered(), dict():
                _need(set(state) == {"_metadata"})
            case _Dtype(), (3, "<" | ">" | "|" | "=", None, None, None, -1, -1, 0):
                pass
            case _Array(), (1, tuple(shape), _Dtype() as dtype, bool(_), bytes(data)):
                _need(all(_is_size(length) for length in shape))
                _need(len(shape) <= _MOST_DIMS)
                _need(len(data) == math.prod(shape) * dtype.itemsize)
            case _:
                raise ValueError(type(target))

    def storage(self, label: Any, kind: Any, key: Any, location: Any, numel: Any) -> _Storage:
        """The entry of the file that holds the numbers of tensors."""
        _need(label == "storage" and type(key) is str and type(location) is str and _is_size(numel))
        kind = _of(kind, _Global).name.partition(" ")[2]
        found = self.storages.setdefault(key, _Storage(key, kind, numel))
        entry = self.entries.get(f"data/{key}")
        if entry is None or entry.size != numel * _STORAGES[kind]:
            shown = f"data/{key[:80]}"
            raise damaged(self.path, f"zip entry {shown!a} is missing or of another size")
        _need(found == _Storage(key, kind, numel))
        return found

    def tensor(self, storage: _Storage, start: Any, size: Any, stride: Any) -> _Tensor:
        """A view of a storage, which must hold it."""
        _need(all(_is_size(n) for n in (start, *size, *stride)) and len(size) == len(stride))
        _need(len(size) <= _MOST_DIMS)
        self.tensors += 1
        if self.tensors > MOST_TENSORS:
            raise self.refused(f"it has more than {MOST_TENSORS} tensors")
        itemsize, numel = _STORAGES[storage.kind], math.prod(size)
        if numel == 0:
            return _Tensor()
        end = start + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
        if end > storage.numel:
            raise damaged(self.path, f"a tensor of shape {size} is larger than its zip entry")
        view = (storage.key, start, size, stride)
        if not _is_contiguous(size, stride) and view not in self.copies:
            self.copies.add(view)
            self.copied += numel * itemsize
            room = sum(entry.size for entry in self.entries.values())
            if self.copied > room:
                raise UserError(
                    f"{self.path}: a tensor of shape {size} repeats values of the file until they "
                    f"are more than its {room} bytes; save contiguous tensors"
                )
        return _Tensor()

    def refused(self, problem: str) -> UserError:
        return UserError(f"{self.path}: refused: {problem}; {RESAVE}")


def _is_contiguous(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _is_size(value: Any, below: int = 2**62) -> bool:
    return type(value) is int and 0 <= value < below


def _of(value: Any, kind: type[_T]) -> _T:
    _need(type(value) is kind)
    return value


def _need(condition: bool) -> None:
    """What torch's own files fulfil; the caller of all this says that this one is not such."""
    if not condition:
        raise ValueError
