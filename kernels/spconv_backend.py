"""The spconv backend: convolutions by the generic sparse library, for its users and to compare.

- stride 1: spconv's submanifold convolution.
- strided: spconv's sparse convolution, which grows the active set at the borders of blocks. The
  voxels beyond them are computed and dropped, as a user of spconv would have to.
- transposed, stride = kernel: spconv's transposed convolution. It makes exactly the voxels of the
  visible blocks, so nothing is dropped; the result is only brought into packed order.

Norm and pools have no form in spconv worth having: they are the torch backend's.
"""

import torch
from torch import Tensor

from sparsemae.kernels import spconv_rules
from sparsemae.kernels.tensor import BlockTensor
from sparsemae.kernels.torch_backend import avg_pool3d, instance_norm, max_pool3d

__all__ = ["avg_pool3d", "conv3d", "conv_transpose3d", "instance_norm", "max_pool3d"]

# What spconv 2.3.6 and 2.3.8 compute; no version has bfloat16.
DTYPES = {
    "cpu": (torch.float32, torch.float64, torch.float16),
    "cuda": (torch.float32, torch.float16),
}


def conv3d(x: BlockTensor, weight: Tensor, bias: Tensor | None, stride) -> BlockTensor:
    return _convolve(x, weight.permute(0, 2, 3, 4, 1), bias, stride, transposed=False)


def conv_transpose3d(x: BlockTensor, weight: Tensor, bias: Tensor | None, stride) -> BlockTensor:
    return _convolve(x, weight.permute(1, 2, 3, 4, 0), bias, stride, transposed=True)


def _convolve(x: BlockTensor, filters: Tensor, bias, stride, *, transposed: bool) -> BlockTensor:
    """`filters` are [Co, kd, kh, kw, Ci], spconv's layout."""
    _check(x, filters, bias)
    rows, filters = x.features.reshape(-1, x.channels).contiguous(), filters.contiguous()
    kernel, stride = tuple(filters.shape[1:4]), tuple(stride)
    if len(rows):
        with torch.cuda.device_of(rows):  # spconv takes the current device's stream; CPU: no-op
            book = spconv_rules.rulebook(x.mask, x.block, kernel, stride, transposed)
            out = spconv_rules.convolve(rows, filters, book)
    else:  # spconv refuses to convolve nothing; this gives gradients of zero
        out = rows @ filters[:, 0, 0, 0].t()
    if bias is not None:
        out += bias
    block = [b * s if transposed else b // s for b, s in zip(x.block, stride, strict=True)]
    return x.with_values(out.view(len(x.mask), *block, len(filters)))


def _check(x: BlockTensor, filters: Tensor, bias: Tensor | None) -> None:
    """What spconv does not check, since it reads bare memory."""
    if x.dtype not in DTYPES.get(x.device.type, ()):
        raise ValueError(
            f"spconv has no {x.dtype} on {x.device.type}: use backend='torch', or cast to "
            f"float32 or float16 (torch.autocast(..., dtype=torch.float16))"
        )
    if x.mask.coords.device != x.device:
        raise ValueError(f"x is on {x.device}, its mask on {x.mask.coords.device}: use mask.to")
    for name, t in (("weight", filters), ("bias", bias)):
        if t is not None and (t.dtype, t.device) != (x.dtype, x.device):
            raise ValueError(
                f"x is {x.dtype} on {x.device}, {name} is {t.dtype} on {t.device}: "
                f"cast one of them, or run under torch.autocast"
            )
