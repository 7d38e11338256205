"""Fine-tuning: a labelled data set, weights to start from, and a run folder that can go on."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from sparsemae.checkpoint import has_checkpoints, newest_meta
from sparsemae.errors import LoaderError, UserError
from sparsemae.files import write_atomically
from sparsemae.finetuning.config import FinetuneConfig
from sparsemae.finetuning.objective import Segmentation, check_batch
from sparsemae.finetuning.planning import make_plan
from sparsemae.finetuning.runs import (
    FinetunedRun,
    Target,
    keep_task,
    kept_store,
    load_finetuned,
    read_plan,
)
from sparsemae.kinds import VALIDATION_DICE
from sparsemae.live import say
from sparsemae.models.resenc import ResEncUNet
from sparsemae.planning.plan import Plan, build_network
from sparsemae.runfiles import CHECKPOINTS, CONFIG, PLAN, STORE
from sparsemae.segmentation.dataset import Dataset, read_dataset
from sparsemae.segmentation.making import prepare_store
from sparsemae.segmentation.splits import make_split
from sparsemae.segmentation.store import LabelledStore
from sparsemae.signals import PREEMPTED
from sparsemae.training.folder import claimed, versions
from sparsemae.training.logs import require_tensorboard
from sparsemae.training.options import check_precision
from sparsemae.training.ranks import Ranks, join_ranks
from sparsemae.training.resuming import read_config, settle
from sparsemae.training.run import Outcome, run_task
from sparsemae.training.task import Task
from sparsemae.transfer.copying import transfer
from sparsemae.transfer.pretrained import Pretrained, read_pretrained
from sparsemae.transfer.table import TransferTable, check_useful

__all__ = ["FinetuneConfig", "FinetunedRun", "finetune", "load_finetuned", "start_network"]


@dataclass(frozen=True)
class _Ready:
    """What rank 0 found out, and all ranks train with."""

    config: FinetuneConfig
    plan: Plan
    target: Target
    store: Path
    begins: bool  # with weights of `config.init`, not with those of a checkpoint


def finetune(
    dataset: Path,
    run: Path,
    config: FinetuneConfig | None,
    *,
    store: Path | None = None,
    workers: int = 1,
    overrides: Sequence[str] = (),
    resume: bool = False,
    prepare_only: bool = False,
    console: Console | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> Outcome:
    """Train a segmentation of `dataset` into the folder `run`; under torchrun, as one of its ranks.

    The first time, the data set is looked at, planned and prepared, which is kept in `store`.

    Args:
        dataset: In nnU-Net's raw layout.
        config: Of a new run. When resuming it may be None, then `run/config.toml` is read; else it
            must be the run's own, but for what `training.options.RESUMABLE` lists.
        store: Where prepared cases are kept, shared by runs; `run/store` if None.
        workers: Processes that prepare.
        overrides: `key=value` for what is read from `run/config.toml`: such keys.
        resume: Go on in `run`; a folder without a run gets a new one.
        prepare_only: End before the first step; the outcome's checkpoint is the store then.
        stop: Asked in every step for an exit code to stop with; 0 to go on.

    Raises:
        UserError: The data set, the configuration, the weights or the run folder cannot be used.
        OSError: The run folder cannot be written.
        DivergedError, LoaderError, OutOfMemoryError: The run has failed; its folder says so.
    """
    first = config or read_config(FinetuneConfig, run, overrides)
    timeout = max(3600.0, 2 * first.data.timeout)  # the others wait while rank 0 prepares
    with join_ranks(first.train.device, timeout=timeout) as ranks, ExitStack() as stack:
        shown = (console or Console()) if ranks.main else Console(quiet=True)
        check_precision(first.train, ranks.device.type)
        if first.train.tensorboard:
            require_tensorboard()

        network: ResEncUNet | None = None  # of rank 0; the others begin with an equal one

        def prepare() -> _Ready | None:
            nonlocal network
            settled = settle(FinetuneConfig, run, config, overrides, resume=resume)
            stack.enter_context(claimed(run, resume=resume))
            options = {"store": store, "workers": workers, "ranks": ranks}
            found = _prepared(dataset, run, settled, console=shown, stop=stop, **options)
            ready, network = found or (None, None)
            return ready

        ready = ranks.shared(prepare)
        if ready is None:
            return Outcome(run, 0, stop() or PREEMPTED)
        if prepare_only:
            return Outcome(ready.store, 0, 0)
        try:
            if network is None:
                pretrained = read_pretrained(Path(ready.config.init)) if ready.begins else None
                classes = len(ready.target.classes)
                network, _ = start_network(ready.config, ready.plan, classes, pretrained)
            opened = LabelledStore.open(ready.store)
            train, held_out = opened.only(ready.target.train), opened.only(ready.target.val)
        except UserError as error:
            if ranks.main:
                raise
            # rank 0 could: it is on another machine, and this is the one that has to say it
            raise LoaderError(f"rank {ranks.rank}, unlike rank 0: {error}") from None
        network = network.to(ranks.device)
        objective = Segmentation(
            *(ready.config, ready.plan, ready.target.classes, train, held_out, network, ranks)
        )
        return run_task(
            *(_task(ready, objective, train, held_out), run, ready.config.train),
            seed=ready.config.seed,
            ranks=ranks,
            console=shown,
            stop=stop,
        )


def start_network(
    config: FinetuneConfig, plan: Plan, num_classes: int, pretrained: Pretrained | None
) -> tuple[ResEncUNet, TransferTable | None]:
    """The network of a plan as a run begins with it, and what it took from `pretrained`.

    Raises:
        UserError: Too little of the weights fits to be of use.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = build_network(plan, num_classes, deep_supervision=True)
    table = None
    if pretrained is not None:
        table = transfer(pretrained, network, config.transfer)
        check_useful(table)
    if len(network.decoder.seg_layers) > 1:
        network.decoder.seg_layers[0].requires_grad_(False)  # the coarsest level weighs nothing
    if config.schedule == "frozen":
        network.encoder.requires_grad_(False)
    return network, table


