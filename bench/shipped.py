"""Which kernels the package launches, found without a GPU.

A reduced ResEnc-L (every layer shape once) and some odd shapes run forward and backward on tensors
without storage; inside `recording`, launchers note what they would launch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sparsemae.kernels import BlockMask, BlockTensor, ops, triton_scatter
from sparsemae.kernels.launch import Launch, recording
from sparsemae.models.mae import SparseMAE, masked_mse
from sparsemae.models.masking import stage_blocks
from sparsemae.models.resenc import ResEncUNet

DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
POINT, CUBE = (1, 1, 1), (3, 3, 3)


@dataclass(frozen=True)
class Kernel:
    """A kernel to compile, in words another process understands: see `Launch`."""

    chip: str
    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int

    @classmethod
    def of(cls, chip: str, launch: Launch) -> "Kernel":
        function = launch.kernel.fn
        return cls(
            *(chip, function.__module__, function.__qualname__),
            *(launch.signature, launch.constants, launch.warps, launch.stages),
        )

    @property
    def dtype(self) -> str:
        """Of the first tensor, what the kernel reads."""
        pointers = [kind for _, kind in self.signature if kind.startswith("*")]
        return next((name for name, kind in DTYPES.items() if kind == pointers[0]), pointers[0])

    @property
    def shape(self) -> str:
        """The constants in one line, without those that are off or absent; (3, 3, 3) is 3."""
        words = []
        for name, value in self.constants:
            if isinstance(value, tuple) and len(set(value)) == 1:
                value = value[0]
            if value is True:
                words.append(name)
            elif value is not None and value is not False:
                words.append(f"{name}={value}".replace(" ", ""))
        return " ".join([*words, f"warps={self.warps}", f"stages={self.stages}"])


def record(chip: str) -> dict[Kernel, tuple[str, ...]]:
    """The distinct kernels the package launches on `chip`, each with the cases that launch it."""
    found: dict[Kernel, list[str]] = {}
    for case, run in _runs():
        with recording(chip) as launches, FakeTensorMode(allow_non_fake_inputs=True):
            run()
        for launch in launches:
            cases = found.setdefault(Kernel.of(chip, launch), [])
            if case not in cases:
                cases.append(case)
    return {kernel: tuple(cases) for kernel, cases in found.items()}


def _runs() -> Iterator[tuple[str, Callable[[], None]]]:
    """Whole networks, then what no network here has."""
    for cell in (16, 32):
        for dtype, batch in (("bfloat16", 2), ("bfloat16", 8), ("float32", 2)):
            yield f"L cell {cell} batch {batch} {dtype}", _network(cell, batch, dtype)
    for cell in (16, 32):
        for dtype in ("bfloat16", "float32"):
            yield f"pack and unpack cell {cell} {dtype}", _scatter(cell, getattr(torch, dtype))
    for dtype in ("bfloat16", "float16", "float32"):  # float16 compiles as bfloat16 does
        for channels in ((32, 64), (7, 13)):
            yield f"operators {channels} {dtype}", _operators(*channels, getattr(torch, dtype))


def _network(cell: int, batch: int, dtype: str) -> Callable[[], None]:
    """One training step of the masked autoencoder, 75 % hidden, decoding hidden cells only.

    Two blocks of a stage launch all that more of them do. On the CPU, whose autocast does what
    CUDA's does; there is no storage, so nothing is computed.
    """

    def run() -> None:
        network = ResEncUNet.from_preset("L", n_blocks_per_stage=(1, 2, 2, 2, 2, 2))
        mae = SparseMAE(network, cell, decode="masked", backend="triton")
        x = torch.empty(batch, 1, 160, 160, 160)
        with torch.autocast("cpu", getattr(torch, dtype), enabled=dtype != "float32"):
            loss = masked_mse(mae(x, masks), x, masks.scored)
        loss.backward()

    probe = SparseMAE(ResEncUNet.from_preset("tiny"), cell, decode="masked")
    masks = probe.draw_masks(batch, (160,) * 3, 0.75)  # real: its tables are read on the host
    return run


def _scatter(cell: int, dtype: torch.dtype) -> Callable[[], None]:
    """The input and every skip, to blocks and back; on a GPU a network's blocks choose Triton."""
    mask = BlockMask.random(2, (160 // cell,) * 3, 0.75)

    def run() -> None:
        topology = ResEncUNet.from_preset("L").topology
        blocks = stage_blocks((cell,) * 3, topology.stage_strides)
        for channels, block in zip((1, *topology.features), (blocks[0], *blocks), strict=True):
            if block is None:
                continue
            size = [g * b for g, b in zip(mask.grid, block, strict=True)]
            for layout in (torch.contiguous_format, torch.channels_last_3d):
                dense = torch.empty(2, channels, *size, dtype=dtype)
                dense = dense.contiguous(memory_format=layout).requires_grad_()
                features = triton_scatter.pack_blocks(dense, mask, block)
                token = torch.empty(channels, requires_grad=True)
                unpacked = triton_scatter.unpack_blocks(features, mask, token)
                unpacked.backward(torch.empty_like(dense))
                triton_scatter.unpack_blocks(features.detach(), mask, 0.0)

    return run


def _operators(ci: int, co: int, dtype: torch.dtype) -> Callable[[], None]:
    """Every public operator, on channels and kernels no preset has."""
    mask = BlockMask.random(2, (5, 5, 5), 0.75)

    def run() -> None:
        def parameter(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, requires_grad=True)

        def blocks(channels: int, *block: int) -> BlockTensor:
            return BlockTensor(parameter(len(mask), *block, channels), mask)

        bias = parameter(co)
        for block, kernel, stride in (
            ((8, 8, 8), CUBE, POINT),
            ((2, 2, 2), CUBE, POINT),
            ((8, 8, 8), CUBE, (2, 2, 2)),
            ((4, 8, 8), (1, 3, 3), (1, 2, 2)),
            ((4, 4, 4), POINT, POINT),
        ):
            weight = parameter(co, ci, *kernel)
            y = ops.conv3d(blocks(ci, *block), weight, bias, stride, backend="triton")
            y.values.sum().backward()
        for kernel in ((2, 2, 2), (1, 2, 2)):
            weight = parameter(ci, co, *kernel)
            y = ops.conv_transpose3d(blocks(ci, 4, 4, 4), weight, bias, backend="triton")
            y.values.sum().backward()
        y = ops.instance_norm(blocks(co, 4, 4, 4), parameter(co), bias, backend="triton")
        y.values.sum().backward()
        for pool in (ops.avg_pool3d, ops.max_pool3d):
            pool(blocks(co, 4, 4, 4), (2, 2, 2), backend="triton").values.sum().backward()

    return run
