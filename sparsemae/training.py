"""The training loop: one, in steps, read from top to bottom.

What is trained is a function from batch and step to loss; what is logged and saved are functions
too. Everything that depends on time is a pure function of the step, so a run continues from any.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from sparsemae.config import Strict
from sparsemae.errors import DivergedError, LoaderError, UserError

Batch = dict[str, Any]


class TrainConfig(Strict):
    """`[train]`: optimiser, schedule and length of a run."""

    steps: PositiveInt
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 1e-2  # at step 0; decays to 0 as (1 - step/steps)^0.9
    momentum: float = Field(0.99, ge=0, lt=1)  # of sgd (Nesterov)
    weight_decay: NonNegativeFloat = 3e-5
    clip_norm: PositiveFloat = 12.0  # of the whole gradient
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast, weights stay fp32
    save_every: PositiveInt = 1000  # steps between checkpoints
    keep: int = Field(2, ge=2)  # checkpoints kept; one alone may turn out damaged
    device: str = "auto"  # auto: cuda if there is one


@dataclass
class State:
    """What a step changes."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """What one step measured."""

    step: int  # steps done, this one included
    loss: float
    lr: float
    grad_norm: float  # before clipping
    seconds: float  # the whole step
    wait_seconds: float  # of them spent waiting for the loader
    samples: int


def fit(
    state: State,
    loss_of: Callable[[Batch, int], Tensor],
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    on_step: Callable[[StepRecord], None],
    save: Callable[[State], None],
) -> None:
    """Train from `state.step` to `config.steps`; `batches` must start at that step.

    Raises:
        DivergedError: The loss or the gradient norm is not finite; nothing was updated or saved.
        LoaderError, UserError: `batches` failed; what was done until then is saved.
    """
    device = next(state.model.parameters()).device
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    state.model.train()
    source, saved = iter(batches), state.step
    while state.step < config.steps:
        start = time.perf_counter()
        try:
            batch = to_device(next(source), device)
        except (LoaderError, UserError):
            if state.step > saved:
                save(state)
            raise
        wait = time.perf_counter() - start

        lr = poly_lr(state.step, config.steps, config.lr)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.zero_grad(set_to_none=True)  # no gradients beside the activations
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = loss_of(batch, state.step)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        values = torch.stack([loss.detach(), norm]).tolist()  # the step's only device sync
        if not all(math.isfinite(v) for v in values):
            raise DivergedError(
                f"step {state.step}: loss {values[0]}, gradient norm {values[1]}. Nothing of this "
                f"step was kept; continue from the last checkpoint with a lower train.lr"
            )
        state.optimizer.step()
        state.step += 1

        seconds = time.perf_counter() - start
        samples = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        on_step(StepRecord(state.step, values[0], lr, values[1], seconds, wait, samples))
        if state.step % config.save_every == 0 or state.step == config.steps:
            save(state)
            saved = state.step


def poly_lr(step: int, steps: int, peak: float, power: float = 0.9) -> float:
    """Polynomial decay from `peak` at step 0 to 0 at `steps`."""
    return peak * (1 - step / steps) ** power


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of `config` over the parameters of `model`."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    decay = config.weight_decay
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(
                *(parameters, config.lr, config.momentum),
                weight_decay=decay,
                nesterov=config.momentum > 0,
            )
        case "adamw":
            return torch.optim.AdamW(parameters, config.lr, weight_decay=decay)
    raise ValueError(f"unknown optimizer {config.optimizer!r}")


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one.

    Raises:
        UserError: No such device here.
    """
    count = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in ("auto", *here):
        raise UserError(f"train.device {name}: not on this machine, choose auto, {', '.join(here)}")
    return torch.device(("cuda" if count else "cpu") if name == "auto" else name)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
