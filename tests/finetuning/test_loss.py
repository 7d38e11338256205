"""Dice and cross-entropy with deep supervision: by hand, against MONAI, and with ignored voxels."""

import math

import pytest
import torch

from sparsemae.finetuning.loss import dice_ce, level_weights, segmentation_loss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 4, 6, 5, 7, generator=generator)
    labels = torch.randint(0, 4, (2, 6, 5, 7), generator=generator)
    labels[1][labels[1] == 3] = 0  # a class that one sample does not have
    return logits, labels


def test_by_hand():
    """One sample of two voxels and two classes."""
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).view(1, 2, 1, 1, 2)
    labels = torch.tensor([1, 0]).view(1, 1, 1, 2)
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))  # of class 1
    entropy = -(math.log(first) + math.log(1 - second)) / 2
    dice = (2 * first + 1e-5) / (first + second + 1 + 1e-5)
    assert float(dice_ce(logits, labels)) == pytest.approx(1 - dice + entropy, rel=1e-6)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_monai_agrees(batch, batch_dice):
    from monai.losses import DiceCELoss

    logits, labels = batch
    peer = DiceCELoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=batch_dice,
        smooth_nr=1e-5, smooth_dr=1e-5,
    )  # fmt: skip
    expected = float(peer(logits, labels[:, None]))
    assert float(dice_ce(logits, labels, batch_dice=batch_dice)) == pytest.approx(
        expected, rel=1e-5
    )


def test_a_perfect_prediction_costs_nothing_and_a_wrong_one_a_lot(batch):
    _, labels = batch
    right = 50 * torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert float(dice_ce(right, labels)) == pytest.approx(0, abs=1e-4)
    assert float(dice_ce(right.roll(1, 1), labels)) > 30


@pytest.mark.parametrize("batch_dice", [False, True])
def test_ignored_voxels_count_for_nothing(batch, batch_dice):
    """As if they were not there: in any position, with any logits, and without a gradient."""
    logits, labels = batch
    labels = labels.clone()
    labels[:, :, :, 4:] = 4
    options = {"ignore": 4, "batch_dice": batch_dice}
    kept = dice_ce(logits[..., :4], labels[..., :4], batch_dice=batch_dice)
    assert float(dice_ce(logits, labels, **options)) == pytest.approx(float(kept), rel=1e-6)
    other = logits.clone()
    other[..., 4:] = 100 * torch.randn_like(other[..., 4:])
    other.requires_grad_()
    loss = dice_ce(other, labels, **options)
    assert loss.item() == pytest.approx(float(kept), rel=1e-6)
    loss.backward()
    assert (other.grad[..., 4:] == 0).all()
    assert (other.grad[..., :4] != 0).any()


def test_a_sample_without_known_voxels_gives_a_finite_loss(batch):
    logits, labels = batch
    labels = labels.clone()
    labels[0] = 4
    loss = dice_ce(logits.requires_grad_(), labels, ignore=4)
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_weights_of_levels_are_nnunets():
    assert level_weights(1) == (1.0,)
    assert level_weights(2) == (1.0, 0.0)
    assert level_weights(5) == pytest.approx((8 / 15, 4 / 15, 2 / 15, 1 / 15, 0))


def test_levels_are_scored_at_their_nearest_voxels():
    labels = torch.zeros(1, 4, 4, 8, dtype=torch.int64)
    labels[..., 4:] = 1
    fine = torch.randn(1, 2, 4, 4, 8)
    coarse = torch.randn(1, 2, 2, 2, 4)
    coarsest = torch.randn(1, 2, 1, 1, 2)
    half = torch.zeros(1, 2, 2, 4, dtype=torch.int64)
    half[..., 2:] = 1
    expected = 2 / 3 * dice_ce(fine, labels) + 1 / 3 * dice_ce(coarse, half)
    loss = segmentation_loss([fine, coarse, coarsest], labels)
    assert float(loss.total) == pytest.approx(float(expected), rel=1e-6)
    assert loss.weight == 1


def test_parts_of_a_batch_make_its_mean(batch):
    logits, labels = batch
    whole = segmentation_loss([logits], labels)
    parts = [segmentation_loss([logits[i : i + 1]], labels[i : i + 1]) for i in range(2)]
    mean = sum(p.total for p in parts) / sum(p.weight for p in parts)
    assert float(whole.total / whole.weight) == pytest.approx(float(mean), rel=1e-6)


def test_half_precision_logits_are_scored_in_full(batch):
    logits, labels = batch
    assert dice_ce(logits.bfloat16(), labels).dtype == torch.float32
