"""Out of memory, as a line that says what to change."""

import contextlib
from collections.abc import Iterator

import torch

from sparsemae.errors import OutOfMemoryError

_CPU = ("can't allocate memory", "not enough memory")  # what torch says of a CPU


@contextlib.contextmanager
def memory_explained(state) -> Iterator[None]:
    """Turn torch's errors about memory into an `OutOfMemoryError` of the step `state` is at."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        used = f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU are in use"
        raise OutOfMemoryError(_advice(state.step, used)) from error
    except MemoryError as error:
        raise OutOfMemoryError(_advice(state.step, "on the host")) from error
    except RuntimeError as error:
        if not any(words in str(error) for words in _CPU):
            raise
        raise OutOfMemoryError(_advice(state.step, "on the host")) from error


def _advice(step: int, where: str) -> str:
    return (
        f"step {step}: out of memory ({where}). Raise train.accumulate, which computes a batch in "
        f"parts and changes nothing else, or lower data.batch_size, or data.patch_size"
    )
