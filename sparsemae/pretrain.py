"""Pre-training: a store, a configuration, and a run folder with everything needed to go on."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sparsemae.checkpoint import Checkpoint, load_best_checkpoint, load_checkpoint, load_model
from sparsemae.config import load_config
from sparsemae.data.store import Store
from sparsemae.errors import UserError
from sparsemae.kinds import FINETUNING, kind_of
from sparsemae.models.mae import SparseMAE
from sparsemae.pretraining.config import PretrainConfig, build_mae
from sparsemae.pretraining.objective import Objective
from sparsemae.runfiles import CHECKPOINTS
from sparsemae.training.folder import claimed, config_file, versions
from sparsemae.training.logs import require_tensorboard
from sparsemae.training.options import check_precision
from sparsemae.training.ranks import join_ranks
from sparsemae.training.resuming import read_config, settle
from sparsemae.training.run import Outcome, run_task
from sparsemae.training.task import Task

__all__ = ["PretrainConfig", "Run", "build_mae", "load_run", "pretrain"]


@dataclass(frozen=True)
class Run:
    """A run folder read back: its configuration, weights and where they come from."""

    config: PretrainConfig
    mae: SparseMAE
    checkpoint: Checkpoint
    warnings: list[str]


def pretrain(
    store: Path,
    run: Path,
    config: PretrainConfig | None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> Outcome:
    """Train on `store` into the folder `run`; started by torchrun, as one of its ranks.

    Args:
        config: Of a new run. When resuming it may be None, then `run/config.toml` is read; else it
            must be the run's own, but for what `training.options.RESUMABLE` lists.
        overrides: `key=value` for what is read from `run/config.toml`: such keys.
        resume: Go on in `run`; a folder without a run gets a new one.
        stop: Asked in every step for an exit code to stop with; 0 to go on.

    Raises:
        UserError: The store, the configuration or the run folder cannot be used.
        OSError: The run folder cannot be written.
        DivergedError, LoaderError, OutOfMemoryError: The run has failed; its folder says so.
    """
    # the device alone is needed of it: what else counts is read by rank 0, before anything changes
    first = config or read_config(PretrainConfig, run, overrides)
    timeout = max(600.0, 2 * first.data.timeout)
    with join_ranks(first.train.device, timeout=timeout) as ranks, ExitStack() as stack:
        shown = (console or Console()) if ranks.main else Console(quiet=True)
        config = ranks.shared(lambda: settle(PretrainConfig, run, config, overrides, resume=resume))
        mae = build_mae(config)
        check_precision(config.train, ranks.device.type)
        data = Store.open(store)
        if store.resolve() in (run.resolve(), *run.resolve().parents):
            raise UserError(f"{run} is inside the store {store}: choose another -o")
        if config.train.tensorboard:
            require_tensorboard()
        objective = Objective(config, data, mae.to(ranks.device), ranks)
        task = _task(config, data, objective)
        # rank 0 holds the folder until the end
        ranks.shared(lambda: stack.enter_context(claimed(run, resume=resume)))
        return run_task(
            *(task, run, config.train),
            seed=config.seed,
            ranks=ranks,
            console=shown,
            stop=stop,
        )


def load_run(run: Path, *, best: bool = False, averaged: bool = True) -> Run:
    """The newest whole checkpoint of a run folder, on the CPU.

    Args:
        best: The checkpoint of the lowest validation loss instead.
        averaged: The averaged weights, if the run keeps them.

    Raises:
        UserError: No run there, or no whole checkpoint in it.
    """
    path = config_file(run)
    if kind_of(run) == FINETUNING:
        raise UserError(f"{run}: a fine-tuning run, which segments; name a run of pre-training")
    config = load_config(PretrainConfig, path)
    mae = build_mae(config)
    load = load_best_checkpoint if best else load_checkpoint
    checkpoint, warnings = load(run / CHECKPOINTS)
    weights = checkpoint.ema() if averaged else None
    load_model(mae, checkpoint.model() if weights is None else weights, checkpoint.path)
    return Run(config, mae.eval(), checkpoint, warnings)


def _task(config: PretrainConfig, data: Store, objective: Objective) -> Task:
    parameters = [p for p in objective.mae.parameters() if p.requires_grad]
    return Task(
        model=objective.mae,
        groups={"all": parameters},
        loss_of=objective.loss_of,
        batches=objective.batches,
        cases_of=objective.cases_of,
        validate=objective.validate if objective.validated else None,
        preview=objective.preview,
        config=config,
        defining=config.defining(),
        data=data.fingerprint,
        origin={
            "store": str(data.path.resolve()),
            "preprocess": data.config.model_dump(mode="json"),
            "versions": versions(),
        },
    )
