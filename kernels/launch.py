"""How Triton kernels are launched, and how their launchers become operators of torch.

A launcher checks nothing, allocates its outputs with `new_empty`, and calls `launch` once per
kernel. `operator` registers it with torch: to torch.compile it is one opaque call whose shapes come
from running the same launcher on tensors without storage, where `launch` does nothing. Gradients
are put around operators by `autograd.Function`s.
Inside `recording(chip)` the same launchers, run on meta tensors, note what they would launch on
that chip: so the static gate compiles exactly what is shipped, on a machine without a GPU.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LIBRARY = torch.library.Library("sparsemae", "DEF")
POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}
DEFAULT_CHIP = "sm_90"  # whose tiles the interpreter and unknown devices use


@dataclass(frozen=True)
class Launch:
    """One kernel as it would be compiled: see `triton.compiler.ASTSource`."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    warps: int
    stages: int


@dataclass
class Recorder:
    chip: str
    launches: list[Launch]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextlib.contextmanager
def recording(chip: str) -> Iterator[list[Launch]]:
    """Collect what launchers on meta tensors would launch on `chip` ("sm_90", "gfx942", ...)."""
    recorder = Recorder(chip, [])
    token = _recorder.set(recorder)
    try:
        yield recorder.launches
    finally:
        _recorder.reset(token)


def operator(schema: str) -> Callable[[Callable], Callable]:
    """Register a launcher as `torch.ops.sparsemae.<name>`, and return that operator.

    `schema` is in torch's notation, e.g. "scale(Tensor x, int[] block) -> Tensor".
    """
    name = schema.partition("(")[0]

    def register(launcher: Callable) -> Callable:
        LIBRARY.define(schema)
        LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sparsemae::{name}", launcher, lib=LIBRARY)
        return getattr(torch.ops.sparsemae, name).default

    return register


def chip_of(x: Tensor) -> str:
    """The chip `x` lives on, as compilers name it; decides tile sizes."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.chip
    if x.device.type != "cuda" or isinstance(x, FakeTensor):
        return DEFAULT_CHIP
    properties = torch.cuda.get_device_properties(x.device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def launch(
    kernel: triton.JITFunction,
    grid: tuple[int, ...],
    arguments: dict[str, Tensor | int | float | None],
    constants: dict[str, object],
    *,
    warps: int = 4,
    stages: int = 1,
) -> None:
    """Run `kernel` on every program of `grid`, on the device of its first tensor.

    Args:
        arguments: By name, in the kernel's order. Integers must be listed in its
            `do_not_specialize`, so that another number of blocks compiles nothing anew.
        constants: The kernel's constexprs.

    Raises:
        ValueError: The tensors are on the CPU, and Triton's interpreter is not on.
    """
    first = next(a for a in arguments.values() if isinstance(a, Tensor))
    if isinstance(first, FakeTensor) or first.device.type == "meta":
        recorder = _recorder.get()
        if recorder is not None:
            recorder.launches.append(
                Launch(kernel, grid, *_specialize(arguments, constants), warps, stages)
            )
        return
    if 0 in grid:
        return
    run = kernel[grid]
    if first.device.type == "cuda":
        with _device(first):
            run(**arguments, **constants, num_warps=warps, num_stages=stages)
    elif triton.knobs.runtime.interpret:
        run(**arguments, **constants, num_warps=warps, num_stages=stages)
    else:
        raise ValueError(
            f"backend 'triton' runs on a GPU, these tensors are on {first.device}: move them, or "
            f"use backend='torch' (TRITON_INTERPRET=1 runs the kernels slowly on the CPU)"
        )


def _device(x: Tensor):
    if x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _specialize(arguments, constants):
    """Types of the run-time arguments, and all that is fixed at compile time."""
    signature, fixed = {}, dict(constants)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            signature[name] = POINTER[value.dtype]
        elif value is None:
            fixed[name] = None
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if value >= 2**31 else "i32"
    return tuple(signature.items()), tuple(fixed.items())
