"""Small networks with every weight random, as a trained one has them."""

import pytest
import torch
from torch import nn

from sparsemae.models.resenc import ResEncUNet

SMALL = {
    "features_per_stage": (4, 6, 8),
    "strides": (1, 2, 2),
    "n_blocks_per_stage": (1, 2, 1),
}
# every axis of its own: a swapped one shows
ODD = {
    "features_per_stage": (4, 6, 8, 8),
    "strides": (1, (1, 2, 2), (2, 1, 2), (2, 2, 1)),
    "n_blocks_per_stage": (1, 2, 1, 1),
    "kernel_sizes": ((1, 3, 3), (3, 1, 3), 3, (3, 3, 1)),
}


@pytest.fixture
def trained():
    """Makes a network in which no two tensors are alike and no branch is silent."""

    def make(plan=SMALL, input_channels=1, num_classes=2, **options):
        network = ResEncUNet(input_channels, num_classes, **{**plan, **options})
        with torch.no_grad():
            for parameter in network.parameters():
                nn.init.normal_(parameter, std=0.2)
                if parameter.ndim == 1:
                    parameter.add_(1)
        return network

    return make


@pytest.fixture
def small():
    return dict(SMALL)


@pytest.fixture
def odd():
    return dict(ODD)


@pytest.fixture
def unique():
    """The tensors of a network, each under its one name."""
    return lambda network: {name: p.detach() for name, p in network.named_parameters()}
