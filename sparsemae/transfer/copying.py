"""Pre-trained weights into a network of perhaps another topology.

Stages are matched from the finest on, decoder levels by the stage whose resolution they have. What
is copied or not is a unit: a block with its shortcut, or a convolution with its norm. A unit that
does not fit, or that the source lacks, keeps the network's own initialisation.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparsemae.models.resenc import ResEncUNet
from sparsemae.transfer.kernels import resize_kernel, resize_upsampling, spread_channels
from sparsemae.transfer.pretrained import Pretrained
from sparsemae.transfer.shapes import stages_in
from sparsemae.transfer.table import ADAPTED, COPIED, FRESH, Row, TransferTable

Scope = Literal["encoder+decoder", "encoder"]
_HEADS = "heads"


@dataclass(frozen=True)
class _Place:
    """Where a tensor belongs, whatever the number of stages."""

    part: str
    unit: str
    key: str  # of the tensor in its unit


def transfer(
    pretrained: Pretrained, network: ResEncUNet, scope: Scope, *, heads: bool = False
) -> TransferTable:
    """Copy into `network`, in place, all that fits or can be made to fit.

    Input channels, kernels and upsampling strides are adapted, see `transfer.kernels`; stages of
    another width are not.

    Args:
        heads: Copy the output layers too: the network is for the task of the source.
    """
    stages = stages_in(pretrained.tensors)
    sources: dict[str, dict[str, str]] = {}
    for name in pretrained.tensors:
        place = _place(name, stages)
        sources.setdefault(place.unit, {})[place.key] = name
    rows: dict[str, Row] = {}
    units: dict[str, list[tuple[_Place, Tensor]]] = {}
    for name, parameter in network.named_parameters():
        place = _place(name, len(network.topology.features))
        rows.setdefault(place.part, Row(place.part))
        units.setdefault(place.unit, []).append((place, parameter))
    out_of_scope = {p for p in rows if scope == "encoder" and p.startswith(("decoder", _HEADS))}
    used: set[str] = set()
    for unit, members in units.items():
        row = rows[members[0][0].part]
        names = sources.get(unit, {})
        if row.part in out_of_scope or (row.part == _HEADS and not heads):
            fitted, why = None, ""
        else:
            fitted, why = _fitted(members, names, pretrained.tensors)
        if fitted is None:
            row.count(FRESH, len(members), sum(p.numel() for _, p in members))
            if why:
                row.remark(why)
            continue
        used |= set(names.values())
        for (_, parameter), (tensor, how) in zip(members, fitted, strict=True):
            with torch.no_grad():
                parameter.copy_(tensor)
            row.count(ADAPTED if how else COPIED, 1, parameter.numel())
            if how:
                row.remark(how)
    ordered = sorted(rows.values(), key=lambda row: _order(row.part))
    unused = tuple(name for name in pretrained.tensors if name not in used)
    return TransferTable(pretrained.origin, tuple(ordered), unused, pretrained.notes)


def kept(pretrained: Pretrained, names: Collection[str]) -> TransferTable:
    """The table of weights passed on as they are: `names` of the source's tensors."""
    stages = stages_in(pretrained.tensors)
    rows: dict[str, Row] = {}
    for name in names:
        part = _place(name, stages).part
        rows.setdefault(part, Row(part)).count(COPIED, 1, pretrained.tensors[name].numel())
    ordered = sorted(rows.values(), key=lambda row: _order(row.part))
    unused = tuple(name for name in pretrained.tensors if name not in names)
    return TransferTable(pretrained.origin, tuple(ordered), unused, pretrained.notes)


def _fitted(
    members: list[tuple[_Place, Tensor]], names: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[list[tuple[Tensor, str]] | None, str]:
    """The tensors of a unit and how each was adapted, or None and why not."""
    if not names:
        return None, "not in the source"
    keys = {place.key for place, _ in members}
    if odd := sorted(keys ^ names.keys()):
        return None, f"{odd[0]} only in the {'network' if odd[0] in keys else 'source'}"
    out = []
    for place, parameter in members:
        source = tensors[names[place.key]]
        tensor, how = _adapted(place, source, tuple(parameter.shape))
        if tensor.shape != parameter.shape:
            return None, f"{_sizes(source)} features in the source, {_sizes(parameter)} here"
        out.append((tensor, how))
    return out, ""


def _adapted(place: _Place, tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, str]:
    """The tensor made to fit where that can be, and how."""
    if tensor.ndim != 5 or tuple(tensor.shape) == shape:
        return tensor, ""
    resize, what = resize_kernel, "kernel"
    if place.key == "up.weight":
        resize, what = resize_upsampling, "stride"
    how = []
    if place.part == "stem" and tensor.shape[1] != shape[1]:
        how.append(f"{tensor.shape[1]} -> {shape[1]} input channels")
        tensor = spread_channels(tensor, shape[1])
    if tensor.shape[2:] != shape[2:]:
        how.append(f"{what} {_cross(tensor.shape[2:])} -> {_cross(shape[2:])}")
        tensor = resize(tensor, shape[2:])
    return tensor, ", ".join(how)


def _place(name: str, stages: int) -> _Place:
    """Of a canonical name in a network of so many stages."""
    match name.split("."):
        case ["encoder", "stem", *rest]:
            return _Place("stem", "stem", ".".join(rest))
        case ["encoder", "stages", stage, "blocks", block, *rest]:
            key = re.sub(r"^skip\.\d+", "skip", ".".join(rest))  # 1 after a pool, 0 without one
            part = f"encoder stage {stage}"
            return _Place(part, f"{part} block {block}", key)
        case ["decoder", "seg_layers", index, key]:
            return _Place(_HEADS, f"head {stages - 2 - int(index)}", key)
        case ["decoder", "transpconvs", index, key]:
            part = f"decoder level {stages - 2 - int(index)}"
            return _Place(part, f"{part} up", f"up.{key}")
        case ["decoder", "stages", index, "convs", conv, *rest]:
            part = f"decoder level {stages - 2 - int(index)}"
            return _Place(part, f"{part} conv {conv}", ".".join(rest))
    raise AssertionError(name)


def _order(part: str) -> tuple[int, int]:
    kind, _, rest = part.partition(" ")
    number = rest.rpartition(" ")[2]
    return ["stem", "encoder", "decoder", _HEADS].index(kind), int(number or 0)


def _sizes(tensor: Tensor) -> str:
    return _cross(tensor.shape[:2])


def _cross(sizes) -> str:
    return "x".join(map(str, sizes))
