"""The training loop: one, in steps, read from top to bottom.

What is trained is a function from model, batch and step to loss; what is logged and saved are
functions too. Everything that depends on time is a pure function of the step, random numbers
included, so a run continues from any. On a GPU the host is one step ahead: whether a step counts is
decided on the device, and its numbers are read while the next one runs.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsemae.errors import LoaderError, RankError, UserError
from sparsemae.training.guard import Guard, LossScale
from sparsemae.training.memory import memory_explained, step_advice
from sparsemae.training.optimizer import Ema, step_unless
from sparsemae.training.options import TrainConfig, autocast
from sparsemae.training.randomness import seed_step, seeds_restored
from sparsemae.training.ranks import Ranks
from sparsemae.training.schedules import learning_rate

Batch = dict[str, Any]


class Loss(NamedTuple):
    """A part's share of a mean: over parts and ranks, the loss is the sum of totals over weights.

    With equal weights it is the mean of the parts; a part with more excluded voxels weighs less.
    """

    total: Tensor  # the part's mean times its weight
    weight: Tensor | float = 1.0


@dataclass
class State:
    """What a step changes, and a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    step: int = 0
    scale: LossScale = field(default_factory=LossScale)
    guard: Guard = field(default_factory=Guard)
    best: tuple[int, float] | None = None  # step and validation loss


@dataclass(frozen=True)
class StepRecord:
    """What one step measured, over all ranks but for the times."""

    step: int  # steps done, this one included
    loss: float
    lr: float
    grad_norm: float  # before clipping
    skipped: bool  # loss or gradient were not finite: nothing was updated
    spike: bool  # the loss was far above what it had been
    seconds: float  # the whole step
    wait_seconds: float  # of them spent waiting for the loader
    samples: int
    memory: int | None  # bytes, peak of this process on its GPU


def fit(
    state: State,
    loss_of: Callable[[nn.Module, Batch, int], Loss],
    batches: Iterable[Batch],
    config: TrainConfig,
    *,
    ranks: Ranks,
    on_step: Callable[[StepRecord], None],
    save: Callable[[State], None],
    stop: Callable[[], bool] = lambda: False,
    seed: int = 0,
) -> bool:
    """Train from `state.step` to `config.steps`; `batches` must start at that step.

    Args:
        loss_of: Of a part of this rank's share of a batch, by the model it is given. "slots" in
            the batch are the places of its samples in the batch over all ranks.
        batches: Of this rank: dicts of tensors and lists over samples.
        on_step: Called in the order of steps, on every rank.
        save: Called every `save_every` steps, at the end, and before stopping early.
        stop: Asked in every step; the ranks stop together when it is True on any.
        seed: Of the global random numbers (torch, numpy, random), set anew in every step.

    Returns:
        False if it was stopped.

    Raises:
        DivergedError: More than `max_skipped` steps in a row were not finite, or weights are not.
        LoaderError, UserError: `batches` failed; what was done until then is saved.
        OutOfMemoryError: Names what to change.
    """
    loop = _Loop(state, loss_of, batches, config, ranks, on_step, save)
    state.model.train()
    explained = memory_explained(lambda where: step_advice(state.step, where))
    with seeds_restored(), explained, contextlib.closing(loop):
        return loop.run(stop, seed)


