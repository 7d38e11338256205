"""Where the classes of a case are: some of their voxels, for patches that are sure to show one."""

import numpy as np
from jaxtyping import Int32

MOST = 4096  # voxels kept of a class


def find_locations(
    labels: Int32[np.ndarray, "D H W"], classes: int, seed: int, *, ignore: int | None = None
) -> tuple[Int32[np.ndarray, "n 3"], tuple[int, ...]]:
    """Voxels of the classes 1, 2, ... one class after the other, and how many of each.

    Of more than `MOST` a random part is kept, the same for the same seed. Where a label is ignored,
    voxels of any other are the last: a patch anywhere else would have nothing to be scored.
    """
    flat = labels.ravel()
    kept, counts = [], []
    for number in range(1, classes + (ignore is not None)):
        found = np.flatnonzero(flat == number if number < classes else flat != ignore)
        if len(found) > MOST:
            rng = np.random.Generator(np.random.Philox(key=[seed, number]))
            found = np.sort(rng.choice(found, MOST, replace=False, shuffle=False))
        kept.append(found)
        counts.append(len(found))
    voxels = np.concatenate(kept) if kept else np.empty(0, np.int64)
    return np.stack(np.unravel_index(voxels, labels.shape), 1).astype(np.int32), tuple(counts)
