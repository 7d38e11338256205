"""What an exported file says about its weights, so that whoever reads it need not guess."""

import json
from dataclasses import asdict
from typing import Any

from sparsemae.models.topology import Topology
from sparsemae.transfer.pretrained import FORMAT, METADATA, Pretrained
from sparsemae.triples import Triple


def describe(pretrained: Pretrained, topology: Topology | None, axes: Triple) -> dict[str, Any]:
    """Plain data: lists, dicts, numbers, text.

    Args:
        topology: Of the exported network, in our axes.
        axes: Axis i of the exported kernels is our axis `axes[i]` (0, 1, 2: x, y, z of RAS).
    """
    about = {
        FORMAT: 1,
        "axes": axes,
        "topology": None if topology is None else asdict(topology),
        "spacing": pretrained.spacing,
        "patch_size": pretrained.patch_size,
        "normalization": pretrained.normalization,
        "recipe": pretrained.recipe,
    }
    return json.loads(json.dumps(about))


def as_text(about: dict[str, Any]) -> dict[str, str]:
    """As safetensors' metadata: one entry, since it would write several in any order."""
    return {METADATA: json.dumps(about)}
