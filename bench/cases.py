"""What the kernel benchmark measures: each layer of a ResEnc-L encoder, and the work it counts.

A problem is one layer with its input, checked once; its operators are the passes that are timed.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sparsemae.errors import UserError
from sparsemae.kernels import BlockMask
from sparsemae.models.masking import check_grid, stage_blocks
from sparsemae.models.topology import PRESETS, Topology
from sparsemae.triples import Triple

POINT, HALF = (1, 1, 1), (2, 2, 2)
# what is computed -> its operators, and which inputs' gradients each takes; nothing: forward
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "conv": {"fwd": (), "dgrad": ("x",), "wgrad": ("weight", "bias")},
    "layer": {"layer": (), "layer-bwd": ("x", "weight", "bias", "scale", "shift")},
    "norm": {"norm": (), "norm-bwd": ("x", "scale", "shift")},
    "pool": {"pool": (), "pool-bwd": ("x",)},
    "densify": {"densify": (), "densify-bwd": ("x", "token")},
}
OPERATORS = tuple(operator for operators in KINDS.values() for operator in operators)
DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}


@dataclass(frozen=True)
class Layer:
    """A convolution of the encoder; `count` such layers are in one pass."""

    name: str
    stage: int  # of its result
    ci: int
    co: int
    kernel: Triple
    stride: Triple
    count: int
    bias: bool = True

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)


@dataclass(frozen=True)
class Problem:
    """A layer, norm, pool or densification on one random input."""

    kind: str
    layer: Layer
    cell: int
    patch: int
    batch: int
    mask_ratio: float
    out_block: Triple  # voxels per cell of the layer's result
    dtype: str

    @property
    def name(self) -> str:
        return (
            f"{self.layer.name} {self.patch}^3 cell {self.cell} batch {self.batch} "
            f"{self.mask_ratio:.0%}"
        )

    @property
    def in_block(self) -> Triple:
        strides = self.layer.stride
        return tuple(b * s for b, s in zip(self.out_block, strides, strict=True))

    @property
    def grid(self) -> Triple:
        return (self.patch // self.cell,) * 3

    def mask(self) -> BlockMask:
        """On the CPU, the same for every backend."""
        generator = torch.Generator().manual_seed(0)
        return BlockMask.random(self.batch, self.grid, self.mask_ratio, generator=generator)

    def rows(self, block: Triple, *, dense: bool) -> int:
        """Voxels of the batch where a cell is `block` wide: the visible ones, or all."""
        total = math.prod(self.grid)
        cells = total if dense else total - round(total * self.mask_ratio)
        return self.batch * cells * math.prod(block)


@dataclass(frozen=True)
class Work:
    """What must be done at least: every input read once, every result written once."""

    flops: int
    bytes: int


def work(problem: Problem, operator: str, *, dense: bool) -> Work:
    """Of an operator on the visible voxels, or on all.

    A tap counts as present at every voxel, at borders too: 2 * rows of the result * taps * Ci * Co
    operations for a convolution, and as many for each of its gradients.
    """
    layer = problem.layer
    size = 2 if problem.dtype != "float32" else 4
    rows_in = problem.rows(problem.in_block, dense=dense)
    rows_out = problem.rows(problem.out_block, dense=dense)
    x, y = size * rows_in * layer.ci, size * rows_out * layer.co
    weight = size * layer.taps * layer.ci * layer.co
    convolve = 2 * rows_out * layer.taps * layer.ci * layer.co
    voxels = size * problem.rows(problem.out_block, dense=True) * layer.co
    match operator:
        case "fwd" | "dgrad" | "wgrad":
            return Work(convolve, x + weight + y)
        case "layer":
            return Work(convolve, x + weight + y)
        case "layer-bwd":  # x, the result and its gradient in; the gradient of x out
            return Work(2 * convolve, 2 * (x + weight + y))
        case "norm":
            return Work(0, 2 * y)
        case "norm-bwd":
            return Work(0, 3 * y)
        case "pool" | "pool-bwd":
            return Work(0, y + y // 8)
        case "densify" | "densify-bwd":
            return Work(0, y + voxels)
    raise ValueError(f"unknown operator {operator!r}")


def topology_of(preset: str) -> Topology:
    """Raises a UserError for a preset that does not exist."""
    if preset not in PRESETS:
        raise UserError(f"--preset {preset}: choose from {', '.join(PRESETS)}")
    return Topology.parse(**PRESETS[preset], kernel_sizes=3, n_conv_per_stage_decoder=1)


def layers(topology: Topology) -> tuple[Layer, ...]:
    """The distinct convolutions of an encoder, in the order they run.

    `stem`; then per stage `down` (the first, strided one), `skip` (the 1x1x1 of its shortcut) and
    `stage` (all others).
    """
    width = topology.features[0]
    found = [Layer("stem", 0, 1, width, topology.kernels[0], POINT, 1)]
    for stage, (features, stride, depth, kernel) in enumerate(
        zip(topology.features, topology.strides, topology.blocks, topology.kernels, strict=True)
    ):
        equal = 2 * depth
        if stride != POINT or width != features:
            equal -= 1
            found.append(Layer(f"down{stage}", stage, width, features, kernel, stride, 1))
        if width != features:
            skip = Layer(f"skip{stage}", stage, width, features, POINT, POINT, 1, bias=False)
            found.append(skip)
        found.append(Layer(f"stage{stage}", stage, features, features, kernel, POINT, equal))
        width = features
    return tuple(found)


def sparse_layers(preset: str, cell: int) -> list[Layer]:
    """The layers whose results are not coarser than the mask grid."""
    topology = topology_of(preset)
    blocks = stage_blocks((cell,) * 3, topology.stage_strides)
    return [layer for layer in layers(topology) if blocks[layer.stage] is not None]


@dataclass(frozen=True)
class Selection:
    """Which problems to measure, most important first: earlier entries of a list come first."""

    patch: int
    cells: tuple[int, ...]
    batches: tuple[int, ...]
    mask_ratios: tuple[float, ...]
    operators: tuple[str, ...]
    stages: tuple[str, ...]  # names of layers, or numbers of stages; all if empty
    dtype: str
    preset: str = "L"


def problems(selection: Selection) -> Iterator[Problem]:
    """The problems of a selection; stages coarser than the mask grid have none.

    Raises:
        UserError: Unknown names, or sizes that do not fit together.
    """
    topology = topology_of(selection.preset)
    known = layers(topology)
    names = {layer.name for layer in known} | {str(layer.stage) for layer in known}
    for given, allowed, option in (
        (selection.stages, names, "--stage"),
        (selection.operators, OPERATORS, "--operator"),
        ((selection.dtype,), DTYPES, "--dtype"),
    ):
        for wrong in set(given) - set(allowed):
            raise UserError(f"{option} {wrong}: choose from {', '.join(sorted(allowed))}")
    product = itertools.product(selection.mask_ratios, selection.batches, selection.cells)
    for mask_ratio, batch, cell in product:
        check_grid((selection.patch,) * 3, (cell,) * 3, mask_ratio or 0.5)
        blocks = stage_blocks((cell,) * 3, topology.stage_strides)
        for kind, operators in KINDS.items():
            for layer in sparse_layers(selection.preset, cell):
                names = {layer.name, str(layer.stage)}
                if selection.stages and not names & set(selection.stages):
                    continue
                block = blocks[layer.stage]
                if set(operators) & set(selection.operators) and _exists(kind, layer, block):
                    yield Problem(
                        *(kind, layer, cell, selection.patch, batch, mask_ratio),
                        *(block, selection.dtype),
                    )


def _exists(kind: str, layer: Layer, block: Triple) -> bool:
    """Norms, pools and so on are measured once per stage, on the features of its result."""
    if kind == "conv":
        return True
    return layer.name.startswith("stage") and (kind != "pool" or min(block) > 1)
