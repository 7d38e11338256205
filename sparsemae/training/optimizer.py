"""The optimiser, which can leave out a step without asking the host, and averaged weights."""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sparsemae.training.options import TrainConfig


def make_optimizer(
    groups: Mapping[str, Iterable[nn.Parameter]], config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimiser of `config` over named groups of parameters; frozen ones are left out.

    It is torch's fused one, whose `step` does nothing where `optimizer.found_inf` is 1, a number on
    the device: torch.amp.GradScaler uses it in the same way.
    """
    named = [
        {"params": [p for p in parameters if p.requires_grad], "name": name}
        for name, parameters in groups.items()
    ]
    options = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": True}
    match config.optimizer:
        case "sgd":
            nesterov = config.momentum > 0
            optimizer = torch.optim.SGD(
                named, momentum=config.momentum, nesterov=nesterov, **options
            )
            if config.momentum:
                # torch takes uninitialised memory on the first step, and leaves it so if that is
                # left out; from zeros, the first step is the same
                for group in named:
                    for p in group["params"]:
                        optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            return optimizer
        case "adamw":
            return torch.optim.AdamW(named, **options)
    raise ValueError(f"unknown optimizer {config.optimizer!r}")


def step_unless(optimizer: torch.optim.Optimizer, left_out: Tensor) -> None:
    """A step, or none where `left_out` is 1: decided on the device."""
    optimizer.grad_scale, optimizer.found_inf = None, left_out
    optimizer.step()


class Ema:
    """A copy of a model whose weights follow the model's by an exponential moving average."""

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`; buffers are copied."""
        self._average(list(self.model.parameters()), list(model.parameters()), None)
        for own, new in zip(self.model.buffers(), model.buffers(), strict=True):
            own.copy_(new)
