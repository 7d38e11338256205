"""What nnU-Net takes for the memory of a network: how many numbers its convolutions put out.

The planner holds them against a reference that was measured once, with one input of a batch of two.
"""

import math

from sparsemae.models.topology import Topology
from sparsemae.triples import Triple


def feature_map_size(topology: Topology, patch_size: Triple, num_classes: int) -> int:
    """Output values of all convolutions for one patch, without deep supervision.

    Equal to `ResidualEncoderUNet.compute_conv_feature_map_size` of dynamic-network-architectures,
    which counts a block's shortcut where it pools or changes channels.
    """
    sizes = [patch_size]
    for stride in topology.strides[1:]:
        sizes.append(tuple(n // s for n, s in zip(sizes[-1], stride, strict=True)))
    voxels = [math.prod(size) for size in sizes]
    encoder = topology.features[0] * voxels[0]  # the stem
    before = topology.features[0], sizes[0]
    for features, blocks, size, count in zip(
        topology.features, topology.blocks, sizes, voxels, strict=True
    ):
        shortcut = before != (features, size)
        encoder += (2 * blocks + shortcut) * features * count
        before = features, size
    levels = zip(
        topology.decoder_convs[::-1], topology.features[:-1], voxels[:-1], strict=True
    )  # finest first
    decoder = sum((1 + convs) * features * count for convs, features, count in levels)
    return encoder + decoder + num_classes * voxels[0]
