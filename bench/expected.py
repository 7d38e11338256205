"""How long a kernel should take, from the operations and bytes it cannot avoid: a roofline.

Four times, of which the largest is the prediction: the products at the rate of a large matrix
product; device memory, every input once and every result once; the L2 cache, where a program reads
its tile of 256 rows with its halo once (`l2`), or every tap anew in tiles of 128 rows (`l2_taps`,
what a plain gather does; it bounds from above and is not part of the prediction). Columns of a
result come in tiles of up to 128 that divide the channels; each re-reads its rows, and every tile
of rows re-reads the weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsemae.bench.cases import POINT, Problem, work
from sparsemae.bench.timing import Ceilings
from sparsemae.triples import Triple

WIDEST = 128  # columns of a tile
BRICK, SLAB = 256, 128  # rows of a tile that keeps its halo, of one that gathers


@dataclass(frozen=True)
class Expected:
    """Milliseconds."""

    tensor: float
    memory: float
    l2: float
    l2_taps: float

    @property
    def ms(self) -> float:
        return max(self.tensor, self.memory, self.l2)

    @property
    def bound(self) -> str:
        """What the prediction is limited by."""
        limits = {"products": self.tensor, "memory": self.memory, "L2": self.l2}
        return max(limits, key=lambda name: limits[name])


def expected(
    problem: Problem, operator: str, ceilings: Ceilings, *, dense: bool = False
) -> Expected:
    """Of an operator on the visible voxels; on all of them if `dense`, whose L2 traffic is not
    counted: cuDNN's kernels are not ours to model."""
    counted = work(problem, operator, dense=dense)
    tensor = counted.flops / ceilings.tflops / 1e9
    memory = counted.bytes / ceilings.gbps / 1e6
    once = taps = 0.0
    if ceilings.l2_gbps and counted.flops and not dense:
        once, taps = (b / ceilings.l2_gbps / 1e6 for b in _l2_bytes(problem, operator))
    return Expected(tensor, memory, min(once, taps), taps)


def _l2_bytes(problem: Problem, operator: str) -> tuple[float, float]:
    """Bytes read from L2: with the halo once, and with every tap anew."""
    layer = problem.layer
    size = 2 if problem.dtype != "float32" else 4
    if operator == "layer-bwd":
        parts = [_l2_bytes(problem, part) for part in ("dgrad", "wgrad")]
        return tuple(map(sum, zip(*parts, strict=True)))
    # fwd reads x and writes y; dgrad reads the gradient of y and writes that of x
    k, n = (layer.co, layer.ci) if operator == "dgrad" else (layer.ci, layer.co)
    x_rows = problem.rows(problem.in_block, dense=False)
    y_rows = problem.rows(problem.out_block, dense=False)
    columns = math.ceil(n / _tile(n))
    per_tap = layer.taps * size * k * y_rows * columns  # over all parities of a strided dgrad, too
    weight = size * layer.taps * k * n
    if operator == "dgrad":  # voxels of one parity, position modulo stride, share their taps
        parities = math.prod(layer.stride)
        near = [math.ceil(t / s) for t, s in zip(layer.kernel, layer.stride, strict=True)]
        once = size * k * y_rows * columns * parities * _halo(problem.out_block, near, POINT)
        share = weight / parities
        return once + share * math.ceil(x_rows / BRICK), per_tap + share * math.ceil(x_rows / SLAB)
    once = size * k * x_rows * columns * _halo(problem.out_block, layer.kernel, layer.stride)
    if operator == "wgrad":  # no weights to read; the other operand once, or once per tap
        dy = size * n * y_rows * math.ceil(k / _tile(k))
        return once + dy, per_tap + layer.taps * dy
    return once + weight * math.ceil(y_rows / BRICK), per_tap + weight * math.ceil(y_rows / SLAB)


def _tile(channels: int) -> int:
    """The largest power of two that divides the channels, at most WIDEST; 320 has 5 tiles of 64."""
    return min(WIDEST, channels & -channels)


def _halo(block: Triple, kernel: Sequence[int], stride: Triple) -> float:
    """Voxels a tile of results reads, per voxel it covers; a tile is a block, or 4x8x8 of it."""
    wide = math.prod(block) > BRICK
    tile = [min(b, t) for b, t in zip(block, (4, 8, 8), strict=True)] if wide else block
    own = [t * s for t, s in zip(tile, stride, strict=True)]
    grown = [o + max(0, k - s) for o, k, s in zip(own, kernel, stride, strict=True)]
    return math.prod(grown) / math.prod(own)
