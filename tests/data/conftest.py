import numpy as np
import pytest

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Case, Store, write_image, write_index, write_mask


@pytest.fixture(scope="session")
def make_case():
    """`make_case(folder, id, array [D, H, W], mask=None, dtype="float16", **fields)`: a case whose
    files are written."""

    def make(folder, case_id, array, mask=None, dtype="float16", **fields):
        stored = write_image(folder, case_id, array[None], dtype)
        excluded = None if mask is None else write_mask(folder, case_id, mask[None])
        identity = tuple(map(tuple, np.eye(4).tolist()))
        usual = {
            "shape": array.shape,
            "spacing": (1.0, 1.0, 1.0),
            "affine": identity,
            "background": -1.5,
            "mean": 150.0,
            "std": 100.0,
            "crop_start": (0, 0, 0),
            "crop_stop": array.shape,
            "source": f"/data/{case_id}.nii.gz",
            "stamp": "1000-2000",
            "source_shape": array.shape,
            "source_affine": identity,
        }
        return Case(id=case_id, **vars(stored), excluded=excluded, **(usual | fields))

    return make


@pytest.fixture(scope="session")
def make_store(make_case):
    """`make_store(folder, {id: array [D, H, W]}, masks={}, dtype="float16", **fields)`: a store."""

    def make(folder, arrays, masks=None, dtype="float16", **fields):
        masks = masks or {}
        cases = [make_case(folder, i, a, masks.get(i), dtype, **fields) for i, a in arrays.items()]
        write_index(folder, cases, PreprocessConfig(dtype=dtype))
        return Store.open(folder)

    return make
