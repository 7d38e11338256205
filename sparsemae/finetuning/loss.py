"""Dice and cross-entropy with deep supervision, as nnU-Net trains.

Source: nnunetv2 2.8.1, `DC_and_CE_loss` with `MemoryEfficientSoftDiceLoss`, and its weights of
levels; here plus 1, so that it is never below 0. MONAI's DiceCELoss has no ignored label.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsemae.training.loop import Loss

_SMOOTH = 1e-5


def level_weights(levels: int) -> tuple[float, ...]:
    """Of the outputs of a deeply supervised network, finest first: halves, none for the coarsest.

    They sum to 1.
    """
    weights = [0.5**level for level in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return tuple(weight / sum(weights) for weight in weights)


def segmentation_loss(
    outputs: Sequence[Float[Tensor, "B C d h w"]],
    labels: Int[Tensor, "B D H W"],
    *,
    ignore: int | None = None,
    batch_dice: bool = False,
    total_of: Callable[[Tensor], Tensor] = lambda values: values,
) -> Loss:
    """The loss of a batch; `weight` is its number of samples.

    Args:
        outputs: Logits of every level, finest first.
        labels: Class numbers; coarser levels are scored at the nearest voxels.
        ignore: The number of voxels that do not count.
        batch_dice: One Dice over all samples, not one each.
        total_of: Sums a tensor over all ranks, whose samples that Dice is over, too.
    """
    count = len(labels)
    total = labels.new_zeros((), dtype=torch.float32)
    for weight, logits in zip(level_weights(len(outputs)), outputs, strict=True):
        if weight:
            target = _coarser(labels, logits.shape[2:])
            total = total + weight * dice_ce(
                logits, target, ignore=ignore, batch_dice=batch_dice, total_of=total_of
            )
    return Loss(total * count, float(count))


def dice_ce(
    logits: Float[Tensor, "B C D H W"],
    labels: Int[Tensor, "B D H W"],
    *,
    ignore: int | None = None,
    batch_dice: bool = False,
    total_of: Callable[[Tensor], Tensor] = lambda values: values,
) -> Float[Tensor, ""]:
    """1 minus mean soft Dice of the foreground classes, plus the mean cross-entropy; in fp32."""
    logits = logits.float()
    valid = None if ignore is None else labels != ignore
    target = labels if valid is None else labels * valid
    entropy = F.cross_entropy(logits, target, reduction="none").flatten(1)  # [B, N]
    p = logits.softmax(1)[:, 1:].flatten(2)  # [B, C - 1, N]
    with torch.no_grad():
        truth = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, target[:, None], True)
        truth = truth[:, 1:].flatten(2)  # ignored voxels are background here
    if valid is None:
        entropy = entropy.mean(1)
    else:
        known = valid.flatten(1)
        entropy = (entropy * known).sum(1) / known.sum(1).clamp(min=1)
        p = p * known[:, None]
    shared, predicted, true = (p * truth).sum(2), p.sum(2), truth.sum(2)  # [B, C - 1]
    if batch_dice:
        shared, predicted, true = total_of(torch.stack([shared, predicted, true]).sum(1))[:, None]
    dice = (2 * shared + _SMOOTH) / (predicted + true + _SMOOTH).clamp(min=1e-8)
    return 1 - dice.mean() + entropy.mean()


def _coarser(labels: Int[Tensor, "B D H W"], size: Sequence[int]) -> Int[Tensor, "B d h w"]:
    if labels.shape[1:] == tuple(size):
        return labels
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()
