"""A sparse encoder and a whole training step against simulated sparsity.

The baseline, `reference`, is what published CNN-MAE code does: the same network computed densely
and multiplied by the mask, in the better of the two memory formats. Every variant is checked
against it before it is timed. One step is forward, loss, backward, clipping and SGD.
In a precision below float32 the step runs under autocast, with float32 weights.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sparsemae.errors import UserError
from sparsemae.kernels import GELU, BlockTensor, LeakyReLU
from sparsemae.kernels.precision import exactly
from sparsemae.models.blocks import ResidualBlock
from sparsemae.models.mae import SparseMAE, masked_mse
from sparsemae.models.resenc import ResEncUNet

TOLERANCE = 1e-4  # relative, of outputs and gradients, fp32
# Below float32, and in TF32, a network is allowed this much more than what the reference itself
# loses in that precision, and never more than LARGEST.
MARGIN, LARGEST, LOSS_TOLERANCE = 2.0, 0.3, 1e-2
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Setting:
    """What is measured: ResEnc of a preset on one random batch."""

    device: str
    patch: int
    block: int
    mask_ratio: float
    batch: int
    preset: str
    threads: int
    dtype: str = "float32"

    @property
    def exact(self) -> bool:
        """Whether results differ by the rounding of float32 only; on CUDA, products are TF32."""
        return self.device == "cpu" and self.dtype == "float32"

    def autocast(self) -> torch.autocast:
        on = self.dtype != "float32"
        return torch.autocast(self.device, getattr(torch, self.dtype) if on else None, enabled=on)


@dataclass(frozen=True)
class Variant:
    """One way to run a case. `baseline` variants compete for being the reference."""

    case: str
    backend: str
    decode: str | float = "all"
    channels_last: bool = False
    sparse: bool = True
    baseline: bool = False
    floor: float | None = None  # how much faster than the baseline it must be

    @property
    def name(self) -> str:
        layout = " channels-last" if self.channels_last else ""
        dense = "" if self.sparse else " (no mask)"
        return f"{self.case} {self.backend}{dense}{layout}"


THIRD = 1 / 3

VARIANTS = (
    Variant("encoder", "reference", baseline=True),
    Variant("encoder", "reference", channels_last=True, baseline=True),
    Variant("encoder", "torch", floor=3.0),
    Variant("encoder", "dense", sparse=False),
    Variant("step-all", "reference", baseline=True),
    Variant("step-all", "reference", channels_last=True, baseline=True),
    Variant("step-all", "torch", floor=1.6),
    Variant("step-masked", "torch", "masked", floor=2.0),
    Variant("step-third", "torch", THIRD, floor=2.5),
    Variant("step-all", "dense", sparse=False),
)


TRITON = (
    Variant("encoder", "triton", floor=3.5),
    Variant("step-all", "triton", floor=1.6),
    Variant("step-masked", "triton", "masked", floor=2.0),
    Variant("step-third", "triton", THIRD, floor=2.6),
)


def variants_on(device: str) -> tuple[Variant, ...]:
    """What is compared there: on CUDA the triton backend too, and floors are its own."""
    if device == "cpu":
        return VARIANTS
    return *(replace(variant, floor=None) for variant in VARIANTS), *TRITON


def build(variant: Variant, setting: Setting) -> "Runner":
    """The model, its input and its masks, the same for every variant of a setting."""
    torch.set_num_threads(setting.threads)
    torch.manual_seed(0)
    mae = SparseMAE(
        ResEncUNet.from_preset(setting.preset),
        setting.block,
        decode=variant.decode,
        sparse=variant.sparse,
        backend="auto" if variant.backend == "dense" else variant.backend,
    )
    for module in mae.modules():  # at zero, residual branches would be free to check
        if isinstance(module, ResidualBlock):
            nn.init.uniform_(module.conv2.norm.weight, 0.5, 1.5)
    return Runner(mae, variant, setting)


class Runner:
    """Calls run one encoder pass or one training step."""

    def __init__(self, mae: SparseMAE, variant: Variant, setting: Setting):
        device = torch.device(setting.device)
        if variant.channels_last:
            mae = mae.to(memory_format=torch.channels_last_3d)
        self.mae, self.variant, self.setting = mae.to(device), variant, setting
        generator = torch.Generator().manual_seed(0)
        size = (setting.patch,) * 3
        self.x = torch.randn(setting.batch, 1, *size, generator=generator).to(device)
        masks = mae.draw_masks(setting.batch, size, setting.mask_ratio, generator=generator)
        self.masks = masks.to(device)
        self.optimizer = torch.optim.SGD(mae.parameters(), 1e-9, 0.99, nesterov=True)
        self.upstream: list[Tensor] = []

    def __call__(self) -> None:
        if self.variant.case == "encoder":
            self.encode()
            return
        self.optimizer.zero_grad()  # before the forward pass: no gradients beside its activations
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.mae.parameters(), 12.0)
        self.optimizer.step()

    def loss(self) -> Tensor:
        with self.setting.autocast():
            output = self.mae(self.x, self.masks)
        return masked_mse(output, self.x, self.masks.scored)

    def encode(self) -> list[Tensor]:
        """Forward and backward of the encoder alone, from fixed random upstream gradients."""
        self.optimizer.zero_grad()
        with self.setting.autocast():
            skips = self.mae.network.encoder(self.mae.masked_input(self.x, self.masks.visible))
        values = [s if isinstance(s, Tensor) else s.values for s in skips]
        if not self.upstream:
            self.upstream = [self._upstream(s, v) for s, v in zip(skips, values, strict=True)]
        torch.autograd.backward(values, self.upstream)
        return [(s if isinstance(s, Tensor) else s.unpack()).detach() for s in skips]

    def _upstream(self, skip, value: Tensor) -> Tensor:
        place = value.device
        generator = torch.Generator(place).manual_seed(skip.shape[1])
        dense = torch.randn(skip.shape, generator=generator, device=place).to(value.dtype)
        if isinstance(skip, Tensor):
            return dense
        if isinstance(skip, BlockTensor):
            return BlockTensor.pack(dense, skip.mask).features
        return type(skip).pack(dense, skip.mask).dense

    def gradients(self) -> dict[str, Tensor]:
        named = self.mae.named_parameters()
        return {n: p.grad.clone() for n, p in named if p.grad is not None}


def check(variants: tuple[Variant, ...], setting: Setting) -> None:
    """Compare every sparse encoder, and the loss of every full decode, with the reference.

    With GELU for LeakyReLU: at its kink, rounding decides which slope a voxel's gradient gets, and
    the reference differs from itself in another memory format by 6e-3 (ResEnc-L, 96^3).

    Raises:
        RuntimeError: One differs: it is not timed.
    """
    truth, allowed = _truth(setting)
    for variant in variants:
        if variant.sparse and variant.case == "encoder" and not variant.baseline:
            error = _difference(_results(variant, setting), truth)
            if not error <= allowed:
                raise RuntimeError(
                    f"{variant.name} differs from the reference by {error:.1e}, more than "
                    f"{allowed:.1e}"
                )
    losses = {}
    for variant in variants:
        if variant.sparse and variant.case == "step-all":
            with torch.no_grad():
                losses[variant.name] = build(variant, setting).loss().item()
    loss_allowed = TOLERANCE if setting.exact else LOSS_TOLERANCE
    if not max(losses.values()) - min(losses.values()) <= loss_allowed * max(losses.values()):
        raise RuntimeError(f"the losses of one network differ: {losses}")


def _truth(setting: Setting) -> tuple[dict[str, Tensor], float]:
    """Results of the reference in float32, and how far from them a variant may be."""
    reference = Variant("encoder", "reference")
    if setting.exact:
        return _results(reference, setting), TOLERANCE
    with exactly():
        truth = _results(reference, replace(setting, dtype="float32"))
    own = _difference(_results(reference, setting), truth)
    return truth, min(LARGEST, max(TOLERANCE, MARGIN * own))


def _results(variant: Variant, setting: Setting) -> dict[str, Tensor]:
    runner = build(variant, setting)
    _smooth(runner.mae)
    skips = {f"skips.{i}": s for i, s in enumerate(runner.encode())}
    return skips | runner.gradients()


def _smooth(model: nn.Module) -> None:
    for name, child in model.named_children():
        if isinstance(child, LeakyReLU):
            setattr(model, name, GELU())
        else:
            _smooth(child)


def _difference(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest relative difference. A bias before a norm has no gradient but rounding errors, so
    biases are measured against the gradient of the weight beside them."""
    worst = 0.0
    for name, value in truth.items():
        beside = truth.get(name.replace(".bias", ".weight"), value)
        scale = max(value.norm().item(), beside.norm().item())
        error = (found[name].to(value.dtype) - value).norm().item() / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def require_device(name: str) -> torch.device:
    """The device, or a UserError if it is not here."""
    if name not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device here; use --device cpu")
    return torch.device(name)


def parse_setting(
    device: str,
    patch: int,
    block: int,
    mask_ratio: float,
    batch: int,
    preset: str,
    threads: int,
    dtype: str = "float32",
) -> Setting:
    """A setting, checked by building its masks.

    Raises:
        UserError: No such device, a precision it lacks, or sizes that do not fit together.
    """
    require_device(device)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: choose from {', '.join(DTYPES)}")
    if device == "cpu" and dtype != "float32":
        raise UserError(f"--dtype {dtype}: on the CPU this benchmark runs in float32")
    setting = Setting(device, patch, block, mask_ratio, batch, preset, threads, dtype)
    with torch.device("meta"):
        network = ResEncUNet.from_preset(preset)
        mae = SparseMAE(network, block, decode="masked")
    if any(patch % s for s in network.total_stride):
        raise UserError(f"--patch {patch}: use a multiple of {network.total_stride[0]}")
    with torch.device("cpu"):
        mae.draw_masks(batch, (patch,) * 3, mask_ratio)
    return setting
