"""The operators, checked and dispatched: what they mean is in `reference.py`.

Submanifold semantics: results exist only at visible voxels, and a masked or outside neighbour
contributes zero. Where a stride makes the result coarser than the mask grid on any axis, nothing
is left to skip: the operator runs dense on the zero-filled batch and returns a plain Tensor.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sparsemae.kernels import registry
from sparsemae.kernels.simulated import DenseMasked
from sparsemae.kernels.tensor import BlockTensor

Masked = BlockTensor | DenseMasked
Triple = tuple[int, int, int]


def conv3d(
    x: Masked,
    weight: Float[Tensor, "Co Ci kd kh kw"],
    bias: Float[Tensor, "Co"] | None = None,
    stride: Triple = (1, 1, 1),
    *,
    backend: str = "auto",
) -> Masked | Tensor:
    """Convolve visible voxels with a kernel of 1 or 3 per axis, padding (k-1)/2, stride 1 or 2.

    Args:
        x: Ci channels.
        weight: In the layout of `torch.nn.Conv3d`.
        bias: Added at visible voxels only.
        stride: Must divide the block; a block of 1 gives a dense Tensor instead.
        backend: One of `registry.BACKENDS`, or `auto` for the best one.

    Returns:
        Co channels on the same mask, or a Tensor [B, Co, D, H, W] where coarser than the grid.

    Raises:
        ValueError: Channels, kernel, stride or backend do not fit, naming which.
    """
    check_conv(x, weight, stride)
    run = _resolve("conv3d", x, backend)
    x, weight, bias = autocast(x, weight, bias)
    if coarser_than_grid(x.block, stride):
        return F.conv3d(x.unpack(), weight, bias, stride, [k // 2 for k in weight.shape[2:]])
    return run(x, weight, bias, stride)


def check_conv(x: Masked, weight: Tensor, stride: Triple) -> None:
    """Raise a ValueError unless `conv3d` takes these."""
    if x.channels != weight.shape[1]:
        raise ValueError(f"x has {x.channels} channels, weight takes {weight.shape[1]}")
    if not set(weight.shape[2:]) <= {1, 3}:
        raise ValueError(f"kernel {tuple(weight.shape[2:])}: block-sparse kernels are 1 or 3 wide")
    if not set(stride) <= {1, 2}:
        raise ValueError(f"stride {tuple(stride)}: block-sparse convolutions step by 1 or 2")


def conv_transpose3d(
    x: Masked,
    weight: Float[Tensor, "Ci Co kd kh kw"],
    bias: Float[Tensor, "Co"] | None = None,
    *,
    backend: str = "auto",
) -> Masked:
    """Transposed convolution whose stride equals its kernel: every voxel becomes a small box.

    Raises:
        ValueError: The channels do not fit.
    """
    if x.channels != weight.shape[0]:
        raise ValueError(f"x has {x.channels} channels, weight takes {weight.shape[0]}")
    x, weight, bias = autocast(x, weight, bias)
    return _resolve("conv_transpose3d", x, backend)(x, weight, bias, tuple(weight.shape[2:]))


def avg_pool3d(x: Masked, window: Triple, *, backend: str = "auto") -> Masked | Tensor:
    """Average over windows that tile the volume (stride = window, no padding)."""
    run = _resolve("avg_pool3d", x, backend)
    if coarser_than_grid(x.block, window):
        return F.avg_pool3d(x.unpack(), window)
    return run(x, window)


def max_pool3d(x: Masked, window: Triple, *, backend: str = "auto") -> Masked | Tensor:
    """Maximum over windows that tile the volume (stride = window, no padding)."""
    run = _resolve("max_pool3d", x, backend)
    if coarser_than_grid(x.block, window):
        return F.max_pool3d(x.unpack(), window)
    return run(x, window)


def instance_norm(
    x: Masked,
    weight: Float[Tensor, "C"] | None = None,
    bias: Float[Tensor, "C"] | None = None,
    eps: float = 1e-5,
    *,
    backend: str = "auto",
) -> Masked:
    """Normalise each sample and channel by mean and biased variance over its visible voxels."""
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.shape != (x.channels,):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, x has {x.channels} channels")
    return _resolve("instance_norm", x, backend)(x, weight, bias, eps)


def coarser_than_grid(block: Triple, stride: Triple) -> bool:
    """Whether a stride leaves less than one voxel per cell on some axis.

    Raises:
        ValueError: It leaves whole voxels on every axis, but cuts one of them in two.
    """
    if any(b < s for b, s in zip(block, stride, strict=True)):
        return True
    if any(b % s for b, s in zip(block, stride, strict=True)):
        raise ValueError(
            f"a stride of {tuple(stride)} does not divide blocks of {tuple(block)} voxels: "
            f"choose a mask block that is a multiple of the network's strides"
        )
    return False


def autocast(x: Masked, *parameters: Tensor | None):
    """Cast to the autocast dtype of the device where autocast is on, as dense convolutions do."""
    device = x.device.type
    without = device == "meta" or x.dtype == torch.float64  # no storage, so no autocast either
    if without or not torch.is_autocast_enabled(device):
        return x, *parameters
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(p if p is None else p.to(dtype) for p in parameters)


def _resolve(op: str, x: Masked, backend: str):
    return registry.resolve(op, _choose(x, backend))


def _choose(x: Masked, backend: str) -> str:
    if not isinstance(x, DenseMasked):
        return registry.choose(backend, x.device, x.dtype)
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend {backend!r} takes a BlockTensor, not a DenseMasked")
    return "reference"
