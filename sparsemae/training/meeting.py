"""How ranks that were started again find each other, and not what dead ones left behind.

torchrun keeps one store over all restarts. Whoever looks up the address of a rank before that has
written its new one finds the old, and connects to a process that is gone. So ranks of an attempt
agree on a name first, which none before had, and keep everything else under that name.
"""

import hashlib
import time
import uuid

import torch.distributed as dist

_PAUSE = 0.05  # seconds between looks


def meet(store: dist.Store, rank: int, world_size: int, *, timeout: float) -> str:
    """A name that all ranks now alive have in common, and no attempt before.

    Each rank says hello with a word of its own. Rank 0 makes a name of all of these and tells it to
    each under its word. A word left behind by a dead rank is never answered; once that rank's
    successor has written its own, rank 0 makes a new name. All have one when all have answered.

    Raises:
        TimeoutError: Not all ranks came within `timeout` seconds.
    """
    limit, word = time.monotonic() + timeout, uuid.uuid4().hex
    if rank == 0:
        return _lead(store, word, world_size, limit)
    store.set(f"hello {rank}", word)
    name = ""
    while True:
        if store.check([f"name {word}"]):
            told = store.get(f"name {word}").decode()
            if told != name:
                name = told
                store.set(f"heard {word} {name}", "")
        if name and store.check([f"go {name}"]):
            return name
        _pause(limit, "rank 0 has")


def _lead(store: dist.Store, word: str, world_size: int, limit: float) -> str:
    others: list[str] = []
    while True:
        keys = [f"hello {rank}" for rank in range(1, world_size)]
        if all(store.check([key]) for key in keys):
            found = [store.get(key).decode() for key in keys]
            name = hashlib.sha256(" ".join([word, *found]).encode()).hexdigest()[:32]
            if found != others:
                others = found
                for other in others:
                    store.set(f"name {other}", name)
            if all(store.check([f"heard {other} {name}"]) for other in others):
                store.set(f"go {name}", "")
                return name
        _pause(limit, "some rank has")


def _pause(limit: float, who: str) -> None:
    if time.monotonic() > limit:
        raise TimeoutError(f"{who} not come to meet the others; see what the launcher says")
    time.sleep(_PAUSE)
