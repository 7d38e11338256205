"""Records what nnU-Net's own planners and fingerprint extractor make of data sets, for our tests.

Run with a Python that has nnunetv2 2.8.1: `python tests/interop/record_plans.py`. It writes
tests/planning/nnunet_plans.json and nnunet_fingerprint.json. Axes there are nnU-Net's, z, y, x.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parents[1] / "planning"
LABELS = {"background": 0, "one": 1, "two": 2}

# name: preset, channels, number of labels, cases, median relative size, and per axis z, y, x the
# range of spacings in mm (equal for all axes of one case if `isotropic`) and of voxels
DATASETS = {
    "brain_L": ("L", ["T1w"], 4, 20, 0.55, [(1, 1)] * 3, [(150, 170), (170, 190), (135, 150)]),
    "brain_M": ("M", ["T1w"], 4, 20, 0.55, [(1, 1)] * 3, [(150, 170), (170, 190), (135, 150)]),
    "brain_XL": ("XL", ["T1w"], 4, 20, 0.55, [(1, 1)] * 3, [(150, 170), (170, 190), (135, 150)]),
    "two_channel_L": (
        *("L", ["T1w", "FLAIR"], 2, 9, 0.75),
        *([(1, 1.2), (0.5, 0.9), (0.5, 0.9)], [(120, 180), (200, 260), (200, 260)]),
    ),
    "abdomen_L": (
        *("L", ["CT"], 16, 24, 1.0),
        *([(2, 5), (0.6, 0.85), (0.6, 0.85)], [(80, 160), (512, 512), (512, 512)]),
    ),
    "abdomen_thick_M": (
        *("M", ["ct"], 16, 25, 1.0),
        *([(5, 5), (0.6, 0.8), (0.6, 0.8)], [(70, 110), (512, 512), (512, 512)]),
    ),
    "heart_L": (
        *("L", ["cine"], 4, 30, 1.0),
        *([(5, 10), (1.3, 1.8), (1.3, 1.8)], [(6, 12), (190, 260), (190, 260)]),
    ),
    "heart_M": (
        *("M", ["cine"], 4, 31, 1.0),
        *([(10, 10), (1.5, 1.5), (1.5, 1.5)], [(9, 10), (200, 256), (190, 220)]),
    ),
    "prostate_L": (
        *("L", ["T2", "noNorm", "rescale_to_0_1"], 3, 16, 0.7),
        *([(3, 4), (0.55, 0.65), (0.55, 0.65)], [(18, 24), (310, 330), (310, 330)]),
    ),
    "prostate_overshot_L": (  # the best sampled tenth is finer than the plane
        *("L", ["T2"], 3, 21, 1.0),
        *([(0.3, 8), (0.6, 0.6), (0.6, 0.6)], [(18, 24), (310, 330), (310, 330)]),
    ),
    "hippocampus_L": ("L", ["MRI"], 3, 40, 1.0, [(1, 1)] * 3, [(30, 42), (45, 56), (32, 40)]),
    "hippocampus_few_M": ("M", ["MRI"], 3, 3, 1.0, [(1, 1)] * 3, [(30, 42), (45, 56), (32, 40)]),
    "teeth_XL": ("XL", ["CT"], 43, 12, 1.0, [(0.3, 0.3)] * 3, [(170, 300), (300, 450), (300, 450)]),
    "body_L": ("L", ["CT"], 105, 18, 1.0, [(1.5, 1.5)] * 3, [(250, 600), (220, 330), (220, 330)]),
    "sagittal_thick_L": (  # the longest voxels are last: all axes change places
        *("L", ["T2"], 2, 14, 1.0),
        *([(0.5, 0.7), (0.5, 0.7), (3, 5)], [(380, 520), (380, 520), (12, 20)]),
    ),
    "coronal_thick_M": (
        *("M", ["T2"], 2, 15, 1.0),
        *([(0.8, 1), (2.5, 3.5), (0.8, 1)], [(200, 256), (40, 60), (180, 200)]),
    ),
    "organ_L": ("L", ["MRI"], 2, 50, 0.8, [(1, 1)] * 3, [(70, 80), (90, 100), (64, 72)]),
    "cube_M": ("M", ["MRI"], 2, 10, 1.0, [(1, 1)] * 3, [(200, 200)] * 3),  # ties everywhere
    "cube_XL": ("XL", ["MRI"], 2, 10, 1.0, [(1, 1)] * 3, [(256, 256)] * 3),
    "square_M": ("M", ["CT"], 2, 10, 1.0, [(1, 1)] * 3, [(150, 150), (300, 300), (300, 300)]),
    "just_no_lowres_M": (  # the search for a coarser network ends where it saves too little
        *("M", ["CT"], 5, 5, 1.0),
        *([(5, 5), (0.8, 0.8), (0.8, 0.8)], [(111, 111), (316, 316), (316, 316)]),
    ),
    "slab_L": ("L", ["MRI"], 2, 2, 1.0, [(1, 1)] * 3, [(4, 5), (300, 301), (91, 94)]),
}


def write_volumes(folder):
    """A data set in nnU-Net's layout: two channels of integers in air, labels 0, 1, 2, RAS."""
    import nibabel as nib

    rng = np.random.default_rng(7)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    about = {
        "channel_names": {"0": "T1w", "1": "CT"},
        "labels": LABELS,
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    shapes = ((20, 24, 18), (26, 20, 22), (18, 19, 30))
    for case, shape in enumerate(shapes):
        affine = np.diag([0.8 + case / 10, 1.0, 2.5 - case / 4, 1])
        affine[:3, 3] = -10, 4, 7
        labels = np.zeros(shape, np.uint8)
        body = (slice(2, -3 - case), slice(1 + case, -2), slice(4, -1))
        inner = labels[body]
        inner[...] = rng.integers(0, 3, inner.shape)
        labels[0, 0, 0] = 2  # outside of the box that is kept: counts nowhere
        for channel, (low, high) in enumerate(((1, 900 + 90 * case), (-900, 1500))):
            image = np.zeros(shape, np.int16)
            image[body] = rng.integers(low, high, image[body].shape)
            path = folder / "imagesTr" / f"case{case}_{channel:04}.nii.gz"
            nib.save(nib.Nifti1Image(image, affine), path)
        nib.save(nib.Nifti1Image(labels, affine), folder / "labelsTr" / f"case{case}.nii.gz")


def fabricate(seed, preset, channels, labels, cases, relative_size, spacings, shapes):
    """What stands in dataset.json, and a fingerprint."""
    rng = np.random.default_rng(seed)
    low, high = np.array(spacings, float).T
    first, last = np.array(shapes).T
    mm = [low + (high - low) * (rng.random() if i % 2 else rng.random(3)) for i in range(cases)]
    return {
        "preset": preset,
        "channels": channels,
        "labels": labels,
        "spacings": [[round(float(s), 4) for s in row] for row in mm],
        "shapes": [[int(n) for n in rng.integers(first, last + 1)] for _ in range(cases)],
        "relative_size": relative_size,
    }


def plan(root, number, facts):
    """nnU-Net's plan for fabricated facts."""
    import torch
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import (
        residual_encoder_unet_planners as planners,
    )

    name = f"Dataset{number:03}_Fabricated"
    images, prepared = root / "raw" / name / "imagesTr", root / "preprocessed" / name
    images.mkdir(parents=True)
    prepared.mkdir(parents=True)
    channels = dict(enumerate(facts["channels"]))
    for case in range(len(facts["spacings"])):
        for channel in channels:
            (images / f"case{case:03}_{channel:04}.nii.gz").touch()
    about = {
        "channel_names": channels,
        "labels": {f"class{i}" if i else "background": i for i in range(facts["labels"])},
        "numTraining": len(facts["spacings"]),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }
    (images.parent / "dataset.json").write_text(json.dumps(about))
    statistics = {"mean": 50.0, "median": 48.0, "std": 20.0, "min": -9.0, "max": 200.0}
    statistics |= {"percentile_00_5": -5.0, "percentile_99_5": 150.0}
    fingerprint = {
        "spacings": facts["spacings"],
        "shapes_after_crop": facts["shapes"],
        "foreground_intensity_properties_per_channel": {str(i): statistics for i in channels},
        "median_relative_size_after_cropping": facts["relative_size"],
    }
    (prepared / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    # networks are built to be counted only
    with contextlib.redirect_stdout(io.StringIO()), torch.device("meta"):
        planner = getattr(planners, f"nnUNetPlannerResEnc{facts['preset']}")(name)
        plans = planner.plan_experiment()
    full = plans["configurations"]["3d_fullres"]
    network = full["architecture"]["arch_kwargs"]
    keys = ("spacing", "patch_size", "batch_size", "normalization_schemes", "use_mask_for_norm")
    stages = ("features_per_stage", "strides", "n_blocks_per_stage", "kernel_sizes")
    found = {
        "transpose_forward": plans["transpose_forward"],
        "lowres": "3d_lowres" in plans["configurations"],
        **{key: full[key] for key in (*keys, "batch_dice")},
        **{key: network[key] for key in (*stages, "n_conv_per_stage_decoder")},
    }
    return json.loads(json.dumps(found, default=_plain))


def extract(root):
    """nnU-Net's fingerprint of the data set that `write_volumes` writes."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import (
        DatasetFingerprintExtractor,
    )

    write_volumes(root / "raw" / "Dataset999_Volumes")
    extractor = DatasetFingerprintExtractor("Dataset999_Volumes", num_processes=1)
    extractor.num_foreground_voxels_for_intensitystats = 3e6
    return json.loads(json.dumps(extractor.run(), default=_plain))


def _plain(value):
    return value.item() if isinstance(value, np.generic) else np.asarray(value).tolist()


def main():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("raw", "preprocessed", "results"):
            os.environ[f"nnUNet_{name}"] = str(root / name)
            (root / name).mkdir()
        found = {}
        for number, (name, facts) in enumerate(DATASETS.items(), start=1):
            given = fabricate(number, *facts)
            found[name] = {"given": given, "planned": plan(root, number, given)}
            planned = found[name]["planned"]
            print(name, planned["patch_size"], planned["batch_size"], planned["lowres"])
            sys.stdout.flush()
        lines = (f'"{name}": {json.dumps(record)}' for name, record in found.items())
        (HERE / "nnunet_plans.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
        (HERE / "nnunet_fingerprint.json").write_text(json.dumps(extract(root)) + "\n")


if __name__ == "__main__":
    main()
