"""Where windows lie and how much each of their voxels counts: nnU-Net's steps, MONAI's Gaussian."""

import math
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from sparsemae.triples import Triple

SIGMA = 0.125  # of the Gaussian, in windows
_LEAST = 1e-3  # weight of a voxel, of the largest


@dataclass(frozen=True)
class Windows:
    """The windows of a volume; along an axis shorter than a window, one that reaches beyond."""

    shape: Triple
    patch_size: Triple
    starts: tuple[list[int], list[int], list[int]]  # per axis, in the padded volume
    before: Triple  # voxels of padding in front; an odd one more goes behind

    @classmethod
    def cover(cls, shape: Triple, patch_size: Triple, step: float) -> "Windows":
        """At most `step` windows apart, evenly spread. Source: nnunetv2 2.8.1
        `compute_steps_for_sliding_window`, and acvl_utils `pad_nd_image`.

        Raises:
            ValueError: A size below 1, or `step` not in (0, 1].
        """
        if min(*shape, *patch_size) < 1 or not 0 < step <= 1:
            raise ValueError(
                f"windows of {patch_size} in a volume of {shape}, {step} of a window apart: sizes "
                f"must be at least 1, and the step above 0 and at most 1"
            )
        pairs = list(zip(shape, patch_size, strict=True))
        return cls(
            *(shape, patch_size),
            starts=tuple(_starts(max(n, p), p, step) for n, p in pairs),
            before=tuple(max(0, p - n) // 2 for n, p in pairs),
        )

    @property
    def padded(self) -> Triple:
        """The volume's shape, at least that of a window."""
        return tuple(max(n, p) for n, p in zip(self.shape, self.patch_size, strict=True))

    @property
    def count(self) -> int:
        return math.prod(map(len, self.starts))

    @property
    def axis(self) -> int:
        """Along which the smallest part of the volume is held by windows that begin alike."""
        return max(range(3), key=lambda a: self.padded[a] / self.patch_size[a])

    def layer(self, start: int) -> list[Triple]:
        """The windows that begin at `start` along `axis`."""
        along = [[start] if a == self.axis else s for a, s in enumerate(self.starts)]
        return list(product(*along))

    def places(self, corner: Triple) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """A window's part of the volume, and where in the window it lies."""
        volume, inside = [], []
        for c, n, p, b in zip(corner, self.shape, self.patch_size, self.before, strict=True):
            volume.append(slice(max(0, c - b), min(n, c - b + p)))
            inside.append(slice(max(0, b - c), max(0, b - c) + volume[-1].stop - volume[-1].start))
        return tuple(volume), tuple(inside)


def importance(patch_size: Triple) -> Float[Tensor, "D H W"]:
    """Weights of a window's voxels, 1 at the most and 0.001 at the least.

    Equal to MONAI's `compute_importance_map` in mode gaussian, without the nine seconds that its
    import takes. nnU-Net's are lower in the corners (down to 1e-8), and off centre by half a voxel.
    """
    weights = torch.ones(())
    for n in patch_size:
        x = (torch.arange(n) - (n - 1) / 2) / (SIGMA * n)
        weights = weights[..., None] * torch.exp(-(x**2) / 2)
    return weights.clamp(min=max(_LEAST, float(weights.min())))


def _starts(size: int, patch: int, step: float) -> list[int]:
    count = math.ceil((size - patch) / (patch * step)) + 1
    apart = (size - patch) / max(1, count - 1)
    return [round(apart * i) for i in range(count)]
