"""Out of memory, as a line that says what to change."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from sparsemae.errors import OutOfMemoryError

_CPU = ("can't allocate memory", "not enough memory")  # what torch says of a CPU


@contextlib.contextmanager
def memory_explained(told: Callable[[str], str]) -> Iterator[None]:
    """Turn torch's errors about memory into an `OutOfMemoryError`; `told` is given where it was."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU are in use"
        raise OutOfMemoryError(told(used)) from error
    except MemoryError as error:
        raise OutOfMemoryError(told("on the host")) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _CPU):
            raise
        raise OutOfMemoryError(told("on the host")) from error


def step_advice(step: int, where: str) -> str:
    """What a run that needs too much in a step may change."""
    return (
        f"step {step}: out of memory ({where}). Raise train.accumulate, which computes a batch in "
        f"parts and changes nothing else, or lower data.batch_size, or data.patch_size"
    )
