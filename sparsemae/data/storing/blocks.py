"""A map of where a volume has something to see, one bit per block of 16^3 voxels, as short text."""

import base64
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

BLOCK = 16


def encode_blocks(foreground: Bool[np.ndarray, "d h w"]) -> str:
    """Which blocks are at least half foreground; where none is, which hold any.

    A block cut off by the edge counts by the voxels it has. The text depends on the map alone.
    """
    blocks = -(-np.array(foreground.shape) // BLOCK)
    padded = np.zeros(blocks * BLOCK, bool)
    padded[tuple(map(slice, foreground.shape))] = foreground
    counts = _sums(padded, blocks)
    sizes = [np.minimum(BLOCK, n - np.arange(0, n, BLOCK)) for n in foreground.shape]
    full = 2 * counts >= np.einsum("i,j,k->ijk", *sizes)
    if not full.any():
        full = counts > 0
    return base64.b85encode(zlib.compress(np.packbits(full).tobytes(), 9)).decode()


def decode_blocks(text: str, shape: Sequence[int]) -> Bool[np.ndarray, "gd gh gw"]:
    """The map that `encode_blocks` made of a volume of `shape`; ValueError if it is of another."""
    blocks = [-(-n // BLOCK) for n in shape]
    try:
        packed = np.frombuffer(zlib.decompress(base64.b85decode(text)), np.uint8)
        if len(packed) != -(-int(np.prod(blocks)) // 8):
            raise ValueError
    except (ValueError, zlib.error):
        raise ValueError(f"not a map of blocks of a volume of {tuple(shape)}: {text!r}") from None
    return np.unpackbits(packed, count=int(np.prod(blocks))).astype(bool).reshape(blocks)


def _sums(padded: Bool[np.ndarray, "D H W"], blocks: np.ndarray) -> np.ndarray:
    """Foreground voxels of every block."""
    d, h, w = (int(n) for n in blocks)
    cells = padded.reshape(d, BLOCK, h, BLOCK, w, BLOCK)
    return np.count_nonzero(cells, axis=(1, 3, 5))
