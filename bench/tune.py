"""Find the fastest tiles of an encoder's convolutions on this GPU and write them into the table.

For every distinct kernel shape the tile in use is timed against candidates in turn; a candidate
that computes something else, or does not fit the chip, is left out. One that is clearly faster
becomes an entry of `kernels/tiles.toml`. Nothing else in the package ever tunes.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import tomli_w
import torch
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from sparsemae.bench.cases import DTYPES, Problem, Selection, problems
from sparsemae.bench.timing import time_operators
from sparsemae.kernels import tiles, triton_conv
from sparsemae.kernels.launch import chip_of
from sparsemae.kernels.tiles import Key, Tile

CLEARLY = 1.03  # how many times faster than the tile in use
HEADER = (
    "# Tiles that differ from the rule in tiles.py, written by `python -m sparsemae.bench tune`.\n"
)
SHIPPED = Path(tiles.__file__).with_name("tiles.toml")
NO_MARCH = Tile(0, 0, 0)  # an entry that leaves a shape to the gather


@dataclass(frozen=True)
class Target:
    """One kernel shape and a way to run it."""

    key: Key
    run: Callable[[], tuple[Tensor, ...]]
    name: str


@dataclass(frozen=True)
class Outcome:
    """The best candidate of a target: None where the tile in use stays."""

    target: Target
    ms: float
    best_ms: float
    tile: Tile | None
    tried: int


def targets(selection: Selection, device: torch.device) -> Iterator[Target]:
    """The distinct kernel shapes of forward, input and weight gradient of all convolutions."""
    seen: set[Key] = set()
    for problem in problems(selection):
        if problem.kind != "conv" or not set(problem.layer.kernel) <= {1, 3}:
            continue
        for target in _targets(problem, device):
            if target.key not in seen:
                seen.add(target.key)
                yield target


def _targets(problem: Problem, device: torch.device) -> Iterator[Target]:
    layer, mask, dtype = problem.layer, problem.mask().to(device), DTYPES[problem.dtype]
    x = torch.randn(len(mask), *problem.in_block, layer.ci, device=device).to(dtype)
    dy = torch.randn(len(mask), *problem.out_block, layer.co, device=device).to(dtype)
    weight = torch.randn(layer.taps, layer.ci, layer.co, device=device).to(dtype)
    kernel, stride, cells = layer.kernel, layer.stride, mask.neighbors
    padding = tuple(k // 2 for k in kernel)
    chip, bits = chip_of(x), 8 * x.element_size()
    out, into = problem.out_block[2], problem.in_block[2]

    def forward():
        return triton_conv._forward(x, cells, weight, None, kernel, stride, False)[:1]

    def input_grad():
        return (triton_conv._input_grad(dy, cells, weight, kernel, stride),)

    def weight_grad():
        return triton_conv._weight_grad(x, cells, dy, kernel, stride, padding, True)

    unit = stride == (1, 1, 1)
    for run, k, n, width in (
        (forward, layer.ci, layer.co, out),
        (input_grad, layer.co, layer.ci, into if unit else out),
    ):
        name = f"{problem.name} {run.__name__}"
        if run is input_grad and not unit:
            yield Target(("spread", chip, bits, k, n, width), run, name)
            continue
        march = ("march", chip, bits, k, n, width)
        yield Target(("gather", *march[1:]), _with(run, march, NO_MARCH), name)
        if unit and kernel == (3, 3, 3):  # after the gather it has to beat
            yield Target(march, run, name)
    key = ("wgrad", chip, bits, layer.ci, layer.co, out)
    yield Target(key, weight_grad, f"{problem.name} weight_grad")


def _with(run: Callable, key: Key, form: Tile) -> Callable:
    """`run` with another entry in the table."""

    def changed():
        with tiles.using({key: form}):
            return run()

    return changed


def candidates(key: Key) -> list[Tile]:
    """Tiles worth trying, likely ones first."""
    kernel, _, bits, k, n, _ = key
    wide, deep = tiles.power_of_2(n, 16, 128), tiles.power_of_2(k, 16, 64 if bits == 16 else 32)
    columns = [c for c in (wide, wide // 2, wide // 4) if c >= 16]
    match kernel:
        case "march":
            found = [
                Tile(rows, cols, deep, warps=warps, stages=stages)
                for rows, cols, warps, stages in itertools.product(
                    (128, 64, 256), columns, (4, 8), (2, 1, 3)
                )
                if rows * cols // warps <= 2048
            ]
            resident = [
                Tile(rows, cols, tiles.power_of_2(k, 16, 64), warps=warps, resident=True)
                for rows, cols, warps in itertools.product((64, 128), columns, (4, 8))
                if k <= 64 and rows * cols // warps <= 1024
            ]
            return [NO_MARCH, *resident, *found]
        case "wgrad":
            depths = [d for d in (128, 64, 32, 16) if d <= tiles.power_of_2(k, 16, 128)]
            return [
                Tile(rows, cols, depth, taps=taps, groups=groups, warps=warps, stages=stages)
                for depth, cols, taps, groups, warps, rows, stages in itertools.product(
                    depths, columns, (1, 2, 4), (1, 2, 3, 4, 7, 9), (8, 4), (64, 32), (1, 3)
                )
                if 64 <= depth * taps <= 256 and depth * taps * cols * groups <= 4096 * warps
            ]
        case _:
            return [
                Tile(rows, cols, depth, warps=warps, stages=stages)
                for rows, cols, depth, warps, stages in itertools.product(
                    (128, 64, 256), columns, {deep, max(16, deep // 2)}, (4, 8), (3, 4, 2)
                )
                if rows * cols // warps <= 4096
            ]


def tune(
    target: Target,
    device: torch.device,
    seconds: float,
    *,
    timer: Callable = time_operators,
    pool: Callable[[Key], list[Tile]] = candidates,
) -> Outcome:
    """Time the candidates of one target against the tile in use, in turn."""
    expected = target.run()
    runs = {None: target.run}
    for form in pool(target.key):
        run = _with(target.run, target.key, form)
        if _agrees(run, expected):
            runs[form] = run
    timings = timer(runs, device, seconds)
    ms = timings[None].ms
    best = min(runs, key=lambda form: timings[form].ms)
    if ms < CLEARLY * timings[best].ms:
        best = None
    return Outcome(target, ms, timings[best].ms, best, len(runs) - 1)


def _agrees(run: Callable, expected: tuple[Tensor, ...]) -> bool:
    """Whether a candidate runs here and computes the same, up to the order of its sums."""
    try:
        found = run()
    except (OutOfResources, CompilationError, PTXASError):  # too large for this chip
        return False
    for value, truth in zip(found, expected, strict=True):
        allowed = 0.02 if truth.dtype != torch.float32 else 2e-3
        if not (value - truth).abs().max() <= allowed * truth.abs().max():
            return False
    return True


def tune_all(
    selection: Selection,
    device: torch.device,
    seconds: float,
    budget: float,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
    **options,
) -> list[Outcome]:
    """Tune target after target until `budget` seconds are spent; later ones use earlier finds."""
    end, outcomes = time.monotonic() + budget, []
    for target in targets(selection, device):
        if time.monotonic() > end:
            break
        with tiles.using({o.target.key: o.tile for o in outcomes if o.tile is not None}):
            outcomes.append(tune(target, device, seconds, **options))
        on_outcome(outcomes[-1])
    return outcomes


def merge(path: Path, outcomes: list[Outcome]) -> int:
    """Write what was found into a table, in place of its entries for the same shapes.

    Returns:
        How many entries were added or changed.
    """
    entries = tiles.read(path.read_text()) if path.exists() else {}
    found = {o.target.key: o.tile for o in outcomes if o.tile is not None}
    entries |= found
    rows = []
    for key, form in sorted(entries.items()):
        named = dict(zip(tiles.KEY, key, strict=True))
        usual = {f.name: f.default for f in fields(Tile)}
        rows.append(named | {k: v for k, v in asdict(form).items() if v != usual[k]})
    text = HEADER + "\n" + tomli_w.dumps({"tile": rows})
    assert tiles.read(text) == entries
    path.write_text(text)
    return len(found)
