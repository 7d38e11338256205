"""The backends: one module each, holding a function per operator, imported when first asked for.

A backend is written once as a `case` below; plain imports keep it visible to torch.compile, to
static analysis, and to grep.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn

BACKENDS = ("reference", "torch", "triton", "spconv")
INSTALLED = {name: find_spec(name) is not None for name in ("triton", "spconv")}
REMEDY = {
    "triton": "pip install triton (Linux)",
    "spconv": "pip install spconv-cu120, from Python 3.12 on spconv-cu126",
}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def resolve(op: str, backend: str) -> Callable:
    """The function that runs `op`; a backend asked for by name never falls back to another.

    Raises:
        ValueError: No such backend, or its package is not installed; names the remedy.
    """
    if not INSTALLED.get(backend, True):
        raise ValueError(f"backend {backend!r} is not installed here: {REMEDY[backend]}")
    match backend:
        case "reference":
            from sparsemae.kernels import reference

            return getattr(reference, op)
        case "torch":
            from sparsemae.kernels import torch_backend

            return getattr(torch_backend, op)
        case "triton":
            from sparsemae.kernels import triton_backend

            return getattr(triton_backend, op)
        case "spconv":
            from sparsemae.kernels import spconv_backend

            return getattr(spconv_backend, op)
    raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """What `auto` stands for: triton on CUDA in the precisions it has, torch elsewhere."""
    if backend != "auto":
        return backend
    on_gpu = device.type == "cuda" and INSTALLED["triton"] and dtype in TRITON_DTYPES
    return "triton" if on_gpu else "torch"


def available() -> list[str]:
    """Backends that can run here; the first is the definition."""
    runs = dict(INSTALLED)
    if runs["triton"]:
        import triton

        runs["triton"] = torch.cuda.is_available() or triton.knobs.runtime.interpret
    return [name for name in BACKENDS if runs.get(name, True)]


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Make every operator of `model` use `backend`; returns the model."""
    if backend != "auto":
        resolve("conv3d", backend)
    for module in model.modules():
        if hasattr(type(module), "backend"):
            module.backend = backend
    return model
