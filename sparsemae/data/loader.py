"""The batches of a run, from a store, in an order that is a function of the seed and nothing else.

Batch k holds samples k * B to (k + 1) * B - 1 of the run, with B the batch size over all ranks, so
neither workers nor ranks change what a step sees, and a run resumes at any step without replay.
"""

from collections.abc import Iterator, Sequence

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from sparsemae.config import Size
from sparsemae.data.loading.affine import AugmentConfig, Probability
from sparsemae.data.loading.pool import Pool, Report
from sparsemae.data.loading.samples import RawBatch, SampleReader
from sparsemae.data.store import Store
from sparsemae.errors import UserError


class DataConfig(AugmentConfig):
    """`[data]`: the patches of a step, and how they are varied."""

    patch_size: Size
    batch_size: PositiveInt  # of all ranks together
    workers: NonNegativeInt = 0  # loader processes of each rank
    foreground: Probability = 0.0  # fraction of patches whose centre is sure to show something
    timeout: PositiveFloat = Field(300.0, le=86400)  # seconds for one patch, then the run stops


class Loader:
    """Iterates over the batches of steps `start_step` to `steps` - 1; see `make_loader`."""

    def __init__(self, reader: SampleReader, steps: range, share: range, batch_size: int, **pool):
        self._reader, self._steps, self._pool = reader, steps, pool
        self._share, self._batch_size = share, batch_size

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[RawBatch]:
        if not self._pool["workers"]:
            return (self._batch(step, lambda sample: None) for step in self._steps)
        return Pool(self._batch, self._steps, name_of=self._name_of, **self._pool)

    def _batch(self, step: int, report: Report) -> RawBatch:
        samples = []
        for slot in self._share:
            sample = step * self._batch_size + slot
            report(sample)
            samples.append(self._reader(sample))
        return RawBatch(self._reader.patch_size, tuple(samples))

    def _name_of(self, sample: int) -> str:
        return f"case {self._reader.case_of(sample).id}"


def make_loader(
    store: Store,
    patch_size: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    steps: int,
    start_step: int = 0,
    workers: int = 0,
    augment: AugmentConfig | None = None,
    foreground: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
    timeout: float = 300.0,
) -> Loader:
    """The batches of training steps `start_step` to `steps` - 1 for one of `world_size` ranks.

    They hold samples as read from `store`; `augment.assemble` makes patches of them on the training
    device. No global random state is drawn from.

    Args:
        batch_size: Of all ranks together; each takes an equal share.
        steps: Of the whole run.
        workers: Processes that read ahead; 0 reads in this one.
        augment: How patches are varied; None leaves them as they are.
        foreground: Fraction of samples centred where there is something to see.
        timeout: Seconds a worker may take for one sample.

    Raises:
        UserError: The store has no cases, or the batch does not divide by the ranks. While
            iterating: a case's file is damaged.
        LoaderError: While iterating: a worker died or hung, or a bug. Names the case.
    """
    if not len(store):
        raise UserError(f"{store.path}: the store has no cases to train on")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: give at least 1")
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step {start_step}: must be from 0 to steps ({steps})")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank}: must be from 0 to world_size ({world_size}) - 1")
    check_share(batch_size, world_size)
    size = tuple(int(n) for n in patch_size)
    reader = SampleReader(store, size, seed=seed, augment=augment, foreground=foreground)
    each = batch_size // world_size
    return Loader(
        *(reader, range(start_step, steps), range(rank * each, (rank + 1) * each), batch_size),
        workers=workers,
        timeout=timeout,
    )


def check_share(batch_size: int, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share equally."""
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        valid = " and ".join(str(n) for n in (below, below + world_size) if n)
        raise UserError(
            f"data.batch_size {batch_size} does not divide by {world_size} ranks: the nearest "
            f"valid sizes are {valid}"
        )


def check_parts(batch_size: int, world_size: int, parts: int) -> None:
    """Refuse a batch that ranks and `train.accumulate` cannot share equally."""
    check_share(batch_size, world_size)
    each = batch_size // world_size
    if each % parts:
        valid = ", ".join(str(n) for n in range(1, each + 1) if not each % n)
        whose = f"each of {world_size} ranks has" if world_size > 1 else "a step has"
        raise UserError(
            f"train.accumulate {parts}: {whose} {each} samples of data.batch_size {batch_size}, "
            f"which make no {parts} equal parts: choose from {valid}"
        )
