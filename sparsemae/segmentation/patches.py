"""Patches and their labels from samples, on the training device.

As in `data.loading.augment`, a patch is interpolated at most once, and each on its own. Beyond the
case an image is 0, as nnU-Net pads it, and background.
"""

from typing import Any

import torch
from torch import Tensor

from sparsemae.data.loading.augment import place_of, points_of, sampled
from sparsemae.data.loading.samples import RawBatch
from sparsemae.segmentation.intensity import change
from sparsemae.segmentation.library import slice_axis
from sparsemae.segmentation.samples import LabelledSample


def assemble(batch: RawBatch) -> dict[str, Any]:
    """The patches of a batch, on the device its samples are on.

    Returns:
        {"image": float32 [B, C, D, H, W], "labels": int64 [B, D, H, W], "case": B ids}. Images are
        trilinear where they are resampled, labels the nearest.
    """
    first = batch.samples[0].voxels
    shape = (len(batch.samples), first.shape[0], *batch.patch_size)
    image = torch.zeros(shape, dtype=torch.float32, device=first.device)
    labels = torch.zeros((shape[0], *shape[2:]), dtype=torch.int64, device=first.device)
    slices = slice_axis(batch.patch_size)
    for sample, patch, classes in zip(batch.samples, image, labels, strict=True):
        (_copy if sample.grid is None else _resample)(sample, patch, classes)
        if sample.intensity is not None:
            change(patch, sample.intensity, slices)
    return {"image": image, "labels": labels, "case": [s.case for s in batch.samples]}


def _copy(sample: LabelledSample, patch: Tensor, labels: Tensor) -> None:
    place, axes = place_of(sample.corner, sample.flips, sample.labels.shape, labels.shape)
    patch[(slice(None), *place)] = sample.voxels.flip([axis + 1 for axis in axes]).float()
    labels[place] = sample.labels.long().flip(axes)


def _resample(sample: LabelledSample, patch: Tensor, labels: Tensor) -> None:
    boxes = [channel.float() for channel in sample.voxels]
    classes = sample.labels.float()
    for some, points in points_of(sample.grid, labels.shape):
        for target, box in zip(patch, boxes, strict=True):
            target[some] = sampled(box, points, "bilinear")
        labels[some] = sampled(classes, points, "nearest").long()
