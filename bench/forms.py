"""How each backend is given a problem, and whether its results are right.

`reference` is the dense library on the whole volume, multiplied by the mask, in both memory
formats; the others get packed blocks. All start from the same values.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemae.bench.cases import HALF, KINDS, Problem
from sparsemae.kernels import (
    BlockTensor,
    Conv3d,
    DenseMasked,
    InstanceNorm3d,
    LeakyReLU,
    available,
    conv_norm_act,
    ops,
)
from sparsemae.kernels.precision import exactly
from sparsemae.kernels.registry import choose

EPS, SLOPE = 1e-5, 0.01
KINK = 0.05  # results of an activation closer to zero get no gradient in checks
# of the largest difference over the largest value, and of the norms
SINGLE, TF32, HALF_WIDTH = (1e-3, 1e-4), (1e-2, 2e-3), (5e-2, 1e-2)


@dataclass(frozen=True)
class Form:
    """A backend and how its features lie in memory."""

    backend: str
    layout: str = "packed"  # or "NCDHW", "NDHWC"

    @property
    def name(self) -> str:
        return self.backend if self.layout == "packed" else f"{self.backend} {self.layout}"

    @property
    def dense(self) -> bool:
        return self.layout != "packed"


REFERENCES = (Form("reference", "NCDHW"), Form("reference", "NDHWC"))
EXACT = Form("reference")


def forms(
    kind: str, backends: tuple[str, ...], device: torch.device, dtype: torch.dtype
) -> list[Form]:
    """The forms of `backends` that have an operator of their own for `kind`."""
    chosen = list(REFERENCES) if "reference" in backends else []
    chosen += [Form(b) for b in available() if b in backends and b != "reference"]
    if kind in ("norm", "pool", "densify"):  # spconv has none
        chosen = [form for form in chosen if form.backend != "spconv"]
    if kind == "densify":  # a BlockTensor chooses by itself
        best = choose("auto", device, dtype)
        chosen = [form for form in chosen if form.dense or form.backend == best]
    return chosen


def dtype_of(form: Form, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What a form computes in: `dtype`, but for spconv where it lacks that."""
    if form.backend != "spconv":
        return dtype
    from sparsemae.kernels import spconv_backend

    return dtype if dtype in spconv_backend.DTYPES[device.type] else torch.float16


