"""A plan around weights: the network, spacing and patch of the pre-training, whatever the images.

So every weight has its place, and voxels are as large as those it was trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsemae.errors import UserError
from sparsemae.models.topology import Topology
from sparsemae.planning.fingerprint import Fingerprint
from sparsemae.planning.plan import Plan
from sparsemae.planning.rules import (
    MIN_BATCH,
    channel_plans,
    checked_batch,
    checked_patch,
    checked_spacing,
    median_shape,
    median_spacing,
)
from sparsemae.segmentation.dataset import Dataset
from sparsemae.triples import Triple

# nnU-Net uses batch Dice where it plans a coarser network too: a patch covers less than a quarter
# of the image, and a coarser image of which it covers a quarter has half as many voxels or fewer
_COVERED = 0.25 / 2


@dataclass(frozen=True)
class Reference:
    """What is known of a pre-training. Triples have the axes of our arrays, RAS."""

    topology: Topology
    patch_size: Triple
    spacing: tuple[float, float, float] | None = None  # mm; None: each image kept its own


def plan_like_pretrained(
    fingerprint: Fingerprint,
    dataset: Dataset,
    pretrained: Reference,
    *,
    spacing: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Plan:
    """The pre-trained network for the channels of the data set; what is given replaces a choice.

    The spacing is the pre-training's, or the data set's median if that had none. The patch is the
    pre-training's too, but along no axis longer than the median image, rounded up to the network's
    strides, or two steps of them. Channels are normalised by their names, as nnU-Net does.

    Raises:
        UserError: An argument is out of range, or a patch is not one that the network can take.
    """
    if spacing is None:
        spacing = pretrained.spacing or median_spacing(fingerprint)
    spacing = checked_spacing(spacing)
    topology = pretrained.topology
    median = median_shape(fingerprint, spacing)
    if patch_size is None:
        usual = _divisible(pretrained.patch_size, topology, "the pre-training's patch_size")
        patch_size = tuple(
            min(edge, max(math.ceil(n / stride), 2) * stride)
            for edge, n, stride in zip(usual, median, topology.total_stride, strict=True)
        )
    else:
        patch_size = _divisible(checked_patch(patch_size), topology, "patch_size")
    return Plan(
        planner="like_pretrained",
        spacing=spacing,
        patch_size=patch_size,
        batch_size=MIN_BATCH if batch_size is None else checked_batch(batch_size),
        channels=channel_plans(fingerprint, dataset),
        **topology.arguments(),
        batch_dice=bool(math.prod(patch_size) / np.prod(median) < _COVERED),
    )


def _divisible(patch_size: Triple, topology: Topology, name: str) -> Triple:
    strides = topology.total_stride
    if any(n % stride for n, stride in zip(patch_size, strides, strict=True)):
        nearest = tuple(
            max(round(n / stride), 1) * stride
            for n, stride in zip(patch_size, strides, strict=True)
        )
        raise UserError(
            f"{name} {patch_size}: its edges must be multiples of {strides}, the network's "
            f"strides; the nearest is {nearest}"
        )
    return patch_size
