"""Many volumes: memory stays flat, and every volume costs the same number of file operations."""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preprocess import preprocess
from sparsemae.data.store import Store

COUNT = 1600


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A BIDS-like tree of volumes of 8^3 voxels, two sessions per subject."""
    folder = tmp_path_factory.mktemp("many")
    header = nib.Nifti1Image(np.zeros((8, 8, 8), np.int16), np.eye(4)).to_bytes()[:352]
    rng = np.random.default_rng(0)
    for i in range(COUNT):
        path = folder / f"sub-{i // 2:04d}" / f"ses-{i % 2}" / "scan.nii"
        path.parent.mkdir(parents=True)
        path.write_bytes(header + rng.integers(1, 900, (8, 8, 8)).astype("<i2").tobytes())
    return folder


def resident_mib():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_and_calls_linear(many, tmp_path, monkeypatch):
    memory, listings = [], []
    listed = Path.iterdir

    def iterdir(path):
        listings.append(path)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)

    def watch(progress, outcome):
        if progress.done % 400 == 0:
            memory.append(resident_mib())

    config = PreprocessConfig(spacing=None)
    summary = preprocess([many], tmp_path / "store", config, on_outcome=watch)
    assert (summary.progress.ok, summary.progress.rejected) == (COUNT, 0)
    assert len(memory) == 5
    # a line of about 1 KB per volume is kept, nothing else: 1200 volumes after the first 400
    assert memory[-1] - memory[1] < 15, memory
    assert len(listings) < 10  # no folder is listed per volume
    store = Store.open(tmp_path / "store")
    assert len(store) == COUNT
    assert len({case.subject for case in store.cases}) == COUNT // 2
    again = preprocess([many], tmp_path / "store", config)
    assert again.progress.kept == COUNT
    assert again.store.fingerprint == store.fingerprint
