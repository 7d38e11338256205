import numpy as np
import pytest
from scipy import ndimage


@pytest.fixture
def blobs():
    """Maps of `classes` smooth classes that fill about half the volume and touch its faces."""

    def draw(seed, shape=(20, 24, 17), classes=3):
        random = np.random.default_rng(seed)
        fields = [ndimage.gaussian_filter(random.normal(size=shape), 2) for _ in range(classes + 1)]
        return np.argmax(fields, axis=0).astype(np.int32)

    return draw


@pytest.fixture
def cuboid():
    """A map of zeros with one cuboid of 1, from `start` up to `stop`."""

    def draw(start, stop, shape=(16, 18, 20)):
        out = np.zeros(shape, np.int32)
        out[tuple(map(slice, start, stop))] = 1
        return out

    return draw
