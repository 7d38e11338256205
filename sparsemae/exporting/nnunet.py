"""nnU-Net's state dict: its axes, and every name that its loader asks for.

`load_pretrained_weights` of nnU-Net 2.8.1 wants each key of its network, aliases included, on the
CPU. Aliases share storage here as they do there, or the file would be four times as large.
"""

import io
from typing import Any

import torch
from torch import Tensor

from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import Topology
from sparsemae.transfer.kernels import into_network_axes
from sparsemae.triples import Triple

WEIGHTS = "network_weights"


def state_dict(network: ResEncUNet, axes: Triple) -> dict[str, Tensor]:
    """All names of a network's tensors, its kernels turned to the given axes."""
    named = dict(network.named_parameters())
    turned = into_network_axes({name: p.detach() for name, p in named.items()}, axes)
    by_identity = {id(parameter): turned[name] for name, parameter in named.items()}
    return {name: by_identity[id(p)] for name, p in network.state_dict(keep_vars=True).items()}


def architecture(topology: Topology) -> dict[str, Any]:
    """The arguments of nnU-Net's `ResidualEncoderUNet`, as plans hold them; in their axes."""
    return {
        "n_stages": len(topology.features),
        "features_per_stage": list(topology.features),
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [list(sizes) for sizes in topology.kernels],
        "strides": [list(strides) for strides in topology.strides],
        "n_blocks_per_stage": list(topology.blocks),
        "n_conv_per_stage_decoder": list(topology.decoder_convs),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")  # of them, names of classes


def to_bytes(content: dict[str, Any]) -> bytes:
    """A torch file that loads with `weights_only=True`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
