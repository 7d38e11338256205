"""The topology that the tensors of a `ResEncUNet` show by their names and shapes.

Strides leave no trace in an encoder; the decoder's transposed convolutions have them as kernels.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.models.topology import Topology

_STAGE = re.compile(r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.conv1\.conv\.weight")
_UP = re.compile(r"decoder\.transpconvs\.(\d+)\.weight")
_CONV = re.compile(r"decoder\.stages\.(\d+)\.convs\.(\d+)\.conv\.weight")
STEM = "encoder.stem.convs.0.conv.weight"


def stages_in(tensors: Mapping[str, Tensor]) -> int:
    """How many stages the encoder has."""
    return 1 + max((int(m[1]) for name in tensors if (m := _STAGE.fullmatch(name))), default=-1)


def topology_of(
    tensors: Mapping[str, Tensor], origin: Path, *, told: Topology | None = None
) -> Topology | None:
    """The topology of tensors under canonical names, in their axes.

    Args:
        told: What the file says; its strides are taken where tensors show none and all else agrees.

    Returns:
        None if nothing tells the strides.

    Raises:
        UserError: Stages or blocks are missing, or no network of ours has such kernels.
    """
    first: dict[tuple[int, int], Tensor] = {}
    for name, tensor in tensors.items():
        if match := _STAGE.fullmatch(name):
            first[int(match[1]), int(match[2])] = tensor
    stages = stages_in(tensors)
    blocks = [sum(1 for stage, _ in first if stage == s) for s in range(stages)]
    for stage, block in ((s, b) for s in range(stages) for b in range(max(1, blocks[s]))):
        if (stage, block) not in first:
            raise UserError(
                one_line(f"{origin}: encoder.stages.{stage}.blocks.{block} is missing: the file ")
                + "holds a part of a network; save all of it"
            )
    features = [first[s, 0].shape[0] for s in range(stages)]
    kernels = [tuple(first[s, 0].shape[2:]) for s in range(stages)]
    strides, convs = _decoder(tensors, stages)
    try:
        if strides is not None:
            return Topology.parse(features, strides, blocks, kernels, convs)
        known = Topology.parse(features, [1] * stages, blocks, kernels, 1)
    except UserError as error:
        raise UserError(one_line(f"{origin}: {error}")) from None
    if told is None or any(
        getattr(told, name) != getattr(known, name) for name in ("features", "blocks", "kernels")
    ):
        return None
    return told


def _decoder(tensors: Mapping[str, Tensor], stages: int) -> tuple[list | None, list[int]]:
    """Strides of all stages and convolutions of each decoder level, deepest first."""
    ups, convs = {}, [0] * (stages - 1)
    for name, tensor in tensors.items():
        if match := _UP.fullmatch(name):
            ups[int(match[1])] = tuple(tensor.shape[2:])
        elif (match := _CONV.fullmatch(name)) and int(match[1]) < stages - 1:
            convs[int(match[1])] += 1
    if set(ups) != set(range(stages - 1)) or not all(convs):
        return None, convs
    return [(1, 1, 1), *(ups[j] for j in reversed(range(stages - 1)))], convs
