"""Is this machine ready: versions, devices, and each backend checked against the reference."""

import contextlib
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from sparsemae.kernels import BlockMask, BlockTensor, ops, registry
from sparsemae.kernels.precision import exactly

OPTIONAL = ("triton", "spconv-cu120", "spconv-cu126")
PACKAGES = ("sparsemae", "torch", "numpy", "scipy", "nibabel", "blosc2", "safetensors", "pydantic")
TOLERANCE = 1e-4  # relative, of fp32 against float64


def examine(console: Console | None = None) -> bool:
    """Print what is found; True if every backend agrees with the reference."""
    console = console or Console()
    versions = Table("package", "version", title="Versions")
    versions.add_row("python", platform.python_version())
    for name in PACKAGES:
        versions.add_row(name, version(name))
    for name in OPTIONAL:
        with contextlib.suppress(PackageNotFoundError):
            versions.add_row(name, version(name))
    console.print(versions)

    devices = Table("device", "what", title="Devices")
    devices.add_row("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices.add_row(f"cuda:{i}", f"{properties.name}, {memory}")
    console.print(devices)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = Table("backend", "device", "largest error", "ms", "verdict", title="Backends")
    healthy = True
    for backend in registry.available():
        start = time.perf_counter()
        try:
            error = check_backend(backend, device)
            good, shown = error < TOLERANCE, f"{error:.1e}"
        except Exception as failure:  # a doctor reports whatever breaks
            good, shown = False, f"{type(failure).__name__}: {failure}"
        healthy &= good
        ms = f"{(time.perf_counter() - start) * 1e3:.0f}"
        checks.add_row(backend, device.type, shown, ms, "works" if good else "BROKEN")
    console.print(checks)
    return healthy


def check_backend(backend: str, device: torch.device) -> float:
    """Largest relative error, output and gradients, of a strided convolution and a norm."""
    generator = torch.Generator().manual_seed(0)
    mask = BlockMask.random(2, (3, 3, 3), 0.6, generator=generator)
    x = torch.randn(len(mask), 4, 4, 4, 8, generator=generator)
    weight = torch.randn(16, 8, 3, 3, 3, generator=generator) / 15
    bias = torch.randn(16, generator=generator)
    upstream = torch.randn(len(mask), 2, 2, 2, 16, generator=generator)

    def run(backend: str, place: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
        inputs = [t.to(place, dtype).requires_grad_() for t in (x, weight, bias)]
        packed = BlockTensor(inputs[0], mask.to(place))
        y = ops.conv3d(packed, *inputs[1:], (2, 2, 2), backend=backend)
        y = ops.instance_norm(y, inputs[2], inputs[2], backend=backend).features
        grads = torch.autograd.grad(y, inputs, upstream.to(place, dtype))
        return [t.detach().cpu().double() for t in (y, *grads)]

    truth = run("reference", torch.device("cpu"), torch.float64)
    with exactly():
        found = run(backend, device, torch.float32)
    return max(
        ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, truth, strict=True)
    )
