"""How float32 products are computed, one switch for dense and block-sparse convolutions.

`torch.backends.cudnn.conv.fp32_precision`, or `torch.backends.cudnn.allow_tf32`, decides. By
default factors are rounded to TF32, as torch's own convolutions do on a GPU.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor


def precision(x: Tensor) -> str:
    """What Triton's `tl.dot` is asked for with operands like `x`."""
    conv = torch.backends.cudnn.conv
    return "tf32" if x.dtype == torch.float32 and conv.fp32_precision == "tf32" else "ieee"


@contextlib.contextmanager
def exactly() -> Iterator[None]:
    """Convolutions of float32 in float32, not in TF32."""
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        conv.fp32_precision = before
