"""What is done about a step that went wrong: left out, noticed, or the end of the run.

All of it sees the same numbers in the same order on every rank and after a resume.
"""

import math
from dataclasses import dataclass

from sparsemae.errors import DivergedError

# A spike is a loss this many standard deviations, and this factor, above its running mean, both
# over about the last 50 steps. Random masks and patches alone stay below that.
SPIKE_DEVIATIONS, SPIKE_FACTOR, MEMORY = 6.0, 1.5, 0.98
SETTLED = 50  # steps before the running mean says anything

# fp16: the factor on the loss starts high, is halved by an overflow, doubled after so many steps
START_SCALE, GROWTH_STEPS = 2.0**16, 2000


@dataclass
class LossScale:
    """The factor that keeps small fp16 gradients from vanishing; 1 in other precisions."""

    value: float = 1.0
    good: int = 0  # steps since it changed

    @classmethod
    def of(cls, precision: str) -> "LossScale":
        return cls(START_SCALE if precision == "fp16" else 1.0)

    def update(self, finite: bool, precision: str) -> bool:
        """Adapt to the outcome of a step; True if what was not finite is the factor's fault."""
        if precision != "fp16":
            return False
        if not finite:
            blamed = self.value > 1
            self.value, self.good = max(1.0, self.value / 2), 0
            return blamed
        self.good += 1
        if self.good == GROWTH_STEPS:
            self.value, self.good = 2 * self.value, 0
        return False


@dataclass
class Guard:
    """Counts steps left out, and knows a spike from the usual scatter of the loss."""

    skipped: int = 0  # in a row
    seen: int = 0  # finite losses
    mean: float = 0.0
    variance: float = 0.0

    def skip(self, step: int, loss: float, norm: float, most: int) -> None:
        """Count a step that was left out.

        Raises:
            DivergedError: More than `most` in a row.
        """
        self.skipped += 1
        if self.skipped > most:
            raise DivergedError(
                f"step {step}: loss {loss}, gradient norm {norm}, and so for {self.skipped} "
                f"{'step' if self.skipped == 1 else 'steps'} in a row, of which nothing was kept. "
                f"Continue from the last checkpoint's weights with a lower train.lr in a new run"
            )

    def accept(self, loss: float) -> bool:
        """Take in the loss of a step that counted; True if it is a spike."""
        self.skipped = 0
        difference = loss - self.mean
        limit = max(SPIKE_DEVIATIONS * math.sqrt(self.variance), (SPIKE_FACTOR - 1) * self.mean)
        spike = self.seen >= SETTLED and difference > limit
        self.seen += 1
        weight = max(1 - MEMORY, 1 / self.seen)
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        return spike
