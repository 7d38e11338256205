import time

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from sparsemae.data.phantom import draw_head, write_heads
from sparsemae.data.read import read_volume


def test_a_head_is_one_object_in_air():
    began = time.process_time()
    array, affine = draw_head(0)
    assert time.process_time() - began < 3
    assert (array.shape, array.dtype) == ((96, 96, 96), np.float32)
    head = array > 0
    assert 0.2 < head.mean() < 0.5  # air is exactly zero
    labels, count = ndimage.label(head)
    assert np.bincount(labels[head]).max() > 0.999 * head.sum()
    assert count < 20
    np.testing.assert_allclose(np.diag(affine)[:3], 208 / 96)
    # Nearest to symmetric from left to right.
    flips = [np.mean(head ^ np.flip(head, axis)) for axis in range(3)]
    assert flips[0] < min(flips[1:])


def test_seed_decides():
    a, b, c = draw_head(1, 48), draw_head(1, 48), draw_head(2, 48)
    assert np.array_equal(a[0], b[0])
    assert np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0])
    with pytest.raises(ValueError, match="size 8"):
        draw_head(0, 8)


def test_written_heads_differ_in_orientation_only(tmp_path):
    paths = write_heads(tmp_path / "heads", 4, seed=7, size=32)
    assert [p.name for p in paths] == [f"head_0{i}.nii.gz" for i in range(4)]
    codes = ["".join(nib.aff2axcodes(nib.load(path).affine)) for path in paths]
    assert codes == ["RAS", "LPI", "PIR", "LAS"]
    for i, path in enumerate(paths):
        array, affine = draw_head(7 + i, 32)
        volume = read_volume(path)
        np.testing.assert_allclose(volume.array, array, atol=0.51)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-4)
