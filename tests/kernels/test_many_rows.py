"""Float32 on volumes of real size: sums over 10^5 voxels must not lose their small terms.

One accumulator that runs over all rows loses digits with their number, unseen on small tensors.
"""

import pytest
import torch

from sparsemae.kernels import BlockMask, ops

CI, CO, BLOCK = 3, 4, (16, 16, 16)

OPERATORS = {
    "conv": lambda x, p, backend: ops.conv3d(x, p["weight"], p["bias"], backend=backend),
    "strided": lambda x, p, backend: ops.conv3d(
        x, p["weight"], p["bias"], (2, 2, 2), backend=backend
    ),
    "1x1": lambda x, p, backend: ops.conv3d(
        x, p["weight"][..., :1, :1, :1], p["bias"], backend=backend
    ),
    "transposed": lambda x, p, backend: ops.conv_transpose3d(
        x, p["up"], p["bias"], backend=backend
    ),
    "norm": lambda x, p, backend: ops.instance_norm(
        x, p["scale"], p["scale"].square(), backend=backend
    ),
}
LEAVES = {
    "weight": (CO, CI, 3, 3, 3),
    "up": (CI, CO, 1, 1, 2),
    "bias": (CO,),
    "scale": (CI,),
}
USES = {"transposed": ("up", "bias"), "norm": ("scale",)}
# The norm's sums are ours. The others are the library's: measured 7e-6 at worst, for the weight of
# the halo form (1.4e-6 for one dense convolution).
TOLERANCE = {name: 3e-6 if name == "norm" else 2e-5 for name in OPERATORS}


@pytest.mark.parametrize("name", OPERATORS)
def test_sums_over_many_rows(parity, name):
    mask = BlockMask.random(1, (4, 4, 4), 0.25)
    leaves = {k: torch.randn(LEAVES[k]) for k in USES.get(name, ("weight", "bias"))}
    leaves["x"] = torch.randn(len(mask), *BLOCK, CI) + 1.0
    errors = parity(OPERATORS[name], leaves, mask, torch.float32)
    assert max(errors.values()) < TOLERANCE[name], errors


def test_a_norm_whose_upstream_gradient_follows_its_output(parity):
    """The input gradient is then a difference of large sums."""
    mask = BlockMask.random(1, (4, 4, 4), 0.25)
    leaves = {"x": torch.randn(len(mask), *BLOCK, CI)}

    def op(x, p, backend):
        y = ops.instance_norm(x, backend=backend)
        return y * y + y * 5.0

    errors = parity(op, leaves, mask, torch.float32)
    assert max(errors.values()) < 3e-6, errors
