"""Batches brought to the training device while it is busy with the one before."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from sparsemae.data.loading.augment import assemble
from sparsemae.data.loading.samples import RawBatch

T = TypeVar("T")
S = TypeVar("S")


def to_device_ahead(
    batches: Iterable[RawBatch],
    device: torch.device | str,
    assemble: Callable[[RawBatch], dict[str, Any]] = assemble,
) -> Iterator[dict[str, Any]]:
    """The batches of a loader as patches on `device`, as `assemble` gives them.

    On a GPU a thread waits for the next batch, pins it and copies it on a stream of its own, one
    batch ahead. On a CPU there is nothing to overlap with: the workers are ahead already.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch in batches:
            yield assemble(batch.map(lambda array: torch.from_numpy(array).to(device)))
        return
    stream = torch.cuda.Stream(device)

    def stage(batch: RawBatch) -> tuple[RawBatch, torch.cuda.Event]:
        def move(array: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

        with torch.cuda.stream(stream):
            return batch.map(move), stream.record_event()

    def take(tensor: torch.Tensor) -> torch.Tensor:
        tensor.record_stream(current)  # its memory is not given away while it is in use there
        return tensor

    with closing(one_ahead(batches, stage)) as staged:
        for batch, copied in staged:
            current = torch.cuda.current_stream(device)
            current.wait_event(copied)
            yield assemble(batch.map(take))


def one_ahead(items: Iterable[T], stage: Callable[[T], S]) -> Iterator[S]:
    """`stage(item)` of each item, in order, done in a thread while the one before is in use.

    Never more than one is staged and not yet taken. What `items` or `stage` raise is raised here.
    """
    source, staged, room = iter(items), SimpleQueue(), threading.Semaphore(0)
    stopped = threading.Event()

    def run() -> None:
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    return
                staged.put((stage(next(source)), None))
        except BaseException as error:
            staged.put((None, error))

    thread = threading.Thread(target=run, name="sparsemae-prefetch", daemon=True)
    thread.start()
    room.release()
    try:
        while True:
            result, error = staged.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            room.release()
            yield result
    finally:
        stopped.set()
        room.release()
        if thread.is_alive() and hasattr(source, "cancel"):
            source.cancel()  # the thread may be waiting for a worker
        thread.join()
        if hasattr(source, "close"):
            source.close()
