"""What any plan takes from a fingerprint by nnU-Net's rules: spacing, image size, channels."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sparsemae.data.codes import one_line
from sparsemae.errors import UserError
from sparsemae.planning.fingerprint import Fingerprint
from sparsemae.planning.plan import ChannelPlan
from sparsemae.segmentation.dataset import Dataset
from sparsemae.triples import Triple

MIN_BATCH = 2  # nnU-Net never plans fewer samples

_ANISOTROPIC = 3  # an axis whose voxels are that much longer than the others' is thick
_THICK_PERCENTILE = 10
_CROPPED = 0.75  # images that keep less of their voxels have air to leave out
_SCHEMES = {"ct": "ct", "nonorm": "none", "zscore": "zscore", "rescale_to_0_1": "rescale"}


def median_spacing(fingerprint: Fingerprint) -> tuple[float, float, float]:
    """The median voxel size of every axis in mm; of a thick axis the 10th percentile.

    A thick axis has voxels over 3 times as long as the others', and fewer than a third as many. Its
    median would blur the cases that are sampled better (default_experiment_planner.py).
    """
    spacings = np.array([case.spacing for case in fingerprint.cases])
    target = np.percentile(spacings, 50, axis=0)
    shape = np.percentile([case.shape for case in fingerprint.cases], 50, axis=0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    widest = target[others].max()
    is_thick = target[worst] > _ANISOTROPIC * widest
    if is_thick and shape[worst] * _ANISOTROPIC < shape[others].min():
        thin = np.percentile(spacings[:, worst], _THICK_PERCENTILE)
        target[worst] = thin if thin >= widest else widest + 1e-5
    return tuple(target.tolist())


def median_shape(fingerprint: Fingerprint, spacing: Sequence[float]) -> Float[np.ndarray, "3"]:
    """Voxels per axis once all cases have `spacing`; half ones where two are in the middle."""
    shapes = [
        [
            round(old / new * n)
            for old, new, n in zip(case.spacing, spacing, case.shape, strict=True)
        ]
        for case in fingerprint.cases
    ]
    return np.median(shapes, axis=0)


def channel_plans(fingerprint: Fingerprint, dataset: Dataset) -> tuple[ChannelPlan, ...]:
    """How every channel is normalised: by its name in `dataset.json`, as nnU-Net reads it.

    CT is clipped and scaled by the intensities of all cases, noNorm is left, rescale_to_0_1 is
    scaled to its range, anything else is z-scored: of what is not zero, if cropping removed much.

    Raises:
        UserError: A channel is rgb_to_0_1, or there are more or fewer than in the fingerprint.
    """
    if len(dataset.channels) != len(fingerprint.channels):
        raise UserError(
            f"{dataset.name}: {len(dataset.channels)} channels, but its fingerprint has "
            f"{len(fingerprint.channels)}; take it again"
        )
    masked = fingerprint.relative_size < _CROPPED
    plans = []
    for name, channel in zip(dataset.channels, fingerprint.channels, strict=True):
        if name.casefold() == "rgb_to_0_1":
            raise UserError(
                one_line(
                    f"{dataset.path / 'dataset.json'}: channel_names: {name} is for colour "
                    f"pictures; name it rescale_to_0_1 or noNorm"
                )
            )
        scheme = _SCHEMES.get(name.casefold(), "zscore")
        plans.append(
            ChannelPlan(
                name=name,
                normalization=scheme,
                masked=masked and scheme == "zscore",
                intensities=channel.intensities,
            )
        )
    return tuple(plans)


def checked_spacing(spacing: Sequence[float]) -> tuple[float, float, float]:
    """The spacing, if it is three positive numbers of mm."""
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise UserError(f"spacing {list(spacing)}: give three positive numbers of mm")
    return tuple(map(float, spacing))


def checked_batch(batch_size: int) -> int:
    """The batch size, if it is a positive whole number."""
    if type(batch_size) is not int or batch_size < 1:
        raise UserError(f"batch_size {batch_size!r}: give a whole number from 1")
    return batch_size


def checked_patch(patch_size: Sequence[int]) -> Triple:
    """The patch, if it is three positive whole numbers."""
    if len(patch_size) != 3 or not all(type(n) is int and n > 0 for n in patch_size):
        raise UserError(f"patch_size {list(patch_size)}: give three positive numbers of voxels")
    return tuple(patch_size)
