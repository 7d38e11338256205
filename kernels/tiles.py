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

import triton
from torch import Tensor

from sparsemae.kernels.launch import chip_of

Triple = tuple[int, int, int]
Key = tuple[str, str, int, int, int, int]
KEY = ("kernel", "chip", "bits", "k", "n", "width")
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
        key = tuple(entry.pop(name) for name in KEY)
        entries[key] = Tile(**entry)
    return entries


SHIPPED = read(files("sparsemae.kernels").joinpath("tiles.toml").read_text())
_table: ContextVar[dict[Key, Tile]] = ContextVar("table", default=SHIPPED)


@contextlib.contextmanager
def using(entries: dict[Key, Tile]) -> Iterator[None]:
    """Let `entries` override the table, for the tuner and for tests."""
    token = _table.set(_table.get() | entries)
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
        raise ValueError(_too_many(rows))
    bits = 8 * x.element_size()
    found = _table.get().get((kernel, chip_of(x), bits, k, n, width))
    if found is None:
        found = RULES[kernel](chip_of(x), bits, k, n, taps)
    return _split(kernel, found, k, n, rows, taps)


def power_of_2(n: int, least: int, most: int) -> int:
    return min(most, max(least, triton.next_power_of_2(n)))


def march_tile(x: Tensor, *, k: int, n: int, block: Triple) -> Tile | None:
    """The tile of a plane march, or None where gathering is the better form: an entry of 0 rows.

    Wide channels make a convolution compute-bound, and small blocks have more halo than voxels.
    """
    chip, bits = chip_of(x), 8 * x.element_size()
    rows = x.shape[0] * math.prod(block)
    if rows > LONGEST:
        raise ValueError(_too_many(rows))
    found = _table.get().get(("march", chip, bits, k, n, block[2]))
    if found is None and min(block) >= 4 and min(k, n) >= 16 and max(k, n) <= 64:
        found = _march(chip, bits, k, n)
    if found is None or not found.rows or (found.planes and block[0] % found.planes):
        return None
    return found


def _rows(chip: str) -> int:
    """Rows of a tile: registers hold more results where tensor cores read from shared memory."""
    return 128 if chip in ("sm_90", "sm_100", "sm_103") else 64


def _march(chip: str, bits: int, k: int, n: int) -> Tile:
    rows, cols = _rows(chip), power_of_2(n, 16, 64)
    if rows == 64:
        return Tile(rows, min(cols, 32), power_of_2(k, 16, 32), stages=1 if bits == 16 else 3)
    if bits == 16 and k <= 32 and n <= 32:
        return Tile(64, cols, power_of_2(k, 16, 32), resident=True)
    depth = power_of_2(k, 16, 64 if bits == 16 and chip == "sm_90" else 32)
    return Tile(rows, cols, depth, warps=8 if cols * depth >= 2048 else 4, stages=2)


def _gather(chip: str, bits: int, k: int, n: int, taps: int) -> Tile:
    rows, cols = _rows(chip), power_of_2(n, 16, 128 if bits == 16 else 64)
    if k <= 8 and taps > 1:
        depth = triton.next_power_of_2(k)
        return Tile(rows, min(cols, 64), depth, taps=32 // depth)
    depth = power_of_2(k, 16, 64 if bits == 16 and rows == 128 else 32)
    stages = 2 if bits == 32 and chip == "sm_100" else 3
    return Tile(rows, cols, depth, warps=8 if rows * cols >= 16384 else 4, stages=stages)


def _mean(chip: str, bits: int, k: int, n: int, taps: int) -> Tile:
    """Loads of all taps are in flight at once: no need to pipeline steps, nor registers to."""
    deepest = (64 if bits == 16 else 32) * _rows(chip) // 128
    return Tile(64, power_of_2(n, 16, 64), power_of_2(k, 16, deepest))


def _spread(chip: str, bits: int, k: int, n: int, taps: int) -> Tile:
    rows = _rows(chip)
    depth = power_of_2(k, 16, 64 if bits == 16 and rows == 128 else 32)
    warps = 8 if chip == "sm_100" else 4
    return Tile(rows, power_of_2(n, 16, 64), depth, warps=warps, stages=3)


def _wgrad(chip: str, bits: int, k: int, n: int, taps: int) -> Tile:
    """Taps side by side until they fill a tensor core's 64 rows; then as many groups as fit."""
    wide = bits == 16 and _rows(chip) == 128
    depth, cols = power_of_2(k, 1, 128 if wide else 64), power_of_2(n, 16, 64)
    # 64 rows, but for float32 of few channels: Triton 3.7 does not compile that for sm_100
    side = max(1, (64 if bits == 16 or depth >= 16 else 32) // depth)
    tile_size = side * depth * cols
    held, warps = (16384, 4) if wide else (8192, 4)
    if wide and tile_size >= 8192:
        held, warps = 24576, 8
    most = max(1, min(7, held // tile_size))
    if depth < 16:  # addresses of single channels fill the registers
        most = min(most, 2)
    simple = bits == 32 and chip == "sm_100"  # anything longer spills there
    if simple:
        most, warps = 1, 8
    products = math.ceil(taps / side)
    groups = math.ceil(products / math.ceil(products / most))  # programs of equal work
    rows, stages = 64 if wide and depth >= 16 else 32, 3 if groups == 1 and not simple else 1
    return Tile(rows, cols, depth, taps=side, groups=groups, warps=warps, stages=stages)


RULES = {"gather": _gather, "mean": _mean, "spread": _spread, "wgrad": _wgrad}


def _split(kernel: str, found: Tile, k: int, n: int, rows: int, taps: int) -> Tile:
    """Divide a long sum among programs where the results alone make too few of them."""
    columns = math.ceil(n / found.cols)
    steps = math.ceil(taps / (found.taps * found.groups)) * math.ceil(k / found.depth)
    if kernel == "wgrad":  # the sum runs over strips of rows
        most = max(1, rows // (4 * found.rows))
        return replace(found, splits=min(most, math.ceil(PROGRAMS / (steps * columns))))
    if kernel == "spread":
        return found
    programs, splits = math.ceil(rows / found.rows) * columns, 1
    while programs * splits < PROGRAMS // 2 and splits * 8 <= steps and splits < 16:
        splits *= 2
    return replace(found, splits=splits)


def _too_many(rows: int) -> str:
    return f"{rows} voxels in one call: the kernels count to {LONGEST}; split the batch"
