"""Which tile a convolution kernel uses: a small measured table, and a rule for what it lacks.

`tiles.toml` holds one entry per (kernel, chip, bits, k, n, width), written by
`python -m sparsemae.bench tune`; nothing is tuned while a program runs. The rule serves every
other shape and chip: it is right everywhere and fast for multiples of 8 channels.
"""

import contextlib
import math
import tomllib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from importlib.resources import files

import torch
import triton
from torch import Tensor

from sparsemae.kernels.launch import chip_of

Triple = tuple[int, int, int]
Key = tuple[str, str, int, int, int, int]
PROGRAMS = 264  # wanted at least: two for each multiprocessor of an H100 or H200
LONGEST = 2**31 - 1  # rows are counted in int32, addresses in int64


@dataclass(frozen=True)
class Tile:
    """Sizes of one program's work; see the kernels for what they mean."""

    rows: int
    cols: int
    depth: int
    taps: int = 1
    groups: int = 1
    splits: int = 1
    planes: int = 0  # of a march along the first axis; 0: all
    resident: bool = False  # weights of all taps stay in shared memory
    warps: int = 4
    stages: int = 1


def read(text: str) -> dict[Key, Tile]:
    """The entries of a table in TOML."""
    entries = {}
    for entry in tomllib.loads(text).get("tile", []):
        key = tuple(entry.pop(name) for name in ("kernel", "chip", "bits", "k", "n", "width"))
        entries[key] = Tile(**entry)
    return entries


SHIPPED = read(files("sparsemae.kernels").joinpath("tiles.toml").read_text())
_table: ContextVar[dict[Key, Tile]] = ContextVar("table", default=SHIPPED)


@contextlib.contextmanager
def using(entries: dict[Key, Tile]) -> Iterator[None]:
    """Let `entries` override the shipped table, for the tuner and for tests."""
    token = _table.set(SHIPPED | entries)
    try:
        yield
    finally:
        _table.reset(token)


def tile(kernel: str, x: Tensor, *, k: int, n: int, width: int, rows: int, taps: int) -> Tile:
    """The tile of `kernel` for k input and n output channels, blocks `width` wide, and `rows` rows.

    Raises:
        ValueError: More rows than the kernels can count.
    """
    if rows > LONGEST:
        raise ValueError(f"{rows} voxels in one call: the kernels count to {LONGEST}; split it")
    bits = 8 * x.element_size()
    found = _table.get().get((kernel, chip_of(x), bits, k, n, width))
    if found is None:
        found = RULES[kernel](chip_of(x), bits, k, n, taps)
    return _split(kernel, found, k, n, rows, taps)


def precision(x: Tensor) -> str:
    """How float32 products are computed: as cuDNN's convolutions, see torch.backends.cudnn."""
    conv = torch.backends.cudnn.conv
    return "tf32" if x.dtype == torch.float32 and conv.fp32_precision == "tf32" else "ieee"


def power_of_2(n: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(n)))


def _gather(chip: str, bits: int, k: int, n: int, taps: int) -> Tile:
    cols = power_of_2(n, 16, 128 if bits == 16 else 64)
    if k < 16 and taps > 1:
        depth = triton.next_power_of_2(k)
        return Tile(128, min(cols, 64), depth, taps=max(1, 32 // depth), warps=4)
    depth = power_of_2(k, 16, 64 if bits == 16 else 32)
    return Tile(128, cols, depth, warps=8 if cols == 128 else 4, stages=3)


RULES = {"gather": _gather}


def _split(kernel: str, found: Tile, k: int, n: int, rows: int, taps: int) -> Tile:
    """Spread the sum over programs where there are too few of them."""
    programs = math.ceil(rows / found.rows) * math.ceil(n / found.cols)
    steps = math.ceil(taps / found.taps) * math.ceil(k / found.depth)
    splits = 1
    while programs * splits < PROGRAMS // 2 and splits * 8 <= steps and splits < 16:
        splits *= 2
    return replace(found, splits=splits)
