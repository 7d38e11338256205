"""Pre-trained weights from a run of ours or a file of anybody's, in one form.

Names are those of `ResEncUNet.named_parameters()`, axes ours. nnU-Net and nnssl say in their files
how their axes were ordered; a state dict that says nothing is taken as [z, y, x], as theirs are.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from sparsemae.checkpoint import load_checkpoint
from sparsemae.config import is_number
from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.kinds import FINETUNING, kind_of
from sparsemae.models.topology import Topology
from sparsemae.planning.nnunet_plans import (
    in_our_axes,
    network_axes,
    network_topology,
    read_geometry,
    to_our_axes,
)
from sparsemae.runfiles import CHECKPOINTS, CONFIG, PLAN
from sparsemae.transfer.kernels import OURS, from_network_axes
from sparsemae.transfer.names import TAKEN, canonical
from sparsemae.transfer.shapes import topology_of
from sparsemae.triples import Triple
from sparsemae.weights import Weights, read_weights

RUN, SAFETENSORS, NNUNET, NNSSL = "sparsemae run", "sparsemae safetensors", "nnU-Net", "nnssl"
STATE_DICT = "state dict"
METADATA = "sparsemae"  # the key of what we say about weights; in safetensors it is JSON
FORMAT = "format"  # the key of its version
ZYX = (2, 1, 0)  # the network's axes where nothing is said: SimpleITK's
Spacing = tuple[float, float, float]


@dataclass(frozen=True)
class Pretrained:
    """Weights of a `ResEncUNet`, or of its encoder, and what is known of them."""

    origin: Path
    kind: str  # RUN, SAFETENSORS, NNUNET, NNSSL or STATE_DICT
    tensors: dict[str, Tensor]  # float32, each under one name, our axes
    topology: Topology | None = None  # None where nothing tells the strides
    spacing: Spacing | None = None  # mm of the voxels it was trained on; None if various
    patch_size: Triple | None = None
    normalization: str | None = None  # of the intensities it was trained on
    # how it was trained; plain data, and nothing of single cases, since exports hold it
    recipe: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what was renamed, turned, left out

    @property
    def input_channels(self) -> int:
        return self.tensors["encoder.stem.convs.0.conv.weight"].shape[1]


def read_pretrained(path: Path) -> Pretrained:
    """Read one of our run folders or exports, a checkpoint of nnU-Net or nnssl, or a state dict.

    Raises:
        UserError: Not there, damaged, another network, several networks.
    """
    path = Path(path)
    if path.is_dir():
        if kind_of(path) == FINETUNING:
            return _finetuned(path)
        if not (path / CONFIG).is_file():
            raise UserError(one_line(f"{path}: {_folder_hint(path)}"))
        return _pretrained(path)
    if re.fullmatch(r"step-\d{8}", path.parent.name) and path.suffix == ".safetensors":
        run = path.parent.parent.parent
        raise UserError(one_line(f"{path}: a part of a checkpoint; name the run folder, {run}"))
    return _from_file(read_weights(path))


def _folder_hint(path: Path) -> str:
    if re.fullmatch(r"step-\d{8}", path.name) or path.name == CHECKPOINTS:
        return "checkpoints of a run; name the run folder itself"
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        if (path / name).is_file():
            return f"a folder; name the file in it, {path / name}"
    return f"no run there (no {CONFIG}); name a run folder or a file with weights"


def _pretrained(run: Path) -> Pretrained:
    from sparsemae.pretrain import load_run  # needs the whole training stack

    read = load_run(run)
    tensors = {name: p.detach() for name, p in read.mae.network.named_parameters()}
    notes = list(read.warnings)
    for what, parts in (
        ("mask tokens", read.mae.mask_tokens),
        ("densify layers", read.mae.densify),
    ):
        if len(parts):
            notes.append(f"left out {len(parts)} {what}, which only pre-training needs")
    prepared = read.checkpoint.meta.get("preprocess") or {}
    return Pretrained(
        run,
        RUN,
        tensors,
        read.mae.network.topology,
        _three(prepared.get("spacing"), OURS, float),
        read.config.data.patch_size,
        prepared.get("normalization"),
        {"step": read.checkpoint.step, "pretraining": read.config.model_dump(mode="json")},
        tuple(notes),
    )


def _finetuned(run: Path) -> Pretrained:
    from sparsemae.finetuning.runs import read_plan

    plan = read_plan(run)
    checkpoint, warnings = load_checkpoint(run / CHECKPOINTS)
    weights = checkpoint.ema()
    named = canonical(checkpoint.model() if weights is None else weights, run)
    found = topology_of(named.tensors, run)
    if found != plan.topology:
        raise UserError(
            one_line(f"{run / PLAN}: not the plan of the run's checkpoints; restore it")
        )
    task = checkpoint.meta.get("task", {})
    shared = {key: task[key] for key in ("dataset", "channels", "classes") if key in task}
    recipe = {"plan": plan.model_dump(mode="json"), "task": shared}
    return Pretrained(
        run,
        RUN,
        named.tensors,
        found,
        plan.spacing,
        plan.patch_size,
        plan.channels[0].normalization,
        {"step": checkpoint.step, **recipe},
        (*warnings, *named.notes),
    )


def _from_file(weights: Weights) -> Pretrained:
    about = _facts(weights)
    named = canonical(weights.tensors, weights.origin, encoder=about.encoder)
    notes = [*named.notes]
    tensors = named.tensors
    if about.axes != OURS:
        tensors = from_network_axes(tensors, about.axes)
        notes.append(f"turned kernels from axes {_letters(about.axes)} to x, y, z{about.guess}")
    topology = topology_of(tensors, weights.origin, told=about.topology)
    return Pretrained(
        weights.origin,
        about.kind,
        tensors,
        topology,
        about.spacing,
        about.patch_size,
        about.normalization,
        about.recipe,
        tuple(notes),
    )


@dataclass(frozen=True)
class _Facts:
    """What a file says beside its weights; in our axes."""

    kind: str
    axes: Triple = ZYX
    guess: str = ""  # why these axes, where the file does not say
    encoder: str | None = None
    topology: Topology | None = None
    spacing: Spacing | None = None
    patch_size: Triple | None = None
    normalization: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)


def _facts(weights: Weights) -> _Facts:
    extra, place = weights.extra, one_line(str(weights.origin))
    started = extra.get("init_args")
    started = started if isinstance(started, Mapping) else {}
    adaptation = extra.get("nnssl_adaptation_plan")
    if METADATA in extra:
        kind = NNUNET if adaptation is None else NNSSL
        return _our_facts(SAFETENSORS if weights.kind == "safetensors" else kind, extra, place)
    if isinstance(adaptation, Mapping):
        return _nnssl_facts(adaptation, place)
    if isinstance(started.get("plans"), Mapping):
        name = started.get("configuration", "3d_fullres")
        plans = started["plans"]
        found = read_geometry(plans, str(name), place=f"{place}: init_args.plans")
        recipe = {"trainer": extra.get("trainer_name"), "dataset": plans.get("dataset_name")}
        return _Facts(
            NNUNET,
            found.axes,
            topology=found.topology,
            spacing=found.spacing,
            patch_size=found.patch_size,
            recipe=recipe,
        )
    if isinstance(started.get("plan"), Mapping):  # nnssl's own training checkpoint
        return _nnssl_facts({"pretrain_plan": started["plan"]}, place)
    return _Facts(STATE_DICT, guess=", as nnU-Net's are; the file does not say")


def _our_facts(kind: str, extra: Mapping[str, Any], place: str) -> _Facts:
    try:
        values = extra[METADATA]
        values = json.loads(values) if isinstance(values, str) else values
        if (version := values[FORMAT]) == 1:
            return _described(kind, values)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        text = one_line(f"{place}: its metadata is damaged ({error}); export it again")
        raise UserError(text) from None
    raise UserError(
        one_line(f"{place}: of format {version!r}, which this version of sparsemae does not read; ")
        + "update sparsemae"
    )


def _described(kind: str, values: Mapping[str, Any]) -> _Facts:
    """What `exporting.metadata.describe` said; an error of some kind if it cannot have."""
    axes, topology, recipe = tuple(values["axes"]), values["topology"], values["recipe"]
    if sorted(axes) != [0, 1, 2] or not isinstance(recipe, dict):
        raise ValueError("axes or recipe")
    if topology is not None:
        names = ("features", "strides", "blocks", "kernels", "decoder_convs")
        topology = Topology.parse(*(topology[name] for name in names))
    return _Facts(
        kind,
        axes,
        topology=topology,
        spacing=_three(values["spacing"], OURS, float),
        patch_size=_three(values["patch_size"], OURS, int),
        normalization=values["normalization"],
        recipe=recipe,
    )


def _nnssl_facts(adaptation: Mapping[str, Any], place: str) -> _Facts:
    """Of an adaptation plan: lenient, since nnssl changed its form several times."""
    plan = _section(adaptation, "pretrain_plan")
    architecture = _section(adaptation, "architecture_plans")
    name = architecture.get("arch_class_name", adaptation.get("architecture_name"))
    at = f"{place}: arch_class_name"
    topology = None
    if name in ("ResEncL", "NoSkipResEncL"):
        topology = Topology.preset("L")
    elif isinstance(name, str) and not name.endswith("ResidualEncoderUNet"):
        raise UserError(one_line(f"{at}: {name!r}; {TAKEN}"))
    axes = ZYX
    if "transpose_forward" in plan:
        axes = network_axes(plan["transpose_forward"], f"{place}: transpose_forward")
    if topology is None and (arguments := _section(architecture, "arch_kwargs")):
        topology = in_our_axes(network_topology(arguments), axes)
    configurations = list(_section(plan, "configurations").values())
    used = configurations[0] if configurations and isinstance(configurations[0], Mapping) else {}
    patch = used.get("patch_size", adaptation.get("input_patch_size"))
    encoder = adaptation.get("key_to_encoder", adaptation.get("state_dict_key_to_encoder"))
    return _Facts(
        NNSSL,
        axes,
        encoder=encoder.removesuffix(".stages") if isinstance(encoder, str) else None,
        topology=topology,
        spacing=_three(used.get("spacing"), axes, float),
        patch_size=_three(patch, axes, int),
        recipe={"dataset": plan.get("dataset_name")},
    )


def _section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = values.get(key)
    return found if isinstance(found, Mapping) else {}


def _three(values: Any, axes: Triple, kind: type) -> Any:
    """One number per axis, in our axes, or None."""
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(is_number, values)):
        return None
    return tuple(map(kind, to_our_axes(values, axes)))


def _letters(axes: Triple) -> str:
    return ", ".join("xyz"[axis] for axis in axes)
