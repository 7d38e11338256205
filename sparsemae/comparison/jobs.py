"""Jobs: what is done for one data set, method, fold and seed, and the commands that do it."""

import difflib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemae.comparison.suite import DatasetEntry, MethodEntry, Suite, is_recipe
from sparsemae.data.finding.nnunet import DESCRIPTION
from sparsemae.errors import UserError
from sparsemae.finetuning.config import NONE
from sparsemae.segmentation.dataset import TEST

RUNS, STORES, JOBS = "runs", "stores", "jobs"  # folders of OUT
STAGES = ("finetune", "predict", "evaluate")
_PREDICTIONS, _EVALUATION = "predictions", "evaluation"


@dataclass(frozen=True)
class Job:
    """One cell of the grid."""

    suite: Suite
    output: Path  # OUT, absolute
    dataset: DatasetEntry
    method: MethodEntry
    fold: int
    seed: int

    @property
    def id(self) -> str:
        return f"{self.dataset.name}/{self.method.name}/fold{self.fold}-seed{self.seed}"

    @property
    def run(self) -> Path:
        """The run folder of the fine-tuning."""
        return self.output / RUNS / self.id

    @property
    def folder(self) -> Path:
        """State, log, predictions and evaluation."""
        return self.output / JOBS / self.id

    @property
    def metrics(self) -> Path:
        """What `sparsemae evaluate` writes last."""
        return self.folder / _EVALUATION / "metrics.json"

    @property
    def definition(self) -> dict[str, Any]:
        """All that decides the result; paths as the suite writes them, so that trees may move."""
        config = self.method.config
        if config is not None and not is_recipe(config):
            config = self.suite.resolve(config).read_text("utf-8")
        return {
            "dataset": self.dataset.path,
            "evaluate_on": self.dataset.evaluate_on,
            "labels": self.dataset.labels,
            "init": self.method.init,
            "config": config,
            "set": list(self.method.set),
            "fold": self.fold,
            "seed": self.seed,
        }


def commands(job: Job) -> dict[str, list[str]]:
    """The arguments of `sparsemae` for every stage, in order."""
    suite, method, dataset = job.suite, job.method, job.dataset
    data, predictions = suite.resolve(dataset.path), job.folder / _PREDICTIONS
    init = NONE if method.init == NONE else str(suite.resolve(method.init))
    config = suite.config(method)
    overrides = [f"seed={job.seed}", *method.set]
    on_fold = dataset.evaluate_on == "fold"
    return {
        "finetune": [
            *("finetune", str(data), "-o", str(job.run), "--init", init, "--fold", str(job.fold)),
            *([] if config is None else ["--config", config]),
            *(word for item in overrides for word in ("--set", item)),
            *("--store", str(job.output / STORES / dataset.name), "--resume"),
        ],
        "predict": [
            *("predict", str(job.run)),
            *(["--validation"] if on_fold else [str(data / TEST)]),
            *("-o", str(predictions)),
        ],
        "evaluate": [
            *("evaluate", str(predictions), str(suite.labels(dataset))),
            *("--labels", str(data / DESCRIPTION)),
            *(["--only-predicted"] if on_fold else []),
            *("-o", str(job.metrics.parent)),
        ],
    }


def grid(suite: Suite, output: Path) -> list[Job]:
    """Every job of a suite, data set by data set, in the file's order."""
    return [
        Job(suite, output.absolute(), dataset, method, fold, seed)
        for dataset in suite.datasets
        for fold in dataset.folds or suite.options.folds
        for seed in suite.options.seeds
        for method in suite.methods
    ]


def chosen(jobs: Sequence[Job], only: str | None) -> list[Job]:
    """Those of `only`: all, part I of N as "I/N" counted from 0, or one by its id.

    Raises:
        UserError: It is neither.
    """
    if only is None:
        return list(jobs)
    if share := re.fullmatch(r"(\d+)/(\d+)", only):
        part, parts = map(int, share.groups())
        if part >= parts:
            raise UserError(f"--only {only}: parts are counted from 0 to {max(parts, 1) - 1}")
        return list(jobs[part::parts])
    known = {job.id: job for job in jobs}
    if only not in known:
        near = difflib.get_close_matches(only, known, 1) or [next(iter(known))]
        raise UserError(f"--only {only}: neither I/N nor a job of the suite, such as {near[0]}")
    return [known[only]]


def command_lines(jobs: Sequence[Job], program: Sequence[str]) -> str:
    """One shell command per job, to be run anywhere."""
    return "".join(
        shlex.join(
            [
                *(*program, "compare", str(job.suite.file.resolve())),
                *("-o", str(job.output), "--only", job.id),
            ]
        )
        + "\n"
        for job in jobs
    )
