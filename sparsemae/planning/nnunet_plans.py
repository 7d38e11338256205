"""nnU-Net's plans as a `Plan`: whose axes they have, and which of its networks we can build.

nnU-Net reads arrays [z, y, x] and puts their axes in the order `transpose_forward`: axis i of what
its network sees is axis `2 - transpose_forward[i]` of our arrays [x, y, z].
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemae.config import build_config, is_number
from sparsemae.data.codes import one_line
from sparsemae.data.finding.written import json_kind, read_json
from sparsemae.errors import UserError
from sparsemae.models.topology import Topology, positive
from sparsemae.planning.plan import Plan
from sparsemae.triples import Triple

NORMALIZATIONS = {
    "ZScoreNormalization": "zscore",
    "CTNormalization": "ct",
    "RescaleTo01Normalization": "rescale",
    "NoNormalization": "none",
}
_AGAIN = "plan again with nnUNetv2_plan_experiment -pl nnUNetPlannerResEncL"
_FIXED = {  # of the network, by key: what we build
    "conv_op": "Conv3d",
    "norm_op": "InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": "LeakyReLU",
    "conv_bias": True,
    "dropout_op": None,
}
_INTENSITIES = {
    "mean": "mean",
    "std": "std",
    "low": "percentile_00_5",
    "high": "percentile_99_5",
}
_NUMBERS = ("features_per_stage", "strides", "n_blocks_per_stage", "kernel_sizes")
_ORDINARY = {
    *_FIXED, *_NUMBERS, "n_stages", "n_conv_per_stage_decoder", "dropout_op_kwargs",
    "nonlin_kwargs", "deep_supervision",
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Of one configuration of plans, in our axes."""

    axes: Triple  # axis i of the network is our axis axes[i]
    spacing: tuple[float, float, float]  # mm
    patch_size: Triple
    topology: Topology


@dataclass(frozen=True)
class NnunetPlans:
    """nnU-Net's plans for a data set."""

    plan: Plan  # in our axes
    axes: Triple  # axis i of nnU-Net's network is our axis axes[i]
    num_classes: int | None  # outputs of its network; None without dataset.json
    channels: tuple[str, ...]


def read_plans(
    plans: Path | Mapping[str, Any],
    dataset_json: Path | Mapping[str, Any] | None = None,
    configuration: str = "3d_fullres",
    *,
    place: str = "plans",
) -> NnunetPlans:
    """Read `plans.json`, or what a checkpoint holds of it; a 3D residual-encoder U-Net.

    Args:
        dataset_json: Of the same data set; names channels and classes.
        place: What messages call plans that are no file.

    Raises:
        UserError: Another network, a 2D or cascade configuration, an unknown normalisation, a key
            that is missing or makes no sense; names the key.
    """
    place, plans = _content(plans, place)
    geometry = read_geometry(plans, configuration, place=place)
    found = _configuration(plans, configuration, place)
    at = f"{place}: configurations.{configuration}."
    schemes = _listed(found, "normalization_schemes", at)
    masks = _listed(found, "use_mask_for_norm", at)
    if len(masks) != len(schemes):
        raise UserError(f"{at}use_mask_for_norm: {len(masks)} entries for {len(schemes)} channels")
    names, num_classes = tuple(map(str, range(len(schemes)))), None
    if dataset_json is not None:
        where, about = _content(dataset_json, "dataset.json")
        names, num_classes = _channels(about, f"{where}: "), _outputs(about, f"{where}: ")
        if len(names) != len(schemes):
            raise UserError(
                f"{where}: channel_names: {len(names)}, but {place} has {len(schemes)} "
                f"normalization_schemes: take both files of one data set"
            )
    raw = {
        "planner": "plans.json",
        "spacing": geometry.spacing,
        "patch_size": geometry.patch_size,
        "batch_size": _need(found, "batch_size", at),
        "channels": [
            _channel(plans, place, number, name, scheme, mask)
            for number, (name, scheme, mask) in enumerate(zip(names, schemes, masks, strict=True))
        ],
        **geometry.topology.arguments(),
        "batch_dice": found.get("batch_dice", False),
    }
    try:
        plan = build_config(Plan, raw)
    except UserError as error:
        raise UserError(f"{at[:-1]}: {error}") from None
    return NnunetPlans(plan, geometry.axes, num_classes, names)


