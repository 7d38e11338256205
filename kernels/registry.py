"""The backends: one module each, holding a function per operator, imported when first asked for.

A backend is written once as a `case` below; plain imports keep it visible to torch.compile, to
static analysis, and to grep.
"""

from collections.abc import Callable

from torch import nn

BACKENDS = ("reference", "torch")


def resolve(op: str, backend: str) -> Callable:
    """The function that runs `op`; a backend asked for by name never falls back to another."""
    match backend:
        case "reference":
            from sparsemae.kernels import reference

            return getattr(reference, op)
        case "torch" | "auto":
            from sparsemae.kernels import torch_backend

            return getattr(torch_backend, op)
    raise ValueError(f"unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")


def available() -> list[str]:
    """Backends that can run here; the first is the definition."""
    return list(BACKENDS)


def set_backend(model: nn.Module, backend: str) -> nn.Module:
    """Make every operator of `model` use `backend`; returns the model."""
    resolve("conv3d", backend)
    for module in model.modules():
        if hasattr(type(module), "backend"):
            module.backend = backend
    return model
