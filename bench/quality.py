"""What pre-training is worth: fine-tuning from it against fine-tuning from scratch, step for step.

Unlabelled volumes are pre-trained on, then both starts are trained on few cases of a labelled data
set with the same network, patches, steps and seeds, and compared on its test cases by `sparsemae
compare`. All of it is done by the commands that users have.
"""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from sparsemae.errors import UserError
from sparsemae.segmentation.dataset import read_dataset
from sparsemae.segmentation.splits import SPLITS

SCRATCH, PRETRAINED = "scratch", "pretrained"


@dataclass(frozen=True)
class Setting:
    """What is trained on what, and for how long."""

    labelled: Path  # nnU-Net's raw layout, with imagesTs and labelsTs
    unlabelled: Path  # a folder of volumes
    cases: int  # labelled cases to train on, the first by id
    seeds: int
    recipe: str  # of pre-training
    pretrain_steps: int
    steps: int  # of fine-tuning
    spacing: float  # mm
    patch: int  # voxels per axis
    pretrain_set: tuple[str, ...] = ()  # key=value
    finetune_set: tuple[str, ...] = ()


def measure_quality(setting: Setting, folder: Path) -> Iterator[dict[str, Any]]:
    """Run what is not finished in `folder`, then yield a row for each start.

    Raises:
        UserError: The data set has too few cases, or no test cases.
        CalledProcessError: A command failed; it has said why.
    """
    dataset = read_dataset(setting.labelled)
    if len(dataset.training) <= setting.cases:
        raise UserError(
            f"{setting.labelled}: {len(dataset.training)} labelled cases; some must be left when "
            f"{setting.cases} are trained on"
        )
    folder.mkdir(parents=True, exist_ok=True)
    store, pretrained = folder / "unlabelled", folder / "pretrained"
    _run("preprocess", setting.unlabelled, "-o", store, "--spacing", setting.spacing)
    sizes = [f"data.patch_size={setting.patch}", f"train.steps={setting.pretrain_steps}"]
    overrides = _overrides([*sizes, *setting.pretrain_set])
    _run("pretrain", store, "-o", pretrained, "--config", setting.recipe, *overrides, "--resume")
    suite = _write_suite(setting, [case.id for case in dataset.training], folder)
    _run("compare", suite, "-o", folder / "compare")
    summary = json.loads((folder / "compare" / "summary.json").read_text())
    yield from _rows(setting, summary)


def _write_suite(setting: Setting, ids: Sequence[str], folder: Path) -> Path:
    """Two methods that differ in their start, and in the schedule that belongs to it."""
    splits = folder / SPLITS
    first, others = list(ids[: setting.cases]), list(ids[setting.cases :])
    splits.write_text(json.dumps([{"train": first, "val": others}]))
    common = [
        f"splits={json.dumps(str(splits.resolve()))}",
        "plan.mode=like_pretrained",
        f"plan.like={json.dumps(str((folder / 'pretrained').resolve()))}",
        f"train.steps={setting.steps}",
        *setting.finetune_set,
    ]
    suite = {
        "suite": {"name": "quality", "folds": [0], "seeds": list(range(setting.seeds))},
        "datasets": [
            {
                "name": setting.labelled.resolve().name,
                "path": str(setting.labelled.resolve()),
                "role": "development",
                "evaluate_on": "test",
            }
        ],
        "methods": [
            {"name": SCRATCH, "init": "none", "config": "scratch", "set": common},
            {"name": PRETRAINED, "init": "pretrained", "config": "finetune", "set": common},
        ],
    }
    path = folder / "suite.toml"
    path.write_text(tomli_w.dumps(suite))
    return path


def _rows(setting: Setting, summary: dict[str, Any]) -> Iterator[dict[str, Any]]:
    block = summary["blocks"]["development"]
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(setting).items()}
    (dataset,) = block["datasets"].values()
    for name, numbers in dataset["methods"].items():
        found = {key: numbers[key] for key in ("dice", "difference")}
        p = next((pair["p"] for pair in dataset["pairs"]), None)
        row = {"case": "quality", "backend": "auto", "start": name, **found, "p": p}
        yield row | {"test_cases": dataset["cases"]} | facts


def _overrides(items: Sequence[str]) -> list[str]:
    return [word for item in items for word in ("--set", item)]


def _run(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "sparsemae", *map(str, words)], check=True)
