"""Global random numbers that follow from the step, so that no state of theirs is ever saved.

Masks and patches have generators of their own. What else draws, such as dropout or another
library's augmentation, uses the global ones: they are set anew in every step.
"""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch (also on the current GPU), numpy and random for a step on a rank."""
    words = np.random.SeedSequence(seed, spawn_key=(step, rank)).generate_state(3, np.uint64)
    torch.default_generator.manual_seed(int(words[0]))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    random.seed(int(words[2]))


@contextlib.contextmanager
def seeds_restored() -> Iterator[None]:
    """Leave the global generators as they were found."""
    numpys, pythons = np.random.get_state(), random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            np.random.set_state(numpys)
            random.setstate(pythons)
