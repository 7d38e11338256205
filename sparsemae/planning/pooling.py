"""Which axes a network halves, stage by stage, and how far its kernels reach along each.

nnU-Net's rule (network_topology.py): axes are halved while they have voxels enough, the finely
sampled ones first, until voxels are about as thick as wide; kernels grow along with that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from sparsemae.triples import Triple

LEAST = 4  # voxels per axis at the bottleneck, of an axis that is halved
_ALIKE = 2  # spacings whose ratio is below it


@dataclass(frozen=True)
class Pooling:
    """Strides and kernels per stage, and the patch that they divide."""

    strides: tuple[Triple, ...]  # finest first
    kernels: tuple[Triple, ...]
    patch_size: Triple  # the size that was asked for, rounded up to a multiple of `divisor`
    divisor: Triple  # product of the strides


def pool(spacing: Sequence[float], size: Sequence[float]) -> Pooling:
    """The stages for voxels of `spacing` mm and a patch of about `size` voxels, which may be half.

    The order of the axes does not matter: the result has that of the arguments.
    """
    spacing, left = np.array(spacing, np.float64), np.array(size, np.float64)
    divisor = np.ones(3, np.int64)
    kernel = np.ones(3, np.int64)
    strides, kernels = [(1, 1, 1)], []
    while (large := left >= 2 * LEAST).any():
        halved = large & (spacing / spacing[large].min() < _ALIKE)
        if halved.sum() == 1 and left[halved][0] < 3 * LEAST:
            break
        kernel[spacing / spacing.min() < _ALIKE] = 3
        kernels.append(tuple(kernel.tolist()))
        strides.append(tuple(np.where(halved, 2, 1).tolist()))
        spacing[halved] *= 2
        left[halved] = np.ceil(left[halved] / 2)
        divisor[halved] *= 2
    kernels.append((3, 3, 3))
    patch_size = np.ceil(np.asarray(size) / divisor).astype(np.int64) * divisor
    return Pooling(
        tuple(strides), tuple(kernels), tuple(patch_size.tolist()), tuple(divisor.tolist())
    )


def nearest_patch(spacing: Sequence[float], size: Triple) -> Triple:
    """The patch closest to `size` that its own network can take."""
    divisor = pool(spacing, size).divisor
    edges = [{max(n // d, 1) * d, -(-n // d) * d} for n, d in zip(size, divisor, strict=True)]
    valid = [
        edge for edge in product(*map(sorted, edges)) if pool(spacing, edge).patch_size == edge
    ]
    return min(valid, key=lambda patch: sum(abs(a - b) for a, b in zip(patch, size, strict=True)))
