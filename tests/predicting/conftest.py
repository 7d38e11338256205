"""Volumes in all orientations, and a network that tells axes and directions apart."""

import itertools

import nibabel as nib
import numpy as np
import pytest
import torch

OBLIQUE = np.array([[2.0, 0.1, 0, -7], [-0.1, 1.5, 0.2, 3], [0, -0.2, 3.0, 11], [0, 0, 0, 1]])
ALL_48 = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]


def pytest_generate_tests(metafunc):
    if "codes" in metafunc.fixturenames:
        metafunc.parametrize("codes", ALL_48)


@pytest.fixture
def oblique():
    return OBLIQUE.copy()


@pytest.fixture
def stored_as():
    """`stored_as(array, codes)`: an image whose axes have the order and direction of `codes`."""

    def turn(array, codes, affine=OBLIQUE):
        image = nib.Nifti1Image(array, affine)
        have, want = nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes)
        return image.as_reoriented(nib.orientations.ornt_transform(have, want))

    return turn


@pytest.fixture
def network():
    """`network(channels, classes, seed=0)`: convolutions that no flip or exchange of axes keeps."""

    def make(channels, classes, seed=0):
        generator = torch.Generator().manual_seed(seed)
        layers = torch.nn.Sequential(
            torch.nn.Conv3d(channels, 4, 3, padding=1),
            torch.nn.Tanh(),
            torch.nn.Conv3d(4, classes, (1, 3, 5), padding=(0, 1, 2)),
        )
        for parameter in layers.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        return layers.requires_grad_(False)

    return make
