"""The real nnU-Net plans, loads our export, trains from it, predicts; and we read what it saved.

nnU-Net runs in the environment of $NNUNET_PYTHON, or in this one if it is installed here. Takes
some minutes on a CPU.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from sparsemae.checkpoint import Snapshot, write_checkpoint
from sparsemae.export import TRAINER_FOLDER, export
from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.nnunet_plans import read_plans, to_network_axes
from sparsemae.planning.plan import build_network
from sparsemae.transfer import read_pretrained, transfer

NAME, PLANS, TRAINER = "Dataset501_Blobs", "nnUNetResEncUNetLPlans", "nnUNetTrainerShort"
STAND_INS = Path(__file__).with_name("stand_ins")
SPACING = (2.0, 1.0, 1.2)  # mm along x, y, z: thick slices are sagittal
SHAPE = (24, 44, 40)
SHORT = f"""
from nnUNetTrainerSawtooth import nnUNetTrainerSawtooth


class {TRAINER}(nnUNetTrainerSawtooth):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 10, 1, 1

    def on_train_start(self):
        super().on_train_start()
        self.num_epochs = 3  # of the ten that the schedule is made for

    def on_epoch_end(self):
        if self.current_epoch == 0:
            self.save_checkpoint(self.output_folder + "/after_first.pth")
        super().on_epoch_end()
"""


def nnunet_python():
    """The Python that has nnunetv2, or None."""
    python = os.environ.get("NNUNET_PYTHON", sys.executable)
    code = "import importlib.util as u; assert u.find_spec('nnunetv2')"
    done = subprocess.run([python, "-c", code], capture_output=True)
    return Path(python) if done.returncode == 0 else None


PYTHON = nnunet_python()
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="no nnunetv2 here; set NNUNET_PYTHON to a Python that has it"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """nnU-Net's folders with a small data set, planned and preprocessed."""
    root = tmp_path_factory.mktemp("nnunet")
    raw = root / "raw" / NAME
    for name in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / name).mkdir(parents=True)
    numbers = np.random.default_rng(0)
    affine = np.diag([*SPACING, 1.0])
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1) * SPACING
    for case in range(6):
        centre = np.array(SHAPE) * SPACING * numbers.uniform(0.4, 0.6, 3)
        inside = np.linalg.norm(grid - centre, axis=-1) < 9
        image = numbers.normal(100, 10, SHAPE) + 60 * inside
        folder = "imagesTs" if case == 5 else "imagesTr"
        nibabel.save(
            nibabel.Nifti1Image(image.astype(np.float32), affine),
            raw / folder / f"case{case}_0000.nii.gz",
        )
        if folder == "imagesTr":
            label = nibabel.Nifti1Image(inside.astype(np.uint8), affine)
            nibabel.save(label, raw / "labelsTr" / f"case{case}.nii.gz")
    (raw / "dataset.json").write_text(
        '{"channel_names": {"0": "T1"}, "labels": {"background": 0, "blob": 1}, '
        '"numTraining": 5, "file_ending": ".nii.gz"}'
    )
    run(root, "nnUNetv2_plan_and_preprocess", "-d", "501", "-pl", "nnUNetPlannerResEncL",
        "-c", "3d_fullres", "-npfp", "1", "-np", "1", "--verify_dataset_integrity")  # fmt: skip
    return root


@functools.cache
def needs_stand_ins():
    """Whether torchvision there cannot be imported, as one from PyPI beside a CPU's torch."""
    done = subprocess.run([PYTHON, "-c", "import torchvision"], capture_output=True)
    return done.returncode != 0


def run(root, command, *arguments, **environment):
    """A command of nnU-Net's; its output."""
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    settings = {"nnUNet_compile": "f", "OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1"}
    settings |= {"PYTHONPATH": str(STAND_INS)} if needs_stand_ins() else {}
    done = subprocess.run(
        [str(PYTHON.parent / command), *arguments],
        env=os.environ | folders | settings | environment,
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def planned(root):
    """Files of plans and data set, and the plans in our axes."""
    folder = root / "preprocessed" / NAME
    files = {"plans": folder / f"{PLANS}.json", "dataset_json": folder / "dataset.json"}
    return files, read_plans(files["plans"], files["dataset_json"])


def randomised(network):
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + (parameter.ndim == 1))
    return network


