"""Every operator once, forward and backward, on small shapes, for compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python -m sparsemae.bench.sanitize

It says nothing about results, only about memory: tests and benchmarks check those.
"""

import sys

import torch

from sparsemae.bench.cases import KINDS, Layer, Problem
from sparsemae.bench.forms import Form, Inputs, Prepared
from sparsemae.kernels import BlockMask, BlockTensor, ops

POINT, CUBE, HALF = (1, 1, 1), (3, 3, 3), (2, 2, 2)
# few, since each form of a kernel is compiled once; the number is the width of a result's block
LAYERS = (
    (Layer("stem", 0, 1, 32, CUBE, POINT, 1), 8),
    (Layer("stage", 0, 32, 32, CUBE, POINT, 1), 8),
    (Layer("deep", 3, 64, 64, CUBE, POINT, 1), 2),
    (Layer("down", 1, 32, 64, CUBE, HALF, 1), 4),
    (Layer("flat", 1, 16, 32, (1, 3, 3), (1, 2, 2), 1), 4),
    (Layer("skip", 1, 32, 64, POINT, POINT, 1, bias=False), 4),
    (Layer("odd", 1, 7, 13, CUBE, POINT, 1), 1),
)
ALL_KINDS = ("stage", "odd")  # of these layers; the others are convolved only


def cover(device: str, backend: str) -> int:
    """Run everything once; how many passes ran."""
    place, passes = torch.device(device), 0
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for layer, width in LAYERS:
        for kind in KINDS if layer.name in ALL_KINDS else ("conv",):
            if kind == "pool" and width < 2:
                continue
            problem = Problem(kind, layer, 16, 48, 2, 0.75, (width,) * 3, str(dtype)[6:])
            inputs = Inputs(problem, place, dtype)
            Prepared(problem, Form(backend), inputs, dtype).results()
            passes += 1
    mask = BlockMask.random(2, (3, 3, 3), 0.75).to(place)
    for kernel in (HALF, (1, 2, 2)):
        values = torch.randn(len(mask), 4, 4, 4, 24, device=place, dtype=dtype)
        weight = torch.randn(24, 16, *kernel, device=place, dtype=dtype)
        leaves = [t.requires_grad_() for t in (values, weight)]
        x = BlockTensor(leaves[0], mask)
        for y in (
            ops.conv_transpose3d(x, leaves[1], backend=backend),
            ops.max_pool3d(x, kernel, backend=backend),
        ):
            y.values.sum().backward()
            passes += 1
    if device == "cuda":
        torch.cuda.synchronize()
    return passes


def main() -> None:
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    backend = sys.argv[2] if len(sys.argv) > 2 else "triton" if device == "cuda" else "torch"
    print(f"{cover(device, backend)} passes of {backend} on {device}")


if __name__ == "__main__":
    main()
