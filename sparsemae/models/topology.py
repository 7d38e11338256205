"""The numbers that define a residual-encoder U-Net, checked, and nnU-Net's presets of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparsemae.errors import UserError
from sparsemae.triples import Triple

PerAxis = int | Sequence[int]  # one number for all axes, or three

# nnU-Net 2.8's nnUNetPlannerResEncM, L and XL plan one network: features double from 32 up to 320,
# blocks 1-3-4-6-6-6 (residual_encoder_unet_planners.py). They differ in the GPU memory they aim at
# (8, 24, 40 GB), hence in patch and batch size; a smaller or larger patch takes or adds a stage.
_NNUNET = {
    "features_per_stage": (32, 64, 128, 256, 320, 320),
    "strides": (1, 2, 2, 2, 2, 2),
    "n_blocks_per_stage": (1, 3, 4, 6, 6, 6),
}

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {  # ours, for CPUs and tests: 32 voxels of patch suffice
        "features_per_stage": (16, 32, 64, 96),
        "strides": (1, 2, 2, 2),
        "n_blocks_per_stage": (1, 1, 2, 2),
    },
    # nnU-Net has no S. Two blocks everywhere is its plain U-Net's depth in residual form, known as
    # resenc_unet_s in code built on Sllambias/gardening_tools (29 M in the encoder, 42 M in all).
    "S": {**_NNUNET, "n_blocks_per_stage": (2, 2, 2, 2, 2, 2)},
    "M": _NNUNET,
    "L": _NNUNET,
    "XL": _NNUNET,
}


ARGUMENTS = (  # of `ResEncUNet`, in nnU-Net's words
    *("features_per_stage", "strides", "n_blocks_per_stage", "kernel_sizes"),
    "n_conv_per_stage_decoder",
)


@dataclass(frozen=True)
class Topology:
    """Stages of a residual-encoder U-Net, finest first; build it with `Topology.parse`."""

    features: tuple[int, ...]
    strides: tuple[Triple, ...]
    blocks: tuple[int, ...]
    kernels: tuple[Triple, ...]
    decoder_convs: tuple[int, ...]  # deepest decoder stage first, one less than stages

    @classmethod
    def parse(
        cls,
        features_per_stage: Sequence[int],
        strides: Sequence[PerAxis],
        n_blocks_per_stage: Sequence[int],
        kernel_sizes: int | Sequence[PerAxis],
        n_conv_per_stage_decoder: int | Sequence[int],
    ) -> "Topology":
        """Check the arguments of `ResEncUNet`, in nnU-Net's words, and spell them out per axis.

        Raises:
            UserError: (a ValueError) An argument is impossible; names it and the remedy.
        """
        features = _counts("features_per_stage", features_per_stage)
        n = len(features)
        if n < 2:
            raise UserError(f"features_per_stage: a U-Net needs at least 2 stages, got {n}")
        if isinstance(kernel_sizes, int):
            kernel_sizes = [kernel_sizes] * n
        if isinstance(n_conv_per_stage_decoder, int):
            n_conv_per_stage_decoder = [n_conv_per_stage_decoder] * (n - 1)
        topology = cls(
            features,
            _triples("strides", strides, (1, 2)),
            _counts("n_blocks_per_stage", n_blocks_per_stage),
            _triples("kernel_sizes", kernel_sizes, (1, 3)),
            _counts("n_conv_per_stage_decoder", n_conv_per_stage_decoder),
        )
        for name, values, expected in (
            ("strides", topology.strides, n),
            ("n_blocks_per_stage", topology.blocks, n),
            ("kernel_sizes", topology.kernels, n),
            ("n_conv_per_stage_decoder", topology.decoder_convs, n - 1),
        ):
            if len(values) != expected:
                raise UserError(
                    f"{name}: {len(values)} entries, but the {n} stages of features_per_stage "
                    f"need {expected}"
                )
        if topology.strides[0] != (1, 1, 1):
            raise UserError(
                f"strides: the first stage works at full resolution, so its stride must be 1, "
                f"got {topology.strides[0]}"
            )
        return topology

    @classmethod
    def preset(cls, name: str) -> "Topology":
        """Of one of `PRESETS`."""
        return cls.parse(**({"kernel_sizes": 3, "n_conv_per_stage_decoder": 1} | PRESETS[name]))

    def arguments(self) -> dict[str, Any]:
        """What `ResEncUNet` and `parse` take, in nnU-Net's words."""
        values = (self.features, self.strides, self.blocks, self.kernels, self.decoder_convs)
        return dict(zip(ARGUMENTS, values, strict=True))

    @property
    def stage_strides(self) -> tuple[Triple, ...]:
        """Input voxels per voxel of each stage and axis, finest first."""
        cumulative = [(1, 1, 1)]
        for stride in self.strides[1:]:
            cumulative.append(tuple(a * b for a, b in zip(cumulative[-1], stride, strict=True)))
        return tuple(cumulative)

    @property
    def total_stride(self) -> Triple:
        """Input voxels per bottleneck voxel: what every patch edge must be a multiple of."""
        return self.stage_strides[-1]


def positive(name: str, value: Any) -> int:
    """`value` if it is a positive int, else a UserError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name}: needs positive integers, got {value!r}")
    return value


def _sequence(name: str, values: Any) -> Sequence:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"{name}: needs a list with one entry per stage, got {values!r}")
    return values


def _counts(name: str, values: Any) -> tuple[int, ...]:
    return tuple(positive(name, v) for v in _sequence(name, values))


def _triples(name: str, values: Any, allowed: tuple[int, int]) -> tuple[Triple, ...]:
    out = []
    for entry in _sequence(name, values):
        triple = (entry,) * 3 if isinstance(entry, int) else tuple(_sequence(name, entry))
        if len(triple) != 3 or any(type(v) is not int or v not in allowed for v in triple):
            raise UserError(
                f"{name}: each stage takes {allowed[0]} or {allowed[1]}, or three of them "
                f"(one per axis), got {entry!r}"
            )
        out.append(triple)
    return tuple(out)