def as_run(folder, plan, network):
    """A run of ours that holds the network's weights."""
    tensors = {name: p.detach() for name, p in network.named_parameters()}
    files = {"model.safetensors": tensors, "optimizer.safetensors": {}}
    write_checkpoint(folder / "checkpoints", Snapshot(1, files, {}), keep=1, best=None)
    (folder / "plan.json").write_text(plan.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def exported(place):
    """A run of ours given to nnU-Net for its plans, with the trainer beside."""
    torch.manual_seed(0)
    files, plans = planned(place)
    network = randomised(build_network(plans.plan, 3, deep_supervision=False))
    run = as_run(place / "run", plans.plan, network)
    table = export(run, "nnunet", place / "export" / "x.pth", **files, trainer=True)
    assert table.encoder_share == 1
    (place / "export" / TRAINER_FOLDER / f"{TRAINER}.py").write_text(SHORT)
    return place / "export" / "x.pth"


LOAD = """
import json, sys
import numpy as np, torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

plans, weights, volume, heads, channels = sys.argv[1:6]
configuration = PlansManager(plans).get_configuration("3d_fullres")
network = get_network_from_plans(
    configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
    configuration.network_arch_init_kwargs_req_import, int(channels), int(heads),
    allow_init=True, deep_supervision=False,
)
before = {key: value.clone() for key, value in network.state_dict().items()}
load_pretrained_weights(network, weights)
after = network.state_dict()
file = torch.load(weights, weights_only=True)["network_weights"]
same = [key for key in after if torch.equal(after[key], file[key])]
changed = [key for key in after if not torch.equal(after[key], before[key])]
if volume != "-":
    network.load_state_dict(file)  # the heads, too
    with torch.no_grad():
        np.save(volume, network.eval()(torch.from_numpy(np.load(volume))).numpy())
print(json.dumps({"keys": len(after), "same": len(same), "changed": len(changed)}))
"""


def loaded(root, plans, weights, volume, heads, channels=1):
    """What nnU-Net's own loader takes of a file; the network's output instead of `volume`."""
    arguments = map(str, (plans, weights, volume or "-", heads, channels))
    return json.loads(run(root, PYTHON.name, "-c", LOAD, *arguments).splitlines()[-1])


def test_nnunets_network_with_our_weights_computes_what_ours_does(place, exported, tmp_path):
    files, plans = planned(place)
    assert plans.axes == (0, 2, 1)  # transpose_forward [2, 0, 1]
    np.save(tmp_path / "volume.npy", volume(plans))
    counts = loaded(place, files["plans"], exported, tmp_path / "volume.npy", 2)
    assert counts["same"] >= counts["keys"] - 2 * len(plans.plan.n_conv_per_stage_decoder)
    source = read_pretrained(exported)
    network = build_network(plans.plan, 2, deep_supervision=False).eval()
    transfer(source, network, "encoder+decoder", heads=True)
    x = torch.from_numpy(volume(plans))
    back = [2 + plans.axes.index(axis) for axis in range(3)]
    with torch.no_grad():
        ours = network(x.permute(0, 1, *back)).permute(0, 1, *(2 + axis for axis in plans.axes))
    theirs = torch.from_numpy(np.load(tmp_path / "volume.npy"))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert theirs.std() > 0.01


def volume(plans):
    """For nnU-Net's network, of other sizes along every axis."""
    size = to_network_axes(plans.plan.topology.total_stride, plans.axes)
    shape = [s * n for s, n in zip(size, (2, 3, 4), strict=True)]
    return np.random.default_rng(1).normal(size=(1, 1, *shape)).astype(np.float32)


def test_all_but_the_heads_of_resenc_l_is_loaded(place, tmp_path):
    recorded = json.loads(Path(__file__).with_name("topologies.json").read_text())["brain"]
    (tmp_path / "plans.json").write_text(json.dumps(recorded["plans"]))
    network = randomised(ResEncUNet.from_preset("L"))
    plan = read_plans(recorded["plans"]).plan
    export(as_run(tmp_path / "run", plan, network), "nnunet", tmp_path / "x.pth")
    counts = loaded(place, tmp_path / "plans.json", tmp_path / "x.pth", None, 1)
    assert (counts["keys"], counts["changed"]) == (956, 946)
    assert counts["same"] >= 946


@pytest.fixture(scope="module")
def trained(place, exported):
    """nnU-Net's own training from our file, with our trainer."""
    output = run(
        *(place, "nnUNetv2_train", "501", "3d_fullres", "0", "-tr", TRAINER, "-p", PLANS),
        *("-pretrained_weights", str(exported), "-device", "cpu"),
        nnUNet_extTrainer=str(exported.parent / TRAINER_FOLDER),
        nnUNet_n_proc_DA="0",
    )
    assert "Loading pretrained weights from file" in output
    assert "Training done." in output
    return place / "results" / NAME / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_0"


def test_training_starts_from_our_weights_with_the_decoder_alone(trained, exported):
    given = torch.load(exported, weights_only=True)["network_weights"]
    first = torch.load(trained / "after_first.pth", weights_only=False)["network_weights"]
    last = torch.load(trained / "checkpoint_final.pth", weights_only=False)["network_weights"]
    encoder = [name for name in given if name.startswith("encoder.")]
    decoder = [n for n in given if n.startswith("decoder.stages.") and "all_modules.0.w" in n]
    assert all(torch.equal(first[name], given[name]) for name in encoder)
    assert not any(torch.equal(first[name], given[name]) for name in decoder)
    assert not torch.equal(last[encoder[0]], given[encoder[0]])
    for name in decoder:  # near what it was given: it did not start anew
        assert (last[name] - given[name]).norm() < 0.5 * given[name].norm()


def test_nnunet_predicts_with_our_trainers_network(place, exported, trained):
    run(
        *(place, "nnUNetv2_predict", "-i", str(place / "raw" / NAME / "imagesTs"), "-o", "out"),
        *("-d", "501", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER, "-p", PLANS),
        *("-device", "cpu", "--disable_tta", "-npp", "1", "-nps", "1"),
        nnUNet_extTrainer=str(exported.parent / TRAINER_FOLDER),
    )
    label = nibabel.load(place / "out" / "case5.nii.gz")
    assert label.shape == SHAPE
    assert set(np.unique(label.dataobj)) <= {0, 1}


def test_we_read_what_nnunet_saved(place, trained):
    _, plans = planned(place)
    found = read_pretrained(trained / "checkpoint_final.pth")
    assert found.kind == "nnU-Net"
    assert found.topology == plans.plan.topology
    assert found.spacing == pytest.approx(plans.plan.spacing)
    assert found.patch_size == plans.plan.patch_size
    assert found.recipe == {"trainer": TRAINER, "dataset": NAME}
    network = build_network(plans.plan, 2, deep_supervision=False)
    table = transfer(found, network, "encoder+decoder", heads=True)
    assert (table.total("adapted"), table.total("fresh"), table.unused) == (0, 0, ())
