"""What a good file may take: twice the float32 array, however it is written."""

import subprocess
import sys

import numpy as np
import pytest

# The peak of resident memory since the reset, above what the process held before; in bytes.
PEAK = """
import resource, sys
from sparsemae.data.read import read_volume
read_volume(sys.argv[1])
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
status = lambda key: next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if key in l)
before = status("VmRSS")
read_volume(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are reset through /proc")
@pytest.mark.parametrize(
    ("dtype", "name"), [("f8", "a.nii"), ("f8", "a.nii.gz"), ("i2", "a.nii.gz")]
)
def test_peak(tmp_path, put, affine, dtype, name):
    array = np.zeros((200, 200, 200), dtype)
    array[::7, ::5, ::3] = np.random.default_rng(0).integers(
        -5000, 9999, array[::7, ::5, ::3].shape
    )
    turned = affine[:, [2, 0, 1, 3]]
    fields = {"scl_slope": 0.5, "scl_inter": 3} if dtype == "i2" else {}
    small = put(tmp_path / "small.nii")
    large = put(tmp_path / name, array, affine=turned, **fields)
    done = subprocess.run(
        [sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 2 * 4 * array.size + (16 << 20)
