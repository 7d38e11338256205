"""Whether a resumed run computes the same bits as one that was never interrupted."""

import os
from typing import Any

import torch

from sparsemae.errors import UserError
from sparsemae.training.options import TrainConfig
from sparsemae.training.ranks import Ranks


def conditions(config: TrainConfig, ranks: Ranks) -> dict[str, Any]:
    """What the bits of a step depend on beside configuration and data; goes into checkpoints."""
    cuda = ranks.device.type == "cuda"
    return {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(ranks.device) if cuda else "cpu",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "world_size": ranks.world_size,
        "accumulate": config.accumulate,
        "compile": config.compile,
    }


def differences(before: dict[str, Any], config: TrainConfig, ranks: Ranks) -> list[str]:
    """Why a resumed run is not bit-exact; empty if it is."""
    now = conditions(config, ranks)
    reasons = [
        f"{key} {before.get(key)} is now {now[key]}" for key in now if before.get(key) != now[key]
    ]
    if ranks.device.type == "cuda" and not config.deterministic:
        reasons.append("train.deterministic is off")
    return reasons


def make_deterministic(device: torch.device) -> None:
    """Choose algorithms whose sums have one order.

    Raises:
        UserError: cuBLAS was set up before with a workspace that gives several.
    """
    if device.type != "cuda":
        return
    space = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads nothing else
    if space not in (":4096:8", ":16:8"):
        raise UserError(
            f"train.deterministic: CUBLAS_WORKSPACE_CONFIG is {space}; set it to :4096:8"
        )
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