def read_geometry(
    plans: Mapping[str, Any], configuration: str = "3d_fullres", *, place: str = "plans"
) -> Geometry:
    """Axes, voxel size, patch and network of a configuration.

    Raises:
        UserError: As of `read_plans`.
    """
    at = f"{place}: configurations.{configuration}."
    found = _configuration(plans, configuration, place)
    if found.get("previous_stage") is not None:
        raise UserError(
            f"{at}previous_stage: the second half of a cascade, which also reads the first one's "
            f"segmentation; take 3d_fullres"
        )
    axes = network_axes(
        _need(plans, "transpose_forward", f"{place}: "), f"{place}: transpose_forward"
    )
    spacing, patch = _three(found, "spacing", at), _three(found, "patch_size", at)
    arguments = _architecture(found, at)
    try:
        topology = in_our_axes(network_topology(arguments), axes)
    except UserError as error:
        raise UserError(f"{at}architecture: {error}") from None
    spacing = tuple(map(float, to_our_axes(spacing, axes)))
    return Geometry(axes, spacing, to_our_axes(patch, axes), topology)


def network_axes(transpose_forward: Any, place: str = "transpose_forward") -> Triple:
    """Of nnU-Net's `transpose_forward`: axis i of its network is our axis `network_axes(...)[i]`.

    Raises:
        UserError: It is no order of three axes.
    """
    order = transpose_forward
    if not isinstance(order, Sequence) or isinstance(order, str) or len(order) != 3:
        raise UserError(f"{place}: {order!r} is no order of three axes; {_AGAIN}")
    if any(type(axis) is not int for axis in order) or sorted(order) != [0, 1, 2]:
        raise UserError(f"{place}: {order!r} is no order of the axes 0, 1 and 2; {_AGAIN}")
    return tuple(2 - axis for axis in order)


def to_our_axes(values: Sequence, axes: Triple) -> tuple:
    """One value per axis, from the network's order to ours."""
    return tuple(values[axes.index(axis)] for axis in range(3))


def to_network_axes(values: Sequence, axes: Triple) -> tuple:
    """One value per axis, from our order to the network's."""
    return tuple(values[axis] for axis in axes)


def in_our_axes(topology: Topology, axes: Triple) -> Topology:
    """A topology in the network's axes, in ours."""
    return _reordered(topology, lambda values: to_our_axes(values, axes))


def in_network_axes(topology: Topology, axes: Triple) -> Topology:
    """A topology in our axes, in the network's."""
    return _reordered(topology, lambda values: to_network_axes(values, axes))


def network_topology(arch_kwargs: Mapping[str, Any]) -> Topology:
    """Of the arguments of nnU-Net's `ResidualEncoderUNet`, in their axes.

    Raises:
        UserError: A network that is not ours; names the argument.
    """
    for key, value in arch_kwargs.items():
        if key in _FIXED and not _same(value, _FIXED[key]):
            raise UserError(f"{key}: {value!r}, but this network has {_FIXED[key]!r}; {_AGAIN}")
        if key not in _ORDINARY and value not in (None, 0, False):
            raise UserError(f"{key}: {value!r}, a network of another kind; {_AGAIN}")
    decoder = arch_kwargs.get("n_conv_per_stage_decoder", 1)
    return Topology.parse(*(_need(arch_kwargs, key, "") for key in _NUMBERS), decoder)


def _reordered(topology: Topology, order) -> Topology:
    strides, kernels = (tuple(map(order, s)) for s in (topology.strides, topology.kernels))
    return Topology(topology.features, strides, topology.blocks, kernels, topology.decoder_convs)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, str):  # the name of a class
        return isinstance(value, str) and value.rpartition(".")[2] == expected
    return value == expected


def _content(source: Path | Mapping[str, Any], place: str) -> tuple[str, Mapping[str, Any]]:
    """What messages call it, and the object in it."""
    if isinstance(source, Mapping):
        return place, source
    return one_line(str(source)), read_json(os.fspath(source))


def _configuration(plans: Mapping[str, Any], name: str, place: str) -> dict[str, Any]:
    """With what it inherits."""
    known = _need(plans, "configurations", f"{place}: ")
    out: dict[str, Any] = {}
    seen: list[str] = []
    while name is not None:
        at = f"{place}: configurations.{name}"
        if not isinstance(known, Mapping) or not isinstance(known.get(name), Mapping):
            names = ", ".join(map(str, known)) if isinstance(known, Mapping) else "none"
            raise UserError(f"{at}: missing; there are {names}")
        if name in seen:
            raise UserError(f"{at}.inherits_from: leads in a circle; {_AGAIN}")
        seen.append(name)
        out = {**known[name], **out}
        name = known[name].get("inherits_from")
    return out


def _architecture(configuration: Mapping[str, Any], at: str) -> Mapping[str, Any]:
    """The arguments of the network, also of plans from before nnU-Net 2.5."""
    if "architecture" not in configuration and "UNet_class_name" in configuration:
        return _old_architecture(configuration, at)
    architecture = _need(configuration, "architecture", at)
    at = f"{at}architecture."
    if not isinstance(architecture, Mapping):
        raise UserError(f"{at[:-1]}: {json_kind(architecture)}; {_AGAIN}")
    _check_class(_need(architecture, "network_class_name", at), f"{at}network_class_name")
    arguments = _need(architecture, "arch_kwargs", at)
    if not isinstance(arguments, Mapping):
        raise UserError(f"{at}arch_kwargs: {json_kind(arguments)}; {_AGAIN}")
    return arguments


