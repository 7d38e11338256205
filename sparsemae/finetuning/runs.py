"""Fine-tuning runs read back: what prediction and export need of them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsemae.checkpoint import Checkpoint, load_best_checkpoint, load_checkpoint, load_model
from sparsemae.config import build_config, load_config
from sparsemae.errors import UserError
from sparsemae.files import write_atomically
from sparsemae.finetuning.config import FinetuneConfig
from sparsemae.kinds import FINETUNING, kind_of
from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.plan import Plan, build_network
from sparsemae.runfiles import CHECKPOINTS, PLAN, TASK
from sparsemae.segmentation.dataset import Classes
from sparsemae.training.folder import config_file


@dataclass(frozen=True)
class Target:
    """What a run segments, as every checkpoint of it says."""

    dataset: str  # name
    path: str  # of the data set, when the run was started
    channels: tuple[str, ...]
    classes: Classes
    train: tuple[str, ...]  # ids of the cases
    val: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "dataset": self.dataset,
            "path": self.path,
            "channels": list(self.channels),
            "classes": list(self.classes.names),
            "ignore": self.classes.ignore,
            "train": list(self.train),
            "val": list(self.val),
        }

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "Target":
        """What `as_dict` gave."""
        return cls(
            raw["dataset"],
            raw["path"],
            tuple(raw["channels"]),
            Classes(tuple(raw["classes"]), raw["ignore"]),
            tuple(raw["train"]),
            tuple(raw["val"]),
        )


@dataclass(frozen=True)
class FinetunedRun:
    """A run folder read back: plan, classes and weights."""

    config: FinetuneConfig
    plan: Plan
    task: Target
    network: ResEncUNet  # on the CPU, in evaluation mode, without deep supervision
    checkpoint: Checkpoint
    warnings: list[str]


def is_finetuning(run: Path) -> bool:
    """Whether the folder holds a fine-tuning run, not one of pre-training."""
    return kind_of(run) == FINETUNING


def read_plan(run: Path) -> Plan:
    """The plan that a run keeps; `UserError` if it is missing or was changed to nonsense."""
    try:
        raw = json.loads((run / PLAN).read_text())
    except OSError as error:
        raise UserError(f"{run / PLAN}: {error.strerror}; put it back, or start anew") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{run / PLAN}: not valid JSON ({error}); put it back") from None
    try:
        return build_config(Plan, raw)
    except UserError as error:
        raise UserError(f"{run / PLAN}: {error}") from None


def keep_task(run: Path, task: Target, start: dict[str, Any]) -> None:
    """Write what a run segments, and what it began with, into its folder; that stays as it is."""
    began = _kept(run)
    start = {key: began.get(key) or value for key, value in start.items()}
    write_atomically(run / TASK, json.dumps(task.as_dict() | start, indent=1).encode())


def kept_store(run: Path) -> Path | None:
    """Where the run's prepared cases lie, if that is known and there."""
    path = _kept(run).get("prepared")
    return Path(path) if isinstance(path, str) and Path(path).is_dir() else None


def _kept(run: Path) -> dict[str, Any]:
    """For people and for convenience: nothing is lost without it."""
    try:
        found = json.loads((run / TASK).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def load_finetuned(run: Path, *, best: bool = False, averaged: bool = True) -> FinetunedRun:
    """The newest whole checkpoint of a fine-tuning run, on the CPU.

    Args:
        best: The checkpoint of the highest validation Dice instead.
        averaged: The averaged weights, if the run keeps them.

    Raises:
        UserError: No such run there, or no whole checkpoint in it.
    """
    path = config_file(run)
    if not is_finetuning(run):
        raise UserError(
            f"{run}: a run of pre-training, which segments nothing yet; fine-tune it with "
            f"`sparsemae finetune DATASET -o RUN --init {run}`"
        )
    config = load_config(FinetuneConfig, path)
    load = load_best_checkpoint if best else load_checkpoint
    checkpoint, warnings = load(run / CHECKPOINTS)
    # what the weights belong to is what their checkpoint says, whatever became of the other files
    plan = build_config(Plan, checkpoint.meta["plan"])
    task = Target.from_dict(checkpoint.meta["task"])
    with torch.random.fork_rng(devices=[]):
        network = build_network(plan, len(task.classes), deep_supervision=True)
    weights = checkpoint.ema() if averaged else None
    load_model(network, checkpoint.model() if weights is None else weights, checkpoint.path)
    network.decoder.deep_supervision = False
    return FinetunedRun(config, plan, task, network.eval(), checkpoint, warnings)
