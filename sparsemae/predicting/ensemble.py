"""The networks that predict together: one run, or one of each fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemae.errors import UserError
from sparsemae.finetuning.runs import FinetunedRun, Target, is_finetuning, load_finetuned
from sparsemae.planning.plan import Plan
from sparsemae.runfiles import CONFIG
from sparsemae.training.keeper import changed_keys


@dataclass(frozen=True)
class Ensemble:
    """Runs that were trained on one plan for the same classes."""

    runs: tuple[FinetunedRun, ...]
    paths: tuple[Path, ...]

    @property
    def plan(self) -> Plan:
        return self.runs[0].plan

    @property
    def task(self) -> Target:
        return self.runs[0].task

    @property
    def warnings(self) -> list[str]:
        return [warning for run in self.runs for warning in run.warnings]

    def facts(self) -> list[dict[str, Any]]:
        """Which weights these are: equal for equal weights, wherever they lie."""
        checkpoints = [run.checkpoint for run in self.runs]
        return [{"step": c.step, "sha256": c.meta["sha256"]} for c in checkpoints]

    def told(self) -> list[str]:
        """A line for each run."""
        return [
            f"{path}: step {run.checkpoint.step} of {run.config.train.steps}, fold "
            f"{run.config.fold} of {run.task.dataset}"
            for path, run in zip(self.paths, self.runs, strict=True)
        ]


def load_ensemble(paths: Sequence[Path], *, best: bool = False) -> Ensemble:
    """Load runs; a folder that is none stands for the folds in it, RUN/fold0, RUN/fold1, ...

    Raises:
        UserError: There is no fine-tuning run, or they do not belong together: in a folder, also
            where two are of one fold or of different data sets.
    """
    found = [run for path in paths for run in _runs_in(path)]
    if len(set(p.resolve() for p in found)) < len(found):
        raise UserError(f"{found[-1]}: named twice; name every run once")
    runs = tuple(load_finetuned(path, best=best) for path in found)
    for path in paths:
        _check_folds([(f, r) for f, r in zip(found, runs, strict=True) if f.parent == path])
    first = runs[0]
    for path, run in zip(found[1:], runs[1:], strict=True):
        plans = (first.plan.model_dump(mode="json"), run.plan.model_dump(mode="json"))
        if changed := changed_keys(*plans):
            raise UserError(
                f"{path}: its plan differs from that of {found[0]} in {', '.join(changed)}; "
                f"predict with them apart"
            )
        if (run.task.classes, run.task.channels) != (first.task.classes, first.task.channels):
            raise UserError(
                f"{path}: other classes or channels than {found[0]}; predict with them apart"
            )
    return Ensemble(runs, tuple(found))


def _check_folds(members: list[tuple[Path, FinetunedRun]]) -> None:
    """Refuse runs of one folder that are no folds of one data set."""
    seen: dict[tuple[str, ...], Path] = {}
    for path, run in members:
        if run.task.dataset != members[0][1].task.dataset:
            raise UserError(
                f"{path}: of another data set than {members[0][0]}; name the runs to average, one "
                f"as RUN and the others with --also"
            )
        if (other := seen.setdefault(run.task.val, path)) != path:
            raise UserError(
                f"{path} and {other} hold out the same cases, so they are no folds; name the runs "
                f"to average, one as RUN and the others with --also"
            )


def _runs_in(path: Path) -> list[Path]:
    if (path / CONFIG).is_file() or not path.is_dir():
        return [path]
    below = sorted(p for p in path.iterdir() if p.is_dir() and is_finetuning(p))
    if not below:
        raise UserError(
            f"{path}: no fine-tuning run, nor a folder of them; name what `sparsemae finetune` made"
        )
    return below