def _prepared(
    path: Path,
    run: Path,
    config: FinetuneConfig,
    *,
    store: Path | None,
    workers: int,
    ranks: Ranks,
    console: Console,
    stop: Callable[[], int],
) -> tuple[_Ready, ResEncUNet] | None:
    """Everything before the first step; None if it was stopped."""

    def stopped() -> bool:
        return stop() > 0

    dataset = read_dataset(path)
    target = _target(run, dataset, config)
    folder = store or kept_store(run) or run / STORE
    pretrained = None
    begins = config.pretrained and not has_checkpoints(run / CHECKPOINTS)
    if begins:
        pretrained = read_pretrained(Path(config.init))
        for note in pretrained.notes:
            say(console, f"{config.init}: {note}")
    if (run / CONFIG).exists():
        plan = read_plan(run)
    else:
        plan = make_plan(
            *(config, dataset, pretrained, folder),
            workers=workers,
            console=console,
            stopped=stopped,
        )
        if plan is None:
            return None
        say(console, _told(plan, target))
    check_batch(config, plan, ranks.world_size)
    network, table = start_network(config, plan, len(dataset.classes), pretrained)
    if table is not None:  # before the long work: it may be that nothing fits
        console.print(table.table())
        say(console, table.summary())
    prepared = prepare_store(
        *(dataset, plan, folder),
        workers=workers,
        console=console,
        stopped=stopped,
    )
    if prepared is None:
        return None
    text = json.dumps(plan.model_dump(mode="json"), indent=1)
    write_atomically(run / PLAN, text.encode())
    start = {"init": config.init, "transfer": None if table is None else table.summary()}
    keep_task(run, target, start | {"prepared": str(folder.resolve())})
    return _Ready(config, plan, target, prepared.path, begins), network


def _target(run: Path, dataset: Dataset, config: FinetuneConfig) -> Target:
    """What a run segments: a new one as the fold says, one that goes on as it did before.

    Raises:
        UserError: The data set is not, or no longer, the run's.
    """
    place = str(dataset.path.resolve())
    if not has_checkpoints(run / CHECKPOINTS):
        splits = None if config.splits is None else Path(config.splits)
        split = make_split(dataset, config.fold, splits)
        named = (dataset.name, place, dataset.channels, dataset.classes)
        return Target(*named, split.train, split.val)
    before = Target.from_dict(newest_meta(run / CHECKPOINTS)["task"])
    for what in ("channels", "classes"):
        if getattr(dataset, what) != getattr(before, what):
            raise UserError(
                f"{dataset.path}: other {what} than the run in {run} was started with; resume with "
                f"its own data set ({before.path}), or start a new run"
            )
    known = {case.id for case in dataset.training}
    if missing := [name for name in (*before.train, *before.val) if name not in known]:
        raise UserError(
            f"{dataset.path}: case {missing[0]} of the run in {run} is not in it; put it back, or "
            f"start a new run"
        )
    return replace(before, path=place)


def _task(
    ready: _Ready, objective: Segmentation, train: LabelledStore, held_out: LabelledStore
) -> Task:
    network, config = objective.network, ready.config
    encoder = {id(p) for p in network.encoder.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = {
        "encoder": [p for p in trained if id(p) in encoder],
        "decoder": [p for p in trained if id(p) not in encoder],
    }
    plan = ready.plan.model_dump(mode="json")
    return Task(
        model=network,
        groups={name: parameters for name, parameters in groups.items() if parameters},
        loss_of=objective.loss_of,
        batches=objective.batches,
        cases_of=objective.cases_of,
        validate=objective.validate if len(held_out) else None,
        preview=objective.preview,
        config=config,
        defining=config.defining() | {"plan": plan},
        data=f"{train.fingerprint}-{held_out.fingerprint}",
        origin={
            "store": ready.target.path,
            "plan": plan,
            "task": ready.target.as_dict(),
            "init": config.init,
            "versions": versions(),
        },
        measure=VALIDATION_DICE,
    )


def _told(plan: Plan, target: Target) -> str:
    size = " x ".join(map(str, plan.patch_size))
    mm = " x ".join(f"{s:.4g}" for s in plan.spacing)
    return (
        f"plan ({plan.planner}): {plan.batch_size} patches of {size} voxels of {mm} mm, "
        f"{len(plan.features_per_stage)} stages; {len(target.train)} cases to train on, "
        f"{len(set(target.val) - set(target.train))} held out"
    )