class Inputs:
    """Values of a problem: packed features, parameters, and the upstream gradient."""

    def __init__(self, problem: Problem, device: torch.device, dtype: torch.dtype):
        self.mask = problem.mask().to(device)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(dtype)

        layer, count = problem.layer, len(self.mask)
        blocks, ci, co = problem.in_block, layer.ci, layer.co
        if problem.kind not in ("conv", "layer"):  # they work on the layer's result
            blocks, ci = problem.out_block, co
        self.values = {"x": normal(count, *blocks, ci)}
        match problem.kind:
            case "conv" | "layer":
                scale = (layer.taps * ci) ** -0.5
                self.values["weight"] = normal(co, ci, *layer.kernel, scale=scale)
                if layer.bias:
                    self.values["bias"] = normal(co)
            case "densify":
                self.values["token"] = normal(co)
        if problem.kind in ("norm", "layer"):
            self.values["scale"] = 1 + normal(co, scale=0.2)
            self.values["shift"] = normal(co, scale=0.2)
        result = (count, *problem.out_block, co)
        if problem.kind == "pool":
            result = (count, *(b // 2 for b in blocks), co)
        elif problem.kind == "densify":
            result = (
                problem.batch,
                co,
                *(g * b for g, b in zip(problem.grid, blocks, strict=True)),
            )
        self.upstream = normal(*result)


class Prepared:
    """A problem in one form: leaves to differentiate, and the operators to run."""

    def __init__(self, problem: Problem, form: Form, inputs: Inputs, dtype: torch.dtype):
        self.problem, self.form, self.mask = problem, form, inputs.mask
        self.values = {n: self._lay_out(n, v.to(dtype)) for n, v in inputs.values.items()}
        self.upstream = inputs.upstream.to(dtype)
        if form.dense and problem.kind != "densify":
            self.upstream = self._lay_out("x", self.upstream)
        elif form.layout == "NDHWC":
            self.upstream = self.upstream.contiguous(memory_format=torch.channels_last_3d)

    def _lay_out(self, name: str, value: Tensor) -> Tensor:
        if name == "x" and self.form.dense:
            value = BlockTensor(value, self.mask).unpack()
        if self.form.layout == "NDHWC" and value.ndim == 5:
            return value.contiguous(memory_format=torch.channels_last_3d)
        return value.contiguous()

    def leaves(self, wanted: tuple[str, ...]) -> dict[str, nn.Parameter]:
        """The inputs, those in `wanted` with a gradient."""
        return {n: nn.Parameter(v, requires_grad=n in wanted) for n, v in self.values.items()}

    def forward(self, leaves: dict[str, nn.Parameter]) -> Tensor:
        """The result's values: packed, or dense."""
        backend, problem = self.form.backend, self.problem
        x = (DenseMasked if self.form.dense else BlockTensor)(leaves["x"], self.mask)
        match problem.kind:
            case "conv":
                stride, bias = problem.layer.stride, leaves.get("bias")
                return ops.conv3d(x, leaves["weight"], bias, stride, backend=backend).values
            case "layer":
                return conv_norm_act(x, *self._modules(leaves)).values
            case "norm":
                scale, shift = leaves["scale"], leaves["shift"]
                y = ops.instance_norm(x, scale, shift, EPS, backend=backend)
                return F.leaky_relu(y, SLOPE).values
            case "pool":
                return ops.avg_pool3d(x, HALF, backend=backend).values
            case "densify":
                return x.unpack(leaves["token"])
        raise ValueError(f"unknown kind {problem.kind!r}")

    def _modules(self, leaves: dict[str, nn.Parameter]) -> tuple[nn.Module, ...]:
        layer, backend = self.problem.layer, self.form.backend
        padding = tuple(k // 2 for k in layer.kernel)
        with torch.device("meta"):
            conv = Conv3d(layer.ci, layer.co, layer.kernel, layer.stride, padding, bias=layer.bias)
            norm = InstanceNorm3d(layer.co, EPS, affine=True)
        conv.weight, conv.bias = leaves["weight"], leaves.get("bias")
        norm.weight, norm.bias = leaves["scale"], leaves["shift"]
        conv.backend = norm.backend = backend
        return conv, norm, LeakyReLU(SLOPE)

    def operator(self, name: str) -> Callable[[], object]:
        """Runs one operator; what it needs of the forward pass is computed here, before timing."""
        wanted = tuple(n for n in KINDS[self.problem.kind][name] if n in self.values)
        leaves = self.leaves(wanted)
        if not wanted:
            return torch.no_grad()(lambda: self.forward(leaves))
        y, inputs = self.forward(leaves), [leaves[n] for n in wanted]
        return lambda: torch.autograd.grad(y, inputs, self.upstream, retain_graph=True)

    def results(self) -> dict[str, Tensor]:
        """The result, "y", and all gradients, voxels in packed order."""
        leaves = self.leaves(tuple(self.values))
        y = self.forward(leaves)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.upstream)
        found = {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}
        if self.form.dense:
            packed = ("x",) if self.problem.kind == "densify" else ("x", "y")
            for name in packed:
                found[name] = BlockTensor.pack(found[name], self.mask).features
        return found


def truth(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """The dense definition in float64, in float32 where that does not fit the memory.

    Takes the upstream gradient of results at the kink of an activation away from `inputs`, for
    every form: on which side of zero rounding puts them decides their gradient.
    """
    for dtype in _exact_dtypes(problem, inputs.mask.visible.device):
        try:
            with exactly():
                prepared = Prepared(problem, EXACT, inputs, dtype)
                if problem.kind in ("norm", "layer"):
                    with torch.no_grad():
                        y = prepared.forward(prepared.leaves(()))
                    near = (y < KINK) & (y > -SLOPE * KINK)
                    inputs.upstream.masked_fill_(near, 0)
                    prepared.upstream.masked_fill_(near, 0)
                return prepared.results()
        except torch.OutOfMemoryError:
            continue
    raise MemoryError(f"{problem.name}: no memory for the reference to compare with")


def _exact_dtypes(problem: Problem, device: torch.device) -> Iterator[torch.dtype]:
    layer = problem.layer
    dense_in = problem.rows(problem.in_block, dense=True) * layer.ci
    dense_out = problem.rows(problem.out_block, dense=True) * layer.co
    if 8 * 4 * (dense_in + dense_out) < _free_bytes(device):
        yield torch.float64
    yield torch.float32


def _free_bytes(device: torch.device) -> float:
    if device.type != "cuda":
        return math.inf
    reserved = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return torch.cuda.mem_get_info()[0] + reserved


def tolerances(dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Largest relative difference of single values, and of norms, that counts as right."""
    if dtype != torch.float32:
        return HALF_WIDTH
    tf32 = device.type == "cuda" and torch.backends.cudnn.conv.fp32_precision == "tf32"
    return TF32 if tf32 else SINGLE


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, tuple]:
    """Per result: largest difference over the largest value, and the norm's over the norm.

    A bias before a norm has no gradient but rounding errors, so a bias is measured against the
    gradient of the weight beside it.
    """
    errors = {}
    for name, right in expected.items():
        value = found[name].to(right.dtype)
        if value.shape != right.shape:
            errors[name] = (math.inf, math.inf)
            continue
        wrong, scales = value - right, [right]
        if name == "bias":
            scales.append(expected["weight"])
        largest = max(s.abs().max().item() for s in scales)
        whole = max(s.norm().item() for s in scales)
        by_value = _ratio(wrong.abs().max().item(), largest)
        errors[name] = by_value, _ratio(wrong.norm().item(), whole)
    return errors


def _ratio(difference: float, scale: float) -> float:
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else (0.0 if difference == 0 else math.inf)