def _old_architecture(configuration: Mapping[str, Any], at: str) -> dict[str, Any]:
    _check_class(configuration["UNet_class_name"], f"{at}UNet_class_name")
    blocks = _listed(configuration, "n_conv_per_stage_encoder", at)
    base, most = (
        positive(f"{at}{key}", _need(configuration, key, at))
        for key in ("UNet_base_num_features", "unet_max_num_features")
    )
    return {
        "features_per_stage": [min(base * 2**stage, most) for stage in range(len(blocks))],
        "strides": _listed(configuration, "pool_op_kernel_sizes", at),
        "n_blocks_per_stage": blocks,
        "kernel_sizes": _listed(configuration, "conv_kernel_sizes", at),
        "n_conv_per_stage_decoder": _listed(configuration, "n_conv_per_stage_decoder", at),
    }


def _check_class(name: Any, at: str) -> None:
    if not _same(name, "ResidualEncoderUNet"):
        raise UserError(
            f"{at}: {name!r}, but only ResidualEncoderUNet fits: {_AGAIN}, then train with "
            f"-p nnUNetResEncUNetLPlans"
        )


def _channel(
    plans: Mapping[str, Any], place: str, number: int, name: str, scheme: Any, mask: Any
) -> dict[str, Any]:
    normalization = NORMALIZATIONS.get(scheme) if isinstance(scheme, str) else None
    if normalization is None:
        raise UserError(
            f"{place}: normalization_schemes: {scheme!r} of channel {name} is none of "
            f"{', '.join(NORMALIZATIONS)}"
        )
    out = {"name": name, "normalization": normalization, "masked": mask}
    known = plans.get("foreground_intensity_properties_per_channel")
    values = known.get(str(number)) if isinstance(known, Mapping) else None
    if isinstance(values, Mapping):
        at = f"{place}: foreground_intensity_properties_per_channel.{number}."
        numbers = {ours: _need(values, theirs, at) for ours, theirs in _INTENSITIES.items()}
        if not all(map(is_number, numbers.values())):
            raise UserError(f"{at[:-1]}: not numbers; {_AGAIN}")
        out["intensities"] = {ours: float(value) for ours, value in numbers.items()}
    elif normalization == "ct":
        raise UserError(
            f"{place}: foreground_intensity_properties_per_channel.{number}: missing, and "
            f"CTNormalization needs it; {_AGAIN}"
        )
    return out


def _channels(about: Mapping[str, Any], at: str) -> tuple[str, ...]:
    """In the order of their numbers; "modality" is nnU-Net 1's word."""
    key = "channel_names" if "channel_names" in about else "modality"
    named = _need(about, key, at)
    try:
        return tuple(str(named[k]) for k in sorted(named, key=int))
    except (TypeError, ValueError, AttributeError):
        raise UserError(f'{at}{key}: write {{"0": NAME, "1": NAME, ...}}') from None


def _outputs(about: Mapping[str, Any], at: str) -> int:
    """As nnU-Net counts them: of regions each but the background, else each label but `ignore`."""
    labels = _need(about, "labels", at)
    if not isinstance(labels, Mapping) or len(labels) < 2:
        raise UserError(f'{at}labels: write {{"background": 0, NAME: 1, ...}}')
    known = [value for name, value in labels.items() if name != "ignore"]
    regions = any(isinstance(value, list | tuple) and len(value) > 1 for value in known)
    return len([v for v in known if v not in (0, [0])]) if regions else len(known)


def _need(values: Mapping[str, Any], key: str, at: str) -> Any:
    """`values[key]`; `at` is what comes before the key in a message."""
    if key not in values:
        raise UserError(f"{at}{key}: missing; {_AGAIN}")
    return values[key]


def _listed(values: Mapping[str, Any], key: str, at: str) -> Sequence:
    found = _need(values, key, at)
    if not isinstance(found, list | tuple):
        raise UserError(f"{at}{key}: {json_kind(found)} where a list is expected; {_AGAIN}")
    return found


def _three(values: Mapping[str, Any], key: str, at: str) -> Sequence:
    found = _listed(values, key, at)
    if len(found) == 2:
        raise UserError(f"{at}{key}: a 2D configuration; take 3d_fullres")
    if len(found) != 3 or not all(map(is_number, found)):
        raise UserError(f"{at}{key}: {list(found)!r} is not three numbers; {_AGAIN}")
    return found
