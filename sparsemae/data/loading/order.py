"""Which case a sample of a run shows, and its random numbers: functions of keys, without state.

Sample i of a run is slot i % n of epoch i // n, for a store of n cases. Any i costs the same, so a
run continues anywhere, and it does not matter which process or rank asks.
"""

import hashlib
from functools import lru_cache

import numpy as np

_ROUNDS = 8
_WORD = 2**64 - 1


def case_of(sample: int, count: int, seed: int) -> int:
    """The index of the case that sample `sample` shows: every case once in each `count` samples.

    A Feistel network permutes the smallest square power of two that holds `count`; results beyond
    it are permuted again until one lands inside, fewer than four times on average.
    """
    epoch, position = divmod(sample, count)
    half = max(1, ((count - 1).bit_length() + 1) // 2)  # bits
    mask, keys = (1 << half) - 1, _round_keys(seed, epoch)
    while True:
        left, right = position >> half, position & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + key) & mask)
        position = left << half | right
        if position < count:
            return position


def generator_of(sample: int, count: int, seed: int) -> np.random.Generator:
    """The random numbers of one sample: a counter-based stream of its own."""
    epoch, slot = divmod(sample, count)
    key = np.frombuffer(_hash(f"sample {seed} {epoch} {slot}", 16), "<u8")
    return np.random.Generator(np.random.Philox(key=key))


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    words = np.frombuffer(_hash(f"epoch {seed} {epoch}", 8 * _ROUNDS), "<u8")
    return tuple(int(word) for word in words)


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=size).digest()


def _mixed(word: int) -> int:
    """A 64-bit word with every bit depending on all of `word`: the finaliser of splitmix64."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)
