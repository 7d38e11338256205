import json
import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: they run on the CPU then


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def shared():
    """The folder of real volumes beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real volumes: {folder} is missing")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """`new_empty` gives NaN, so that an operator that leaves a hole in its output is caught."""
    empty = torch.Tensor.new_empty

    def nan(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", nan)


@pytest.fixture
def one_thread():
    """Networks of a few channels are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A store of three heads of 24^3, two to train on and one held out."""
    from sparsemae.data.options import PreprocessConfig
    from sparsemae.data.phantom import write_heads
    from sparsemae.data.preprocess import preprocess

    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder / "volumes", 3, size=24)
    keep = PreprocessConfig(spacing=None)
    return preprocess([folder / "volumes"], folder / "store", keep).store.path


@pytest.fixture(scope="session")
def draw_labelled():
    """`draw_labelled(folder, cases=4, ...)`: a data set in nnU-Net's layout, of bright ellipsoids
    (class 1) with a dark core off their centre (class 2), no axis like another."""

    def draw(
        folder, cases=4, *, channels=1, size=(20, 24, 22), spacing=(1.0, 1.0, 1.0), labels=None
    ):
        rng = np.random.default_rng(len(folder.name))
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        affine = np.diag([*spacing, 1.0])
        for case in range(cases):
            grid = np.indices(size).transpose(1, 2, 3, 0)
            centre = np.array(size) / 2 + rng.uniform(-2, 2, 3)
            radii = np.array(size) * (0.35, 0.3, 0.4)
            classes = ((((grid - centre) / radii) ** 2).sum(-1) < 1).astype(np.uint8)
            core = centre + radii * (0.35, 0.1, -0.3)
            classes[(((grid - core) / (radii * 0.4)) ** 2).sum(-1) < 1] = 2
            for channel in range(channels):
                levels = np.array([0.0, 100 + 20 * channel, 40 - 10 * channel])
                image = levels[classes] + rng.normal(5, 2, size) * (grid[..., 0] > 2)
                path = folder / "imagesTr" / f"case_{case}_{channel:04}.nii.gz"
                nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), path)
            path = folder / "labelsTr" / f"case_{case}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(classes, affine), path)
        about = {
            "channel_names": {str(i): f"MR{i}" for i in range(channels)},
            "labels": labels or {"background": 0, "shell": 1, "core": 2},
            "numTraining": cases,
            "file_ending": ".nii.gz",
        }
        (folder / "dataset.json").write_text(json.dumps(about))
        return folder

    return draw


@pytest.fixture(scope="session")
def labelled(tmp_path_factory, draw_labelled):
    """Such a data set of four cases with one channel; not to be changed."""
    return draw_labelled(tmp_path_factory.mktemp("labelled") / "Dataset009_Eggs")
