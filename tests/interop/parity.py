#!/usr/bin/env python3
"""From scratch against the real nnU-Net: one data set, one plan, as many steps, several seeds.

    make .venv-interop/installed
    .venv-interop/bin/python tests/interop/parity.py -o OUT --steps 1200 --seeds 2

Draws a labelled data set with ../shared/tools/make_brains.py, gives both a small network's plan,
and trains, predicts and evaluates in turn. AdamW in both, because a thousand steps of SGD with
momentum 0.99 leave both near the start. Prints mean Dice, and a JSON line for bench/results.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from sparsemae.bench.harness import append_json, machine

HERE = Path(__file__).resolve().parent
BRAINS = HERE.parents[2] / "shared" / "tools" / "make_brains.py"
NAME, PLANS, TRAINER, EPOCH = "Dataset506_Brains", "parityPlans", "ParityTrainer", 20
PATCH, LR, DECAY = [32, 40, 32], 2e-3, 1e-2
ARCHITECTURE = {
    "n_stages": 4, "features_per_stage": [16, 32, 64, 96], "kernel_sizes": [[3, 3, 3]] * 4,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 3], "n_blocks_per_stage": [1, 1, 2, 2],
    "n_conv_per_stage_decoder": [1, 1, 1],
}  # fmt: skip
CODE = f"""
import os, random
import numpy as np, torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {TRAINER}(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device):
        super().__init__(plans, configuration, fold, dataset_json, device)
        seed = int(os.environ.get("SEED", 0))
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        self.initial_lr, self.num_iterations_per_epoch = {LR}, {EPOCH}
        self.num_val_iterations_per_epoch = 1
        self.num_epochs = int(os.environ.get("EPOCHS", 1))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.initial_lr, weight_decay={DECAY}
        )
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
"""


def main():
    """Parse, and run what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--spacing", type=float, default=6.0, help="mm")
    parser.add_argument("--json", type=Path, help="file to append a JSON line to")
    options = parser.parse_args()
    out = options.output.resolve()
    data = draw(out, options.spacing)
    rows = []
    for seed in range(options.seeds):
        found = {"ours": ours(out, data, seed, options.steps)}
        found["nnunet"] = nnunet(out, data, seed, options.steps)
        print(f"seed {seed}: " + ", ".join(f"{k} {100 * v:.2f}" for k, v in found.items()))
        rows.append(found)
    means = {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}
    difference = means["ours"] - means["nnunet"]
    print(f"mean Dice, %: {100 * means['ours']:.2f} and nnU-Net {100 * means['nnunet']:.2f}")
    if options.json is not None:
        import torch

        facts = {"case": "parity", "backend": "auto", "peer": "nnunetv2 2.8.1", "seeds": rows}
        facts |= {"steps": options.steps, "spacing": options.spacing, "patch": PATCH, **means}
        append_json(
            options.json, [facts | {"difference": difference} | machine(torch.device("cpu"))]
        )


def draw(out: Path, spacing: float) -> Path:
    """The data set where nnU-Net looks for it, and the plan that both get."""
    raw = out / "raw" / NAME
    if not raw.exists():
        command = [BRAINS, "nnunet", out / "drawn", "--n", 12, "--n-test", 6, "--seed", 3]
        run(out, "python", *command, "--spacing", spacing)
        raw.parent.mkdir(parents=True, exist_ok=True)
        (out / "drawn" / "Dataset501_Brains").rename(raw)
    ready = out / "preprocessed" / NAME
    if not (ready / f"{PLANS}.json").exists():
        plan = ["-d", "506", "-pl", "nnUNetPlannerResEncL", "-c", "3d_fullres", "--no_pp"]
        run(out, "nnUNetv2_plan_and_preprocess", *plan, "-np", 1, "-npfp", 1)
        plans = json.loads((ready / "nnUNetResEncUNetLPlans.json").read_text())
        small = plans["configurations"]["3d_fullres"]
        small |= {"patch_size": PATCH, "batch_size": 2, "data_identifier": "parity"}
        small["architecture"]["arch_kwargs"] |= ARCHITECTURE
        plans |= {"plans_name": PLANS, "configurations": {"3d_fullres": small}}
        (ready / f"{PLANS}.json").write_text(json.dumps(plans, indent=1))
        run(
            out,
            "nnUNetv2_preprocess",
            "-d",
            506,
            "-plans_name",
            PLANS,
            "-c",
            "3d_fullres",
            "-np",
            1,
        )
    (out / "trainer").mkdir(exist_ok=True)
    (out / "trainer" / f"{TRAINER}.py").write_text(CODE)
    return raw


