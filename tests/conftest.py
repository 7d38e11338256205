import os
from pathlib import Path

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