class _Loop:
    """`fit`, whose steps are launched and settled apart."""

    def __init__(
        self, state: State, loss_of, batches, config: TrainConfig, ranks: Ranks, on_step, save
    ):
        self.state, self.config, self.ranks = state, config, ranks
        self.loss_of, self.on_step, self.save = loss_of, on_step, save
        self.source = iter(batches)
        self.called = ranks.wrap(torch.compile(state.model) if config.compile else state.model)
        self.saved = state.step
        self.launched: list[_Launched] = []
        self.ahead = steps_ahead(ranks.device)
        self.failure: Exception | None = None  # of this rank's loader
        self.failed = self.stopping = False  # any rank's loader; any rank asked to stop

    def run(self, stop: Callable[[], bool], seed: int) -> bool:
        state, config = self.state, self.config
        self.clock = time.perf_counter()
        batch, self.waited = self.fetch() if state.step < config.steps else (None, 0.0)
        self.agree_on_failure()
        while state.step < config.steps:
            seed_step(seed, state.step, self.ranks.rank)
            batch = self.launch(batch, stop)
            while len(self.launched) > self.ahead:
                self.settle()
            last = state.step == config.steps
            if last or self.stopping or self.failed or state.step % config.save_every == 0:
                while self.launched:
                    self.settle()
                if state.step > self.saved:
                    self.save(state)
                    self.saved = state.step
                state.model.train()
                self.clock = time.perf_counter()  # saving and validating are no part of a step
            if self.failed:
                raise self.failure or _elsewhere()
            if self.stopping and not last:
                return False
        return True

    def fetch(self) -> tuple[Batch | None, float]:
        """The next batch and the seconds it took; a failure is kept for all ranks to hear of."""
        start = time.perf_counter()
        try:
            batch = to_device(next(self.source), self.ranks.device)
        except LoaderError as error:
            batch, self.failure = None, error
        except UserError as error:  # of one rank, not of the configuration that all have
            batch, self.failure = None, error if self.ranks.main else LoaderError(str(error))
        return batch, time.perf_counter() - start

    def agree_on_failure(self) -> None:
        flag = torch.tensor(float(self.failure is not None), device=self.ranks.device)
        if self.ranks.total(flag).item():
            raise self.failure or _elsewhere()

    def launch(self, batch: Batch, stop: Callable[[], bool]) -> Batch | None:
        """Do a step with `batch`, and fetch the one after it."""
        state, config, device = self.state, self.config, self.ranks.device
        optimizer, step, scale = state.optimizer, state.step, state.scale.value
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config, group["name"])
        optimizer.zero_grad(set_to_none=True)  # no gradients beside the activations

        total, weight = torch.zeros((), device=device), torch.zeros((), device=device)
        parts = list(split_batch(batch, config.accumulate, self.ranks))
        for i, part in enumerate(parts):
            with self.gradients_stay_here(last=i == len(parts) - 1):
                with autocast(config.precision, device):
                    loss = self.loss_of(self.called, part, step)
                (loss.total * scale).backward()
            total += loss.total.detach()
            weight += loss.weight
        upcoming, wait = None, 0.0
        if step + 1 < config.steps:
            upcoming, wait = self.fetch()

        flags = torch.tensor([stop(), self.failure is not None], dtype=torch.float32)
        flags = flags.to(device, non_blocking=True)
        sums = self.ranks.total(torch.cat([torch.stack([total, weight]), flags]))
        weight = sums[1].clamp(min=1e-12)
        mean = sums[0] / weight
        # a rank's gradient is that of its totals, averaged over the ranks: make it the mean's
        norm, bad = _scale_and_clip(
            optimizer, mean, self.ranks.world_size / (weight * scale), config.clip_norm
        )
        step_unless(optimizer, bad)
        if state.ema is not None:
            state.ema.update(state.model)
        state.step += 1

        now = time.perf_counter()
        known = {
            "step": state.step,
            "lr": optimizer.param_groups[-1]["lr"],
            "seconds": now - self.clock,
            "wait_seconds": self.waited + wait,
            "samples": sum(len(part["slots"]) for part in parts) * self.ranks.world_size,
            "memory": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        }
        self.clock, self.waited = now, 0.0
        values = torch.stack([mean, norm, bad, sums[2], sums[3]])
        self.launched.append(_Launched(known, values))
        return upcoming

    def settle(self) -> None:
        """Read the numbers of the oldest step that was launched, and act on them."""
        launched = self.launched.pop(0)
        loss, norm, bad, stop, failed = launched.read()
        state, config = self.state, self.config
        blamed = state.scale.update(not bad, config.precision)
        spike = not bad and state.guard.accept(loss)
        record = StepRecord(
            loss=loss, grad_norm=norm, skipped=bool(bad), spike=spike, **launched.known
        )
        self.on_step(record)
        if bad and not blamed:
            state.guard.skip(record.step - 1, loss, norm, config.max_skipped)
        self.stopping |= stop > 0
        self.failed |= failed > 0

    def gradients_stay_here(self, *, last: bool) -> contextlib.AbstractContextManager:
        """All but the last part of a batch keep their gradients on the rank."""
        if last or not self.ranks.many:
            return contextlib.nullcontext()
        return self.called.no_sync()

    def close(self) -> None:
        """End the loader's processes."""
        if hasattr(self.source, "close"):
            self.source.close()


def steps_ahead(device: torch.device) -> int:
    """Steps that are launched before the numbers of the one before them are read."""
    return 1 if device.type == "cuda" else 0


class _Launched:
    """A step on its way: its numbers come to the host while it waits for something else."""

    def __init__(self, known: dict[str, Any], values: Tensor):
        self.known, self.values, self.copied = known, values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.values.copy_(values, non_blocking=True)
            self.copied = torch.cuda.current_stream().record_event()

    def read(self) -> list[float]:
        if self.copied is not None:
            self.copied.synchronize()
        return self.values.tolist()


@torch.no_grad()
def _scale_and_clip(
    optimizer: torch.optim.Optimizer, mean: Tensor, factor: Tensor, clip_norm: float
) -> tuple[Tensor, Tensor]:
    """Multiply gradients by `factor`, clip them, and tell their norm and whether it, or the loss,
    is not finite (1 or 0). Parameters at a learning rate of 0 are left alone altogether."""
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if group["lr"] == 0:
                parameter.grad = None
            elif parameter.grad is not None:
                gradients.append(parameter.grad)
    norm = nn.utils.get_total_norm(gradients) * factor
    torch._foreach_mul_(gradients, factor * (clip_norm / (norm + 1e-6)).clamp(max=1))
    bad = ~(mean.isfinite() & norm.isfinite())
    return norm, bad.float()


def split_batch(batch: Batch, parts: int, ranks: Ranks) -> Iterator[Batch]:
    """Equal parts of a rank's share of a batch, each with the "slots" of its samples."""
    samples = len(next(v for v in batch.values() if isinstance(v, Tensor)))
    size = samples // parts
    for start in range(0, samples, size):
        stop, first = start + size, ranks.rank * samples
        part = {key: value[start:stop] for key, value in batch.items()}
        yield part | {"slots": range(first + start, first + stop)}


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch with its tensors on `device`."""
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def _elsewhere() -> RankError:
    return RankError("the loader of another rank failed; see what that rank says")