def ours(out: Path, data: Path, seed: int, steps: int) -> float:
    """Mean Dice of the test cases."""
    folder = out / f"ours-{seed}"
    keys = {
        "plan.file": out / "preprocessed" / NAME / f"{PLANS}.json", "seed": seed,
        "train.steps": steps, "train.save_every": max(1, steps // 4), "train.precision": "fp32",
        "train.optimizer": "adamw", "train.lr": LR, "train.weight_decay": DECAY,
        "data.workers": 0, "data.augmentation": "plain", "data.validation": 8,
    }  # fmt: skip
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    start = ["--init", "none", "--fold", "all", "--config", "scratch", "--store", out / "store"]
    run(out, "sparsemae", "finetune", data, "-o", folder / "run", *start, *words, "--resume")
    run(out, "sparsemae", "predict", folder / "run", data / "imagesTs", "-o", folder / "maps")
    return score(out, data, folder)


def nnunet(out: Path, data: Path, seed: int, steps: int) -> float:
    """Mean Dice of the test cases."""
    folder, epochs = out / f"nnunet-{seed}", steps // EPOCH
    which = ["-p", PLANS, "-tr", TRAINER, "-device", "cpu"]
    settings = {"SEED": str(seed), "EPOCHS": str(epochs), "nnUNet_results": str(folder / "results")}
    if not (folder / "maps").exists():
        run(out, "nnUNetv2_train", 506, "3d_fullres", "all", *which, **settings)
        predict = ["-i", data / "imagesTs", "-o", folder / "predicted", "-d", 506, "-f", "all"]
        slow = ["-c", "3d_fullres", "-npp", 1, "-nps", 1, "--disable_progress_bar"]
        run(out, "nnUNetv2_predict", *predict, *slow, *which, **settings)
        (folder / "part").mkdir(exist_ok=True)
        for path in (folder / "predicted").glob("*.nii.gz"):
            path.rename(folder / "part" / path.name)
        (folder / "part").rename(folder / "maps")
    return score(out, data, folder)


def score(out: Path, data: Path, folder: Path) -> float:
    """By our evaluation, for both."""
    labels = ["--labels", data / "dataset.json"]
    run(
        out,
        "sparsemae",
        "evaluate",
        folder / "maps",
        data / "labelsTs",
        "-o",
        folder / "scores",
        *labels,
    )
    return json.loads((folder / "scores" / "metrics.json").read_text())["mean"]["dice"]


def run(out: Path, command: str, *arguments: object, **environment: str) -> None:
    """A command of this environment; its output goes to OUT/log.txt."""
    out.mkdir(parents=True, exist_ok=True)
    folders = {f"nnUNet_{name}": str(out / name) for name in ("raw", "preprocessed", "results")}
    settings = {"nnUNet_compile": "f", "nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1"}
    settings |= {"nnUNet_extTrainer": str(out / "trainer"), "PYTHONPATH": str(HERE / "stand_ins")}
    with (out / "log.txt").open("a") as log:
        subprocess.run(
            [str(Path(sys.executable).with_name(command)), *map(str, arguments)],
            env=os.environ | folders | settings | environment,
            stdout=log,
            stderr=log,
            check=True,
        )


if __name__ == "__main__":
    main()
