"""What of a volume is air: its intensity, how far its noise reaches, and the box of the rest."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32

from sparsemae.data.reading.sample import evenly, median
from sparsemae.triples import Triple

DARK = 0.25  # of the way from the 1st to the 99th percentile: tissue on the faces is above it
NOISE = 5.0  # median distances of the faces' voxels from air: over 3 standard deviations of noise


@dataclass(frozen=True)
class Air:
    """The intensity of air, or of whatever an image was filled with around its content."""

    value: float
    noise: float = 0.0  # a voxel this close to it shows nothing either

    def crop(self, array: Float32[np.ndarray, "D H W"]) -> tuple[Triple, Triple]:
        """Start and stop of the smallest box that holds every voxel that is not exactly air.

        ValueError if there is none.
        """
        content = array != self.value
        start, stop = [], []
        for axis in range(3):
            others = tuple(a for a in range(3) if a != axis)
            hit = np.flatnonzero(content.any(axis=others))
            if hit.size == 0:
                raise ValueError(f"every voxel is {self.value:g}: nothing to crop to")
            start.append(int(hit[0]))
            stop.append(int(hit[-1]) + 1)
            content = content.take(range(start[-1], stop[-1]), axis=axis)
        return tuple(start), tuple(stop)

    def foreground(self, array: Float32[np.ndarray, "D H W"]) -> Bool[np.ndarray, "D H W"]:
        """Voxels that stand out of the noise."""
        above = array > np.float32(self.value + self.noise)
        above |= array < np.float32(self.value - self.noise)
        return above


def find_air(array: Float32[np.ndarray, "D H W"]) -> Air:
    """Air as the six faces of a volume show it.

    Its intensity is 0 if no voxel is below 0. Else, as in CT or in a z-scored image, it is the
    median of the faces' voxels, at most 0, if that is dark; where the faces cut through tissue, the
    volume's 1st percentile. Noise is told where the faces are dark, and ends below tissue.
    """
    faces = [array[i] for i in (0, -1)] + [array[:, i] for i in (0, -1)]
    faces = np.concatenate([f.ravel() for f in (*faces, array[:, :, 0], array[:, :, -1])])
    low, high = map(float, np.percentile(evenly(array.reshape(-1)), (1, 99), method="lower"))
    middle = median(faces)
    dark = middle <= low + DARK * (high - low)
    value = min(middle if dark else low, 0.0)  # so 0 if no voxel is below 0
    if not dark:
        return Air(value)
    spread = median(np.abs(faces.astype(np.float64) - value))
    return Air(value, min(NOISE * spread, DARK * max(high - value, 0.0)))
