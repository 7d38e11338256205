"""How operators are compared: one run with gradients per backend, and the largest difference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sparsemae.kernels import BlockMask, BlockTensor


def run(op: Callable, leaves: dict[str, Tensor], mask: BlockMask, dtype, backend: str):
    """`op(BlockTensor of leaves["x"], leaves, backend)` with a random upstream gradient.

    Returns the output, "y", and the gradient of every leaf under the leaf's name.
    """
    on_gpu = backend == "triton" and torch.cuda.is_available()
    place = {"dtype": dtype, "device": "cuda" if on_gpu else "cpu"}
    leaves = {k: t.detach().to(**place, copy=True).requires_grad_() for k, t in leaves.items()}
    y = op(BlockTensor(leaves["x"], mask.to(place["device"])), leaves, backend).features
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(upstream.to(**place))
    return {"y": y.detach().cpu()} | {name: t.grad.cpu() for name, t in leaves.items()}


def largest_difference(value: Tensor, expected: Tensor, floor: float) -> float:
    """Relative to the largest expected value, or to `floor` if that is larger."""
    assert value.shape == expected.shape
    if not expected.numel():
        return 0.0
    difference = (value.double() - expected.double()).abs().max().item()
    scale = max(expected.abs().max().item(), floor)
    if not scale:
        return 0.0 if difference == 0 else float("inf")
    return difference / scale if difference == difference else float("inf")


def errors(op, leaves, mask, dtype, backend="torch", *, floors=None) -> dict[str, float]:
    """The largest relative difference to the float64 reference, of each result of `run`.

    The maximum, not a mean or a percentile, which would hide a single wrong cell. `floors` is for
    results that cancel to something small: the size of the terms they are the sum of.
    """
    expected = run(op, leaves, mask, torch.float64, "reference")
    values = run(op, leaves, mask, dtype, backend)
    floors = floors or {}
    return {
        name: largest_difference(values[name], expected[name], floors.get(name, 0.0))
        for name in expected
    }


@pytest.fixture(scope="session")
def parity() -> Callable[..., dict[str, float]]:
    return errors


@pytest.fixture(scope="module")
def one_thread():
    """Many small operators: two threads that wait for each other on a busy machine take longer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
