"""`[train]`: the configuration of the loop, and what of it cannot be."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from sparsemae.config import Strict
from sparsemae.errors import UserError

# What a resumed run may change: its length, which stretches the schedule, and how it is run.
RESUMABLE = (
    "train.steps", "train.save_every", "train.keep", "train.max_skipped", "train.accumulate",
    "train.compile", "train.deterministic", "train.tensorboard", "train.device", "data.workers",
    "data.timeout",
)  # fmt: skip

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TrainConfig(Strict):
    """Optimiser, schedule, length and machine of a run."""

    steps: PositiveInt
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: PositiveFloat = 1e-2  # the peak
    schedule: Literal["poly", "cosine", "constant", "sawtooth"] = "poly"  # see schedules.py
    warmup: NonNegativeInt = 0  # steps in which the learning rate rises to its peak
    momentum: float = Field(0.99, ge=0, lt=1)  # of sgd (Nesterov)
    weight_decay: NonNegativeFloat = 3e-5
    clip_norm: PositiveFloat = 12.0  # of the whole gradient
    accumulate: PositiveInt = 1  # parts a rank's share of a batch is computed in, one after another
    ema: float | None = Field(None, gt=0, lt=1)  # decay of averaged weights, kept beside the others
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast; weights stay fp32
    compile: bool = False  # torch.compile
    cuda_graphs: bool = False  # refused: see check_train
    deterministic: bool = False  # bit-exact on CUDA too, slower; on a CPU it always is
    max_skipped: NonNegativeInt = 3  # steps in a row without a finite gradient, then the run stops
    save_every: PositiveInt = 1000  # steps between checkpoints, validations and reports
    keep: int = Field(2, ge=2)  # newest checkpoints kept; one alone may turn out damaged
    tensorboard: bool = False  # write RUN/tensorboard too
    device: str = "auto"  # auto: cuda if there is one


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which a model computes in `precision`."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: str, device: torch.device) -> Iterator[None]:
    """Within it, the model is in evaluation mode and computes in `precision` without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast(precision, device):
            yield
    finally:
        model.train(training)


def check_precision(config: TrainConfig, device: str) -> None:
    """Refuse a precision that a kind of device computes wrongly.

    Raises:
        UserError: bf16 on a CPU. Up to torch 2.13 at least, the weight gradient of a bf16 3D
            convolution over two voxels per axis holds memory that was never written.
    """
    if config.precision == "bf16" and device == "cpu":
        raise UserError(
            "train.precision bf16: on a CPU the library's weight gradients are not reliable in it; "
            "use fp32 there (--set train.precision=fp32)"
        )


def check_train(config: TrainConfig) -> None:
    """Refuse what no single key shows.

    Raises:
        UserError: Names key and remedy.
    """
    if config.cuda_graphs:
        raise UserError(
            "train.cuda_graphs: not offered. A graph replays fixed addresses and launches, and "
            "every step has a mask with tables of its own; train.compile saves launches"
        )
    warmups = 2 * config.warmup if config.schedule == "sawtooth" else config.warmup
    if warmups >= config.steps:
        twice = ", twice with sawtooth," if config.schedule == "sawtooth" else ""
        raise UserError(
            f"train.warmup {config.warmup}{twice} leaves nothing of train.steps {config.steps}: "
            f"take fewer steps of warm-up, or more steps"
        )


def without(values: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A configuration as plain data, without these dotted keys."""
    values = {k: dict(v) if isinstance(v, dict) else v for k, v in values.items()}
    for key in keys:
        section, _, name = key.partition(".")
        del values[section][name]
    return values
