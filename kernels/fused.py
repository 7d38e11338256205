"""Convolution, norm, residual and activation as one operator, where a backend has it.

The modules are taken as they are and mean what they mean one after the other; with the triton
backend the convolution's epilogue takes the norm's statistics, and one pass normalises, adds and
activates. Everything else runs them one by one.
"""

from torch import Tensor, nn

from sparsemae.kernels import registry
from sparsemae.kernels.modules import (
    AvgPool3d,
    Conv3d,
    InstanceNorm3d,
    LeakyReLU,
    ReLU,
    tiling_window,
)
from sparsemae.kernels.ops import Masked, autocast, check_conv, coarser_than_grid
from sparsemae.kernels.tensor import BlockTensor

POINT = (1, 1, 1)


def conv_norm_act(
    x: Tensor | Masked,
    conv: nn.Module,
    norm: nn.Module,
    act: nn.Module | None = None,
    *,
    residual: Tensor | Masked | None = None,
    pool: nn.Module | None = None,
) -> Tensor | Masked:
    """`act(norm(conv(pool(x))) + residual)`.

    Args:
        x: Dense or block-sparse; so is the result.
        act: Nothing if None; only LeakyReLU and ReLU are fused.
        residual: On the voxels of the result; nothing if None.
        pool: An average pool before a convolution of 1x1x1; nothing if None.
    """
    if _fuses(x, conv, norm, act, pool):
        return _fused(x, conv, norm, act, residual, pool)
    y = norm(conv(x if pool is None else pool(x)))
    if residual is not None:
        y = y + residual
    return y if act is None else act(y)


def _fuses(x, conv, norm, act, pool) -> bool:
    if type(x) is not BlockTensor or (type(conv), type(norm)) != (Conv3d, InstanceNorm3d):
        return False
    if registry.choose(conv.backend, x.device, x.dtype) != "triton":
        return False
    if act is not None and type(act) not in (LeakyReLU, ReLU):
        return False
    if type(act) is LeakyReLU and act.negative_slope < 0:  # its sign would not tell the slope
        return False
    stride, backends = conv.stride, {conv.backend, norm.backend}
    if pool is not None:
        if type(pool) is not AvgPool3d or (conv.kernel_size, conv.stride) != (POINT, POINT):
            return False
        stride, backends = tiling_window(pool), {*backends, pool.backend}
    return len(backends) == 1 and not coarser_than_grid(x.block, stride)


def _fused(x, conv, norm, act, residual, pool):
    from sparsemae.kernels import triton_backend

    conv.require_sparse_form()
    norm.require_sparse_form()
    check_conv(x, conv.weight, conv.stride)
    x, weight, bias = autocast(x, conv.weight, conv.bias)
    window = None if pool is None else tiling_window(pool)
    slope = 0.0 if type(act) is ReLU else getattr(act, "negative_slope", None)
    return triton_backend.conv_norm_act(
        *(x, weight, bias, conv.stride, window),
        *(norm.weight, norm.bias, norm.eps, slope, residual),
    )
