"""nnU-Net's planners nnUNetPlannerResEncM, L and XL: patch, network and batch that fit a memory.

The rules are those of nnunetv2 2.8.1 for 3d_fullres (residual_encoder_unet_planners.py). It plans
with axes in an order of its own, which decides between equal ones: so does this, until the end.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from sparsemae.errors import UserError
from sparsemae.models.topology import Topology
from sparsemae.planning.cost import feature_map_size
from sparsemae.planning.fingerprint import Fingerprint
from sparsemae.planning.nnunet_plans import in_our_axes, to_network_axes, to_our_axes
from sparsemae.planning.plan import Plan
from sparsemae.planning.pooling import Pooling, nearest_patch, pool
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

# GB of GPU memory each preset aims at, and the feature map size of a network that fills it
TARGETS = {"M": (8.0, 680_000_000), "L": (24.0, 2_100_000_000), "XL": (40.0, 3_600_000_000)}

_BATCH = 2  # of the network that fills the memory
_FEATURES, _MOST_FEATURES = 32, 320
_BLOCKS = (1, 3, 4)  # of the first stages; all others have 6
_BLOCKS_BELOW = 6
_START = 256  # a first patch has as many voxels as a cube of this edge
_LOWRES = 0.25  # a patch that covers less of the median image gets a coarser network beside it
_COARSER = 1.03  # steps of spacing in the search for that
_LOWRES_GAIN = 2  # voxels it must save, as a factor

Array = Float[np.ndarray, "3"]


def plan_nnunet(
    fingerprint: Fingerprint,
    dataset: Dataset,
    *,
    preset: Literal["M", "L", "XL"] = "L",
    memory_gb: float | None = None,
    spacing: Sequence[float] | None = None,
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Plan:
    """The plan that nnU-Net makes; what is given replaces what it would choose.

    Args:
        memory_gb: GPU memory to plan for; by default the preset's 8, 24 or 40.
        spacing: mm, in our axes as the patch; the patch and network follow from it.
        patch_size: Voxels; the network follows from it.

    Raises:
        UserError: An argument is out of range, the patch is not one that its network can take, or
            nothing fits the memory.
    """
    budget = _budget(preset, memory_gb)
    spacing = median_spacing(fingerprint) if spacing is None else checked_spacing(spacing)
    axes = network_axes(spacing)
    mm = np.array(to_network_axes(spacing, axes))
    median = median_shape(fingerprint, spacing)[list(axes)]
    outputs = len(dataset.classes.numbers)  # nnU-Net counts the ignored label too
    if patch_size is None:
        pooling = _fitting(mm, median, outputs, budget)
    else:
        pooling = _given(mm, checked_patch(patch_size), axes)
    topology = _network(pooling)
    if batch_size is None:
        cost = feature_map_size(topology, pooling.patch_size, outputs)
        covered = np.prod(median) * len(dataset.training) / np.prod(pooling.patch_size)
        batch_size = max(min(round(budget / cost * _BATCH), round(covered)), MIN_BATCH)

    return Plan(
        planner="nnunet",
        spacing=spacing,
        patch_size=to_our_axes(pooling.patch_size, axes),
        batch_size=checked_batch(batch_size),
        channels=channel_plans(fingerprint, dataset),
        **in_our_axes(topology, axes).arguments(),
        batch_dice=_has_lowres(mm, median, pooling.patch_size, outputs, budget),
    )


def network_axes(spacing: Sequence[float]) -> Triple:
    """Which of our axes are the first, second and third of nnU-Net's network.

    Its arrays have inferior-superior first and left-right last; the axis of the longest voxels is
    moved to the front (`transpose_forward`).
    """
    front = max((2, 1, 0), key=lambda axis: spacing[axis])
    return (front, *(axis for axis in (2, 1, 0) if axis != front))


def _budget(preset: str, memory_gb: float | None) -> float:
    """The feature map size to stay below."""
    if preset not in TARGETS:
        raise UserError(f"preset {preset!r}: choose from {', '.join(TARGETS)}")
    usual, reference = TARGETS[preset]
    memory_gb = usual if memory_gb is None else memory_gb
    if not 0 < memory_gb < float("inf"):
        raise UserError(f"memory_gb {memory_gb}: give a positive number of GB")
    return reference * (memory_gb / usual)


def _given(spacing: Array, patch_size: Triple, axes: Triple) -> Pooling:
    """The network of a patch that a person chose."""
    wanted = to_network_axes(patch_size, axes)
    pooling = pool(spacing, wanted)
    if pooling.patch_size != wanted:
        nearest = nearest_patch(spacing, wanted)
        raise UserError(
            f"patch_size {patch_size}: its edges must be multiples of "
            f"{to_our_axes(pooling.divisor, axes)}, the strides of its network; the nearest is "
            f"{to_our_axes(nearest, axes)}"
        )
    return pooling


def _fitting(spacing: Array, median: Array, outputs: int, budget: float) -> Pooling:
    """The largest network within the budget, with a patch of the median image's proportions."""
    density = 1 / spacing
    edges = density * (_START**3 / np.prod(density)) ** (1 / 3)
    pooling = pool(spacing, [min(round(a), b) for a, b in zip(edges.tolist(), median, strict=True)])
    while feature_map_size(_network(pooling), pooling.patch_size, outputs) > budget:
        pooling = _smaller(pooling, spacing, median)
    return pooling


def _smaller(pooling: Pooling, spacing: Array, median: Array) -> Pooling:
    """The axis that covers most of the median image, the last of equal ones, shortened a step."""
    axis = int(np.argsort(pooling.patch_size / median, kind="stable")[-1])
    size = list(pooling.patch_size)
    if size[axis] <= 1:
        raise UserError("memory_gb: no network of nnU-Net's is that small; give more")
    # a shorter patch may be halved less often, and then be cut in smaller steps
    size[axis] -= pooling.divisor[axis]
    step = pool(spacing, size).divisor[axis]
    return pool(spacing, [n - step * (i == axis) for i, n in enumerate(pooling.patch_size)])


def _network(pooling: Pooling) -> Topology:
    stages = len(pooling.strides)
    if stages < 2:
        raise UserError(
            "patch_size: too few voxels along the finest axis to halve it, as a U-Net must; set "
            "another spacing, a larger patch_size or more memory_gb"
        )
    return Topology.parse(
        [min(_FEATURES * 2**stage, _MOST_FEATURES) for stage in range(stages)],
        pooling.strides,
        [*_BLOCKS, *[_BLOCKS_BELOW] * stages][:stages],
        pooling.kernels,
        1,
    )


def _has_lowres(
    spacing: Array, median: Array, patch_size: Triple, outputs: int, budget: float
) -> bool:
    """Whether nnU-Net would plan a network for coarser images too, as it does for large ones.

    Its full-resolution network is then trained with batch Dice, since patches often lack a class.
    """
    coarse, voxels, covered = spacing.copy(), np.prod(median), np.prod(patch_size)
    left = voxels
    while covered / left < _LOWRES:
        finer = coarse.max() / coarse > 2
        coarse[finer if finer.any() else slice(None)] *= _COARSER
        shape = spacing / coarse * median
        left = np.prod(shape)
        covered = np.prod(_fitting(coarse, np.round(shape), outputs, budget).patch_size)
    return bool(voxels / left >= _LOWRES_GAIN)
