"""The processes of a run: one alone, or the ranks that torchrun started.

Started by torchrun, each joins a process group; gloo carries what is on the host, NCCL what is on
GPUs. Only rank 0 writes, prints and decides; what it finds out is shared, failures too, so that no
rank waits for one that has ended.
"""

import contextlib
import datetime
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparsemae.errors import RankError, UserError
from sparsemae.training.meeting import meet

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def many(self) -> bool:
        return self.world_size > 1

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks, the same bits on each; on the device, without waiting for it."""
        if self.many:
            dist.all_reduce(values)
        return values

    def total_of_parts(self, values: Tensor) -> Tensor:
        """As `total`, for a part of a loss: gradients come from the losses of all ranks."""
        return _Total.apply(values) if self.many else values

    def shared(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, on every rank. For small things, on the host.

        Raises:
            RankError: It raised something on rank 0, where that is raised.
        """
        if not self.many:
            return work()
        answer: list[Any] = [None, None]
        if not self.main:
            dist.broadcast_object_list(answer, 0, device=_HOST)
            if answer[1] is not None:
                raise RankError(f"rank 0: {answer[1]}")
            return answer[0]
        try:
            answer[0] = work()
        except BaseException as error:
            answer[1] = str(error) or type(error).__name__
            raise
        finally:
            dist.broadcast_object_list(answer, 0, device=_HOST)
        return answer[0]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model whose backward pass averages gradients over the ranks."""
        if not self.many:
            return model
        return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)


_HOST = torch.device("cpu")


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


@contextlib.contextmanager
def join_ranks(device: str, *, timeout: float = 600.0) -> Iterator[Ranks]:
    """This process as a rank of torchrun's, or alone.

    Args:
        device: auto, cpu, cuda, or, alone, cuda:1 and so on.
        timeout: Seconds that ranks wait for each other before they give up.

    Raises:
        UserError: No such device here, or fewer GPUs than processes.
    """
    if not dist.is_torchelastic_launched():
        yield Ranks(pick_device(device))
        return
    local = dist.get_node_local_rank()
    chosen = pick_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _bind_defaults()
    wait = datetime.timedelta(seconds=timeout)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=wait))
    name = meet(store, rank, world_size, timeout=timeout)
    dist.init_process_group(
        # gloo as well where there are GPUs: what is on the host need not visit one
        "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
        timeout=wait,
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=world_size,
    )
    yield Ranks(chosen, rank, world_size)
    # not after an error: it might wait for a rank that has ended
    dist.destroy_process_group()


def _bind_defaults() -> None:
    """Import what takes the group of its first import for a default, while there is none yet.

    DistributedDataParallel imports it otherwise, and keeps the group and its threads for ever. Such
    a thread that lets go of a tensor while Python ends aborts the process, after the run is done
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    importlib.import_module("torch.distributed.nn.functional")


@contextlib.contextmanager
def lost_ranks_explained(ranks: Ranks) -> Iterator[None]:
    """Turn what a collective raises when another rank has ended into a `RankError`."""
    try:
        yield
    except RuntimeError as error:
        if not (ranks.many and any(word in str(error) for word in ("gloo", "Gloo", "NCCL"))):
            raise
        why = " ".join(str(error).split())[:200]
        raise RankError(
            f"rank {ranks.rank} lost the connection to another, which has ended or does not "
            f"answer ({why})"
        ) from error


def pick_device(
    name: str, local_rank: int | None = None, *, key: str = "train.device"
) -> torch.device:
    """`auto` is CUDA where there is one; a rank gets the GPU of its number on the machine.

    `key` is what messages call the name's place.

    Raises:
        UserError: No such device here.
    """
    count = torch.cuda.device_count()
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in ("auto", *here):
        raise UserError(f"{key} {name}: not on this machine, choose auto, {', '.join(here)}")
    kind = ("cuda" if count else "cpu") if name == "auto" else name
    if local_rank is None or kind == "cpu":
        return torch.device(kind)
    if ":" in kind:
        raise UserError(f"train.device {name}: with several ranks each takes its own: say cuda")
    if local_rank >= count:
        raise UserError(
            f"{local_rank + 1} or more processes on a machine of {count} GPUs: start it with "
            f"torchrun --nproc-per-node {count}"
        )
    return torch.device("cuda", local_rank)
