"""Learning rates as pure functions of the step, so that a run continues from any.

All rise linearly over `warmup` steps to the peak, then follow their own curve to the last step.
`sawtooth` warms up the decoder alone, with the encoder at 0, then both from 0 again, and decays as
`poly` ("Revisiting MAE pre-training for 3D medical image segmentation", arXiv 2410.23132).
"""

import math

from sparsemae.training.options import TrainConfig

ENCODER = "encoder"  # the group of parameters that `sawtooth` holds back


def learning_rate(step: int, config: TrainConfig, group: str = "") -> float:
    """The learning rate of step `step`, from 0, for a group of parameters."""
    start = 0
    if config.schedule == "sawtooth":
        if step < config.warmup:
            return 0.0 if group == ENCODER else _rising(step, config)
        start = config.warmup
    if step - start < config.warmup:
        return _rising(step - start, config)
    start += config.warmup
    match config.schedule:
        case "poly" | "sawtooth":
            return poly(step - start, config.steps - start, config.lr)
        case "cosine":
            return cosine(step - start, config.steps - start, config.lr)
        case "constant":
            return config.lr
    raise ValueError(f"unknown schedule {config.schedule!r}")


def poly(step: int, steps: int, peak: float, power: float = 0.9) -> float:
    """Polynomial decay from `peak` at step 0 to 0 at `steps`."""
    return peak * (1 - step / steps) ** power


def cosine(step: int, steps: int, peak: float) -> float:
    """Half a cosine from `peak` at step 0 to 0 at `steps`."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))


def _rising(step: int, config: TrainConfig) -> float:
    """Never 0: a first step that does nothing would be a wasted one."""
    return config.lr * (step + 1) / config.warmup
