"""Folders of volumes for the tests of preprocessing, and the command run as a person runs it."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Case, Store, write_image, write_index, write_mask

AFFINE = np.diag([1.5, 1.5, 1.5, 1])


@pytest.fixture
def body():
    return _body


def _body(shape=(40, 36, 32), air=0.0, seed=0, inside=slice(9, -8)):
    """A block of tissue of about 40 +- 15 in air."""
    rng = np.random.default_rng(seed)
    array = np.full(shape, air, np.float32)
    tissue = rng.standard_normal(array[inside, inside, inside].shape) * 15 + 40
    array[inside, inside, inside] = tissue
    return array


@pytest.fixture
def save_volume():
    return _save_volume


def _save_volume(path, seed=0, size=20, affine=AFFINE):
    """A small volume with air around it; the content follows from the seed."""
    rng = np.random.default_rng(seed)
    array = np.zeros((size, size, size), np.int16)
    array[2:-2, 3:-2, 2:-3] = rng.integers(1, 900, (size - 4, size - 5, size - 5))
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def volumes(tmp_path):
    """A function that fills a folder with volumes v000.nii.gz, v001.nii.gz ..."""

    def fill(count, name="volumes", size=20):
        for i in range(count):
            _save_volume(tmp_path / name / f"v{i:03d}.nii.gz", seed=i, size=size)
        return tmp_path / name

    return fill


@pytest.fixture
def sparsemae(tmp_path):
    """Start `sparsemae WORDS` in a process group of its own; everything is killed at the end."""
    started = []

    def start(*words, held=None, **options):
        program = held.words if held else ["-m", "sparsemae"]
        process = subprocess.Popen(
            [sys.executable, *map(str, [*program, *words])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **{"cwd": tmp_path, **options},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()
        process.stdout.close()


@pytest.fixture
def contents():
    return _contents


def _contents(store):
    """What makes a store: its index, and the bytes of all case files."""
    names = [store / "index.json", *store.glob("cases/*"), *store.glob("excluded/*")]
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(names)}


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


@pytest.fixture
def children():
    return _children


def _children(pid):
    """Processes that a process, or a thread of it, has started and not waited for."""
    found = []
    for task in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return found
