"""Some of a volume's voxels in place of all, where a percentile need not be exact."""

import numpy as np
from jaxtyping import Shaped

COUNT = 1 << 17


def evenly(values: Shaped[np.ndarray, "voxels"]) -> Shaped[np.ndarray, "n"]:
    """About `COUNT` of the values, in order; the odd step runs through all rows and planes."""
    return values[:: max(1, values.size // COUNT) | 1]


def median(values: Shaped[np.ndarray, "..."]) -> float:
    """The upper one of two: a value that is there, so voxels can equal it."""
    middle = values.size // 2
    return float(np.partition(values, middle)[middle])
