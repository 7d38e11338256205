"""Random patches from a store, in an order that is a function of the seed and nothing else.

Sample i of a run is keyed by (seed, epoch, slot) with epoch, slot = divmod(i, cases), so it is the
same with any number of workers, and a run resumes at any step without replaying the earlier ones.
"""

import atexit
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.utils.data import DataLoader, Dataset, Sampler

from sparsemae.data.store import Case, Store
from sparsemae.errors import UserError

Size = tuple[int, int, int]


class PatchDataset(Dataset):
    """Item i: one patch of `patch_size` voxels; every case once per epoch, in a new order.

    An item is {"image": float32 [1, D, H, W], "excluded": bool [1, D, H, W], "case": id}. A volume
    smaller than the patch lies in its middle, filled up with the case's background; `excluded` is
    True on those voxels. `mirror` flips each axis with probability 1/2. `length` is what `len`
    says (one epoch if None); any i >= 0 is valid.
    """

    def __init__(
        self,
        store: Store,
        patch_size: Sequence[int],
        *,
        seed: int,
        mirror: bool = False,
        length: int | None = None,
    ):
        size = tuple(int(n) for n in patch_size)
        if len(size) != 3 or min(size) < 1:
            raise ValueError(f"patch_size {size}: give three positive numbers of voxels")
        if seed < 0:
            raise ValueError(f"seed {seed}: give a number that is not negative")
        self.store, self.patch_size, self.seed, self.mirror = store, size, seed, mirror
        self.length = len(store) if length is None else length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, slot = divmod(index, len(self.store))
        case = self.store.cases[_case_order(self.seed, epoch, len(self.store))[slot]]
        rng = _generator(self.seed, epoch, slot)
        room = np.maximum(np.subtract(case.shape, self.patch_size), 0)
        start = rng.integers(0, room + 1)  # drawn with or without mirror: the crops are the same
        flips = rng.integers(0, 2, size=3)
        try:
            image, excluded = self._patch(case, start)
        except Exception as error:  # blosc2 raises many types on a damaged file
            raise UserError(
                f"case {case.id}: cannot read {self.store.path / case.file} ({error}); "
                f"make the store again with `sparsemae preprocess`"
            ) from error
        axes = [axis + 1 for axis in range(3) if self.mirror and flips[axis]]
        return {
            "image": torch.from_numpy(np.ascontiguousarray(np.flip(image, axes))),
            "excluded": torch.from_numpy(np.ascontiguousarray(np.flip(excluded, axes))),
            "case": case.id,
        }

    def _patch(self, case: Case, start: Int[np.ndarray, "3"]) -> tuple[np.ndarray, np.ndarray]:
        """The patch that begins at voxel `start`, padded where the volume is smaller."""
        size = np.minimum(case.shape, self.patch_size)
        voxels = self.store.read_box(case, tuple(start.tolist()), tuple((start + size).tolist()))
        if tuple(size) == self.patch_size:
            return voxels, np.zeros(voxels.shape, bool)
        before = np.subtract(self.patch_size, size) // 2
        inside = (slice(None), *(slice(a, a + n) for a, n in zip(before, size, strict=True)))
        image = np.full((1, *self.patch_size), case.background, np.float32)
        excluded = np.ones(image.shape, bool)
        image[inside], excluded[inside] = voxels, False
        return image, excluded


class PatchLoader:
    """Iterates over the batches of steps start_step .. steps-1; see `make_loader`."""

    def __init__(self, loader: DataLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        iterator = iter(self.loader)
        stop = partial(_stop_workers, iterator)
        atexit.register(stop)  # for an iteration left half done, as by an error in the loop
        try:
            yield from iterator
        except UserError as error:  # torch puts a worker's traceback before the message
            raise UserError(str(error).strip().rsplit(f"{UserError.__name__}: ", 1)[-1]) from None
        finally:
            atexit.unregister(stop)
            stop()


def make_loader(
    store: Store,
    patch_size: Sequence[int],
    batch_size: int,
    *,
    seed: int,
    steps: int,
    start_step: int = 0,
    workers: int = 0,
    mirror: bool = False,
) -> PatchLoader:
    """The batches of training steps `start_step` to `steps` - 1; `steps` is the whole run's number.

    A batch is {"image": float32 [B, 1, D, H, W], "excluded": bool [B, 1, D, H, W], "case": B ids}.
    Batch k holds samples k * B to (k + 1) * B - 1 of `PatchDataset`, whatever `start_step` and
    `workers` are. The global random state of torch is not drawn from.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: give at least 1")
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step {start_step}: must be from 0 to steps ({steps})")
    dataset = PatchDataset(store, patch_size, seed=seed, mirror=mirror, length=steps * batch_size)
    return PatchLoader(
        DataLoader(
            dataset,
            batch_sampler=_StepSampler(batch_size, start_step, steps),
            num_workers=workers,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator().manual_seed(seed),  # else iter() draws from the global one
        )
    )


class _StepSampler(Sampler):
    def __init__(self, batch_size: int, start: int, stop: int):
        self.batch_size, self.start, self.stop = batch_size, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.start, self.stop):
            yield list(range(step * self.batch_size, (step + 1) * self.batch_size))


def _generator(seed: int, *key: int) -> np.random.Generator:
    # spawn_key, not entropy (seed, *key): numpy pads entropy with zeros, so (1, 0) is (1, 0, 0).
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


@lru_cache(maxsize=4)
def _case_order(seed: int, epoch: int, count: int) -> Int[np.ndarray, "count"]:
    return _generator(seed, epoch).permutation(count)


def _stop_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, which at exit torch asks by the SIGTERM they
    ignore: Python would then wait for them for ever. No public call does it."""
    if workers := getattr(iterator, "_workers", ()):
        iterator._shutdown_workers()
        for worker in workers:
            worker.kill()  # one that hangs in a read; the others have ended


def _ignore_stop_signals(worker: int) -> None:
    """A scheduler signals the whole group; a worker that died of it would crash the main process
    while it saves. Workers end when the main process does."""
    for name in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(name, signal.SIG_IGN)
