"""Pre-training: a store, a configuration, and a run folder that holds everything needed to go on.

A run folder has `config.toml` (resolved), `metrics.jsonl` (one line per step) and `checkpoints/`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import torch
from pydantic import BeforeValidator, Field, NonNegativeInt
from rich.console import Console
from torch import Tensor

import sparsemae
from sparsemae.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    load_optimizer,
    save_checkpoint,
)
from sparsemae.config import Size, Strict, dump_config, load_config
from sparsemae.data.loader import DataConfig, make_loader
from sparsemae.data.loading.prefetch import to_device_ahead
from sparsemae.data.store import Store
from sparsemae.errors import UserError
from sparsemae.kernels import registry
from sparsemae.models.mae import SparseMAE, masked_mse
from sparsemae.models.masking import check_decode, check_grid, nearest_multiples
from sparsemae.models.resenc import ResEncUNet
from sparsemae.models.topology import PRESETS
from sparsemae.progress import TrainingProgress
from sparsemae.training import (
    Batch,
    State,
    StepRecord,
    TrainConfig,
    fit,
    make_optimizer,
    pick_device,
)

# What a resumed run may change: its length, which stretches the schedule, and how it is run.
RESUMABLE = (
    "train.steps", "train.save_every", "train.keep", "train.device", "data.workers", "data.timeout",
)  # fmt: skip


def _one_of(what: str, names: Sequence[str]):
    def check(value: Any) -> Any:
        if value not in names:
            raise ValueError(f"unknown {what}, choose from {', '.join(names)}")
        return value

    return BeforeValidator(check)


class ModelConfig(Strict):
    """`[model]`: the network."""

    preset: Annotated[str, _one_of("preset", list(PRESETS))] = "L"


class MaskConfig(Strict):
    """`[mask]`: what is hidden."""

    ratio: float = Field(0.75, gt=0, lt=1)  # fraction of cells hidden in every sample
    block_size: Size | None = None  # voxels of a cell; the network's total stride if absent


class PretrainConfig(Strict):
    """Everything that defines a pre-training run but the data."""

    seed: NonNegativeInt = 0
    backend: Annotated[str, _one_of("backend", ["auto", *registry.BACKENDS])] = "auto"
    decode: Literal["all", "masked"] | Annotated[float, Field(gt=0, lt=1)] = "all"
    densify: bool = True
    sparse: bool = True
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    data: DataConfig
    train: TrainConfig


@dataclass(frozen=True)
class Run:
    """A run folder read back: its configuration, weights and where they come from."""

    config: PretrainConfig
    mae: SparseMAE
    checkpoint: Checkpoint
    warnings: list[str]


def build_mae(config: PretrainConfig) -> SparseMAE:
    """The model of a configuration, initialised from its seed.

    Raises:
        UserError: Patch, cell, network and decode policy do not fit together.
    """
    check_decode(config.decode)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = ResEncUNet.from_preset(config.model.preset)
        mae = SparseMAE(
            network,
            config.mask.block_size,
            decode=config.decode,
            densify=config.densify,
            sparse=config.sparse,
            backend=config.backend,
        )
    _check_patch(config.data.patch_size, network)
    grid = check_grid(config.data.patch_size, mae.block_size, config.mask.ratio)
    if config.sparse:
        _check_visible(grid, config.mask.ratio, mae)
    return mae


def pretrain(
    store: Path,
    run: Path,
    config: PretrainConfig | None,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    console: Console | None = None,
) -> Path:
    """Train on `store` into the folder `run`; returns the last checkpoint.

    Args:
        config: Of a new run; None when resuming, which reads `run/config.toml`.
        overrides: When resuming, `key=value` for keys in `RESUMABLE`.

    Raises:
        UserError: The store, the configuration or the run folder cannot be used.
    """
    console = console or Console()
    if resume:
        config = _resumed_config(run, overrides)
    elif run.exists() and any(run.iterdir() if run.is_dir() else [run]):
        raise UserError(
            f"{run} exists already: choose another -o, or --resume to continue the run in it"
        )
    mae = build_mae(config)
    data = Store.open(store)
    if store.resolve() in (run.resolve(), *run.resolve().parents):
        raise UserError(f"{run} is inside the store {store}: choose another -o")
    device = pick_device(config.train.device)
    state = State(mae.to(device), make_optimizer(mae, config.train))
    checkpoints = run / "checkpoints"
    if resume:
        state.step = _restore(state, checkpoints, data, console)
        if state.step > config.train.steps:
            raise UserError(
                f"train.steps {config.train.steps}: {run} has done {state.step} steps already; "
                f"give as many or more"
            )
    else:
        run.mkdir(parents=True, exist_ok=True)
        resolved = config.mask.model_copy(update={"block_size": mae.block_size})
        config = config.model_copy(update={"mask": resolved})
    dump_config(config, run / "config.toml")
    meta = {
        "data": data.fingerprint,
        "store": str(store.resolve()),
        "preprocess": data.config.model_dump(mode="json"),
        "versions": _versions(),
    }

    def loss_of(batch: Batch, step: int) -> Tensor:
        # keyed by the step, so that a resumed run draws the masks it would have drawn
        generator = torch.Generator().manual_seed(_step_seed(config.seed, step))
        masks = mae.draw_masks(
            len(batch["image"]), config.data.patch_size, config.mask.ratio, generator=generator
        ).to(device)
        prediction = mae(batch["image"], masks)
        return masked_mse(prediction, batch["image"], masks.scored, batch["excluded"])

    loader = make_loader(
        data.split("train"),
        config.data.patch_size,
        config.data.batch_size,
        seed=config.seed,
        steps=config.train.steps,
        start_step=state.step,
        workers=config.data.workers,
        augment=config.data,
        foreground=config.data.foreground,
        timeout=config.data.timeout,
    )
    batches = to_device_ahead(loader, device)
    saved = []
    with (
        _metrics(run / "metrics.jsonl", state.step) as log,
        TrainingProgress(config.train.steps, state.step, console) as progress,
    ):

        def on_step(record: StepRecord) -> None:
            log.write(json.dumps(asdict(record)) + "\n")
            progress.update(record)

        def save(state: State) -> None:
            log.flush()
            path = save_checkpoint(
                *(checkpoints, state.step, state.model, state.optimizer, meta),
                keep=config.train.keep,
            )
            saved.append(path)

        fit(state, loss_of, batches, config.train, on_step=on_step, save=save)
    return saved[-1] if saved else load_checkpoint(checkpoints)[0].path


def load_run(run: Path) -> Run:
    """The newest whole checkpoint of a run folder, on the CPU.

    Raises:
        UserError: No run there, or no whole checkpoint in it.
    """
    config = load_config(PretrainConfig, _config_file(run))
    mae = build_mae(config)
    checkpoint, warnings = load_checkpoint(run / "checkpoints")
    load_model(mae, checkpoint.model(), checkpoint.path)
    return Run(config, mae.eval(), checkpoint, warnings)


def _config_file(run: Path) -> Path:
    file = run / "config.toml"
    if not file.is_file():
        raise UserError(f"{run}: no run there (no config.toml); start one with sparsemae pretrain")
    return file


def _resumed_config(run: Path, overrides: Sequence[str]) -> PretrainConfig:
    for item in overrides:
        key = item.partition("=")[0].strip()
        if key not in RESUMABLE:
            raise UserError(
                f"--set {item}: a resumed run keeps its {key}; it may change "
                f"{', '.join(RESUMABLE)}. Start a new run for anything else"
            )
    return load_config(PretrainConfig, _config_file(run), overrides)


def _restore(state: State, checkpoints: Path, data: Store, console: Console) -> int:
    checkpoint, warnings = load_checkpoint(checkpoints)
    for warning in warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    if checkpoint.meta["data"] != data.fingerprint:
        raise UserError(
            f"{data.path} is not the data this run was started on "
            f"({checkpoint.meta['store']}): resume with that store, or start a new run"
        )
    load_model(state.model, checkpoint.model(), checkpoint.path)
    load_optimizer(state.model, state.optimizer, checkpoint.optimizer())
    return checkpoint.step


def _check_patch(patch_size: tuple[int, int, int], network: ResEncUNet) -> None:
    total = network.total_stride
    if any(p % t for p, t in zip(patch_size, total, strict=True)):
        below, above = nearest_multiples(patch_size, total)
        raise UserError(
            f"data.patch_size {patch_size} does not divide by the network's total stride {total}: "
            f"the nearest valid sizes are {below} and {above}"
        )
    if tuple(patch_size) == tuple(total):
        raise UserError(
            f"data.patch_size {patch_size} leaves one voxel at the bottleneck, which instance "
            f"norm cannot normalise: use at least {tuple(2 * t for t in total)}"
        )


def _check_visible(grid: tuple[int, int, int], ratio: float, mae: SparseMAE) -> None:
    """Refuse a bottleneck of one visible voxel, which instance norm would make a constant."""
    deepest = mae.stage_blocks[-1]
    cells = math.prod(grid)
    visible = cells - round(cells * ratio)
    if deepest is not None and visible * math.prod(deepest) < 2:
        raise UserError(
            f"mask.ratio {ratio} leaves one visible voxel at the bottleneck, which instance norm "
            f"cannot normalise: lower it, use a larger data.patch_size or a smaller mask.block_size"
        )


def _metrics(path: Path, step: int):
    """The log, cut back to the lines of steps that the resumed checkpoint contains."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a", buffering=1)


def _step_seed(seed: int, step: int) -> int:
    return int(numpy.random.SeedSequence(seed, spawn_key=(step,)).generate_state(1)[0])


def _versions() -> dict[str, str]:
    return {"sparsemae": sparsemae.__version__, "torch": torch.__version__}
