"""The quality filter: each reason, with the numbers, exactly at its limit."""

from pathlib import Path

import numpy as np
import pytest

from sparsemae.data.codes import VolumeError
from sparsemae.data.options import FilterConfig, PreprocessConfig
from sparsemae.data.preparing.quality import assess
from sparsemae.data.read import Volume, read_volume
from sparsemae.data.transforms import prepare

LOOSE = {"field_of_view": 1e-3, "spacing": 99.0, "slices": 1, "contrast": 1e-9}


def judge(volume, **limits):
    assess(
        prepare(volume, PreprocessConfig(spacing=None)), volume, FilterConfig(**(LOOSE | limits))
    )


def make(spacing=(1.0, 1.5, 2.0), shape=(30, 24, 20), low=100, high=900, margin=0):
    rng = np.random.default_rng(0)
    array = np.zeros(shape, np.float32)
    inner = array[:, :, margin : shape[2] - margin]
    inner[...] = rng.uniform(low, high, inner.shape)
    return Volume(array, np.diag([*spacing, 1]), spacing, Path("some.nii"))


@pytest.mark.parametrize(
    ("code", "limit", "passes", "fails", "found"),
    [
        ("field_of_view", "field_of_view", 30.0, 30.1, r"30 x 36 x 40 mm.* at least 30.1"),
        ("spacing", "spacing", 2.0, 1.9, r"1 x 1.5 x 2 mm.* at most 1.9"),
        ("slices", "slices", 20, 21, r"30 x 24 x 20 slices.* at least 21"),
        ("contrast", "contrast", 0.78, 0.8, r"98 % of its content between 10\d.* and 89\d"),
    ],
)
def test_limits(code, limit, passes, fails, found):
    judge(make(), **{limit: passes})
    with pytest.raises(VolumeError, match=f"some.nii: .*{found}") as error:
        judge(make(), **{limit: fails})
    assert error.value.code == f"quality.{code}"
    assert "\n" not in str(error.value)


def test_the_field_of_view_is_the_scan_s_and_slices_are_those_with_content():
    judge(make(margin=6), field_of_view=30, slices=8)
    with pytest.raises(VolumeError, match="30 x 24 x 8 slices"):
        judge(make(margin=6), slices=9)


def test_contrast_of_one_level_with_few_bright_voxels():
    volume = make(low=500, high=501)
    volume.array[3, 3, :5] = 900
    with pytest.raises(VolumeError, match=r"contrast of 0.02, it has 0.00098"):
        judge(volume, contrast=0.02)


def test_contrast_around_zero_is_contrast():
    volume = make(low=-1, high=1)
    judge(volume, contrast=0.5)


def test_real_volumes_pass(shared):
    for path in sorted((shared / "images").iterdir()):
        volume = read_volume(path)
        assess(prepare(volume, PreprocessConfig(spacing=(3.0, 3.0, 3.0))), volume, FilterConfig())
