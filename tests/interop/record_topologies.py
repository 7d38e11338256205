"""Record what nnU-Net plans and builds for data sets of many shapes; run with nnunetv2 installed.

    python tests/interop/record_topologies.py

writes topologies.json beside it: for every data set its plans (one configuration) and dataset.json,
and of the network that nnU-Net builds from them the number of keys and a digest of all keys and
shapes. Nothing is preprocessed: the planner needs a fingerprint, which is made up here.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

ROOT = Path(tempfile.mkdtemp())
for name in ("raw", "preprocessed", "results"):
    (ROOT / name).mkdir()
    os.environ[f"nnUNet_{name}"] = str(ROOT / name)  # before nnunetv2 is imported

import numpy as np  # noqa: E402
import SimpleITK as sitk  # noqa: E402
import torch  # noqa: E402
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (  # noqa: E402,E501
    nnUNetPlannerResEncL,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # noqa: E402
from nnunetv2.utilities.label_handling.label_handling import (  # noqa: E402
    determine_num_input_channels,
)
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager  # noqa: E402

BRATS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
DATASETS = {  # name: voxel size z, y, x in mm; median shape; channels; labels
    "brain": ((1.0, 1.0, 1.0), (170, 200, 170), ["T1"], 3),
    "amos": ((5.0, 0.68, 0.68), (90, 420, 512), ["CT"], 16),
    "acdc": ((10.0, 1.56, 1.56), (9, 216, 180), ["cine"], 4),
    "prostate": ((3.6, 0.62, 0.62), (20, 320, 320), ["T2", "ADC"], 3),
    "hippocampus": ((1.0, 1.0, 1.0), (36, 50, 35), ["T1"], 3),
    "teeth": ((0.3, 0.3, 0.3), (170, 340, 370), ["CT"], 43),
    "sagittal": ((0.5, 0.6, 4.0), (400, 380, 24), ["T1"], 5),
    "coronal": ((0.9, 3.0, 0.7), (220, 40, 256), ["T1", "FLAIR"], 2),
    "brats": ((1.0, 1.0, 1.0), (140, 170, 138), ["T1", "T1ce", "T2", "FLAIR"], BRATS),
}


def plan(number: int, spacing, shape, channels, labels) -> tuple[dict, dict]:
    """plans.json and dataset.json of a made-up data set."""
    name = f"Dataset{number}_Made"
    if isinstance(labels, int):
        labels = {"background": 0} | {f"class{i}": i for i in range(1, labels)}
    about = {
        "channel_names": {str(i): c for i, c in enumerate(channels)},
        "labels": labels,
        "numTraining": 40,
        "file_ending": ".nii.gz",
    }
    if any(isinstance(value, list) for value in labels.values()):
        about["regions_class_order"] = [1, 2, 3]
    raw, ready = ROOT / "raw" / name, ROOT / "preprocessed" / name
    for folder in (raw / "imagesTr", raw / "labelsTr", ready):
        folder.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(about))
    image = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.float32))
    for channel in range(len(channels)):
        sitk.WriteImage(image, str(raw / "imagesTr" / f"case_{channel:04}.nii.gz"))
    sitk.WriteImage(image, str(raw / "labelsTr" / "case.nii.gz"))
    properties = {"max": 900, "mean": 100, "median": 90, "min": -50, "percentile_00_5": -20}
    properties |= {"percentile_99_5": 800, "std": 120}
    fingerprint = {
        "spacings": [list(spacing)] * 40,
        "shapes_after_crop": [list(shape)] * 40,
        "foreground_intensity_properties_per_channel": {
            str(i): properties for i in range(len(channels))
        },
        "median_relative_size_after_cropping": 0.9,
    }
    (ready / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    nnUNetPlannerResEncL(name).plan_experiment()
    return json.loads((ready / "nnUNetResEncUNetLPlans.json").read_text()), about


def digest(shapes: dict[str, list[int]]) -> str:
    """Of all keys and shapes, in any order."""
    lines = sorted(f"{key} {'x'.join(map(str, shape))}" for key, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def record(plans: dict, about: dict) -> dict:
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres")
    heads = manager.get_label_manager(about).num_segmentation_heads
    with torch.device("meta"):
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            determine_num_input_channels(manager, configuration, about),
            heads,
            allow_init=False,
            deep_supervision=True,
        )
    shapes = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    kept = ("dataset_name", "transpose_forward", "foreground_intensity_properties_per_channel")
    small = {key: plans[key] for key in kept}
    small["configurations"] = {"3d_fullres": plans["configurations"]["3d_fullres"]}
    return {
        "plans": small,
        "dataset_json": about,
        "heads": heads,
        "keys": len(shapes),
        "digest": digest(shapes),
    }


def main() -> None:
    out = {}
    for number, (name, values) in enumerate(DATASETS.items(), start=901):
        out[name] = record(*plan(number, *values))
        found = out[name]["plans"]["configurations"]["3d_fullres"]
        arguments = found["architecture"]["arch_kwargs"]
        print(
            name,
            found["patch_size"],
            arguments["n_stages"],
            arguments["strides"],
            out[name]["keys"],
        )
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in out.items()]
    target = Path(__file__).with_name("topologies.json")
    target.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
