"""What a GPU process does up to the launch, without a GPU; run by `test_launch.py`.

Triton binds the arguments of each launch, specialises them and compiles, for a driver that only
names a chip. What it compiles must be what `recording` notes, and so what the static gate checks.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import MockTensor

from sparsemae.kernels import BlockMask, BlockTensor, launch, triton_backend, triton_scatter


class Driver:
    """Enough of one to compile."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def bind(kernel, grid, arguments, constants, *, warps=4, stages=1):
    """In place of `launch.launch`."""
    given = {
        name: MockTensor(value.dtype, list(value.shape))
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    compiled = kernel.warmup(**given, **constants, num_warps=warps, num_stages=stages, grid=grid)
    recorded = dict(launch._specialize(arguments, constants)[0])
    bound = {name: kind for name, kind in compiled.src.signature.items() if name in recorded}
    assert bound == recorded, (kernel.fn.__name__, bound, recorded)
    divisible = {
        compiled.src.fn.arg_names[position[0]]
        for position, attributes in compiled.src.attrs.items()
        if ["tt.divisibility", 16] in attributes
    }
    assert divisible == {n for n, kind in recorded.items() if kind.startswith("*")}, divisible
    print(kernel.fn.__name__)


def leaf(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)


def main() -> None:
    driver.set_active(Driver())
    for name, module in list(sys.modules.items()):
        if name.startswith("sparsemae.kernels.triton") and hasattr(module, "launch"):
            module.launch = bind
    mask = BlockMask.random(1, (2, 2, 1), 0.5)
    scale = torch.ones(32, requires_grad=True)
    for block, ci, stride in ((16, 32, 1), (2, 32, 1), (4, 32, 2), (4, 1, 1)):
        x = BlockTensor(leaf(len(mask), *(block,) * 3, ci), mask)
        residual = BlockTensor(leaf(len(mask), *(block // stride,) * 3, 32), mask)
        y = triton_backend.conv_norm_act(
            *(x, leaf(32, ci, 3, 3, 3), leaf(32), (stride,) * 3, None),
            *(scale, scale, 1e-5, 0.01, residual),
        )
        y.features.sum().backward()
    x = BlockTensor(leaf(len(mask), 16, 16, 16, 32), mask)
    triton_backend.instance_norm(x, scale, None, 1e-5).features.sum().backward()
    x = BlockTensor(leaf(len(mask), 4, 4, 4, 32), mask)
    pooled = triton_backend.conv_norm_act(
        *(x, leaf(32, 32, 1, 1, 1), None, (1, 1, 1), (2, 2, 2)), *(None, None, 1e-5, None, None)
    )
    pooled.features.sum().backward()
    triton_backend.conv_transpose3d(
        x, leaf(32, 16, 2, 2, 2), leaf(16), (2, 2, 2)
    ).features.sum().backward()
    for pool in (triton_backend.avg_pool3d, triton_backend.max_pool3d):
        pool(x, (2, 2, 2)).features.sum().backward()
    blocks = triton_scatter.pack_blocks(leaf(1, 32, 8, 8, 4), mask, (4, 4, 4))
    triton_scatter.unpack_blocks(blocks, mask, torch.zeros(32, requires_grad=True)).sum().backward()


if __name__ == "__main__":
    main()
