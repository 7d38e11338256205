"""What tests of several folders need: data sets and networks; processes.py has commands."""

import json
import os
import signal
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version

pytest_plugins = ["processes"]

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported: they run on the CPU then

# a shell that starts tests in the background has them ignore Ctrl-C, and every command they start
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure():
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        old = Version(version("triton")) < Version("3.7")
        if old and Version(np.__version__) >= Version("2.4"):
            raise pytest.UsageError(
                "this Triton's interpreter, which runs kernels on the CPU, needs another numpy: "
                "pip install 'numpy<2.4', or 'triton>=3.7'"
            )


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
    import nibabel  # a GPU machine that lacks it can test the kernels

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


@pytest.fixture(scope="session")
def small_plans(tmp_path_factory):
    """An nnU-Net plans.json of a very small network, for data sets of one channel."""
    architecture = {
        "n_stages": 3, "features_per_stage": [8, 16, 16], "n_blocks_per_stage": [1, 1, 1],
        "kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "n_conv_per_stage_decoder": [1, 1], "conv_op": "torch.nn.modules.conv.Conv3d",
        "conv_bias": True, "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "dropout_op": None,
        "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    configuration = {
        "patch_size": [16, 16, 16], "batch_size": 2, "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
        "batch_dice": False,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet."
            "ResidualEncoderUNet",
            "arch_kwargs": architecture, "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
        },
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset009_Eggs", "plans_name": "small",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("plans") / "plans.json"
    path.write_text(json.dumps(plans))
    return path


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory, labelled, small_plans):
    """A fine-tuning run of 80 steps on the labelled data set, which learned its classes."""
    from sparsemae.finetune import FinetuneConfig, finetune

    run = tmp_path_factory.mktemp("finetuned") / "run"
    raw = {
        "plan": {"file": str(small_plans)},
        "data": {"augmentation": "none", "validation": 4},
        "train": {"steps": 80, "save_every": 40, "optimizer": "adamw", "lr": 5e-3},
    }
    finetune(labelled, run, FinetuneConfig.model_validate(raw))
    return run
