"""How a segmentation is scored while it is trained."""

import pytest
import torch

from sparsemae.finetuning.objective import mean_dice, overlap
from sparsemae.segmentation.dataset import Classes

THREE = Classes(("background", "a", "b"))


def test_overlap_counts_voxels_of_each_class():
    predicted = torch.tensor([[0, 1, 1, 2, 0, 1]])
    labels = torch.tensor([[0, 1, 2, 2, 1, 1]])
    assert overlap(predicted, labels, THREE).tolist() == [[1, 2, 1], [2, 3, 1], [1, 3, 2]]
    assert mean_dice(overlap(predicted, labels, THREE)) == pytest.approx((4 / 6 + 2 / 3) / 2)


def test_ignored_voxels_are_left_out():
    classes = Classes(("background", "a", "b"), ignore=3)
    predicted = torch.tensor([[0, 1, 1, 2, 0, 1]])
    labels = torch.tensor([[0, 1, 3, 2, 3, 1]])
    assert overlap(predicted, labels, classes).tolist() == [[1, 2, 1], [1, 2, 1], [1, 2, 1]]
    assert mean_dice(overlap(predicted, labels, classes)) == 1


def test_classes_that_are_nowhere_are_left_out_and_missed_ones_are_not():
    counts = torch.tensor([[5.0, 3, 0], [5, 3, 0], [5, 3, 0]])
    assert mean_dice(counts) == 1
    counts = torch.tensor([[5.0, 3, 0], [5, 3, 0], [5, 3, 4]])
    assert mean_dice(counts) == 0.5
    assert mean_dice(torch.tensor([[5.0, 0, 0]] * 3)) == 0
