"""The `sparsemae` command. It only parses and reports; the work is in the modules it calls.

Exit codes: 0 done, 2 usage, configuration or data set, 3 some volumes rejected, 85 stopped by a
signal as asked, 130 by Ctrl-C, 1 bug or machine.
"""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from sparsemae.errors import DivergedError, LoaderError, OutOfMemoryError, RankError, UserError

if TYPE_CHECKING:
    from sparsemae.training.run import Outcome

app = typer.Typer(
    help="Pre-train 3D CNNs on medical volumes by masked autoencoding that skips masked voxels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key.")
]


@app.command()
def preprocess(
    sources: Annotated[
        list[str], typer.Argument(metavar="SRC...", help="Folders, files, globs, lists.")
    ],
    store: Annotated[Path, typer.Option("--output", "-o", metavar="STORE", help="Store to make.")],
    spacing: Annotated[
        str, typer.Option(help="Voxel size in mm: 1, or x,y,z, or keep for each volume's own.")
    ] = "1",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    layout: Annotated[
        str, typer.Option(help="auto, or folder, bids, nnunet, nnssl, list: what SRC is.")
    ] = "auto",
    normalization: Annotated[str, typer.Option(help="zscore, percentile or ct.")] = "zscore",
    window: Annotated[str, typer.Option(help="HU that ct keeps: low,high.")] = "-1000,1000",
    dtype: Annotated[str, typer.Option(help="Stored voxels: float16 or float32.")] = "float16",
    frame: Annotated[
        int | None, typer.Option(min=0, help="Of 4D files, from 0; they are refused without.")
    ] = None,
    quality: Annotated[
        bool, typer.Option("--filter", help="Leave out small, thick-sliced, near-constant volumes.")
    ] = False,
    shard: Annotated[
        str | None, typer.Option(metavar="i/n", help="Do part i of n, from 0; then --merge.")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Commit what all shards did.")] = False,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Work on this Dask cluster.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds one volume may take; 1800.")
    ] = None,
    max_failures: Annotated[
        float | None, typer.Option(help="Share of rejected volumes that is fatal; 0.05, from 20.")
    ] = None,
    validation: Annotated[
        float, typer.Option(help="Share of the subjects held out for validation.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(min=0, help="Of that choice.")] = 0,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read what is stored, make damaged cases again.")
    ] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Drop stored volumes that SRC no longer names.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Empty the store first.")] = False,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Such as filter.field_of_view=80."),
    ] = None,
) -> None:
    """Turn volumes into a store of training data; run again, it goes on where it stopped."""
    from sparsemae.signals import stop_requested

    with stop_requested() as stopped:  # before what takes its time to import
        from sparsemae.data.making.command import run_preprocess, settings

        config = settings(
            *(spacing, normalization, window, dtype, frame, quality), overrides=overrides or []
        )
        code = run_preprocess(
            *(sources, store, config),
            stopped=stopped,
            layout=layout,
            workers=workers,
            shard=shard,
            merge=merge,
            dask=dask,
            timeout=timeout,
            max_failures=max_failures,
            validation=validation,
            seed=seed,
            verify=verify,
            prune=prune,
            overwrite=overwrite,
        )
    raise typer.Exit(code)


@app.command()
def pretrain(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="From sparsemae preprocess.")],
    run: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Run folder.")],
    config: Annotated[
        str | None,
        typer.Option(metavar="RECIPE|FILE.toml", help="Configuration; s3d-resenc-l if not given."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in RUN; start it if --config is given."),
    ] = False,
) -> None:
    """Pre-train a masked autoencoder on a store; under torchrun, on several GPUs."""
    from sparsemae.signals import stop_code

    with stop_code() as stop:  # before what takes its time to import
        from sparsemae.config import load_config
        from sparsemae.pretrain import PretrainConfig
        from sparsemae.pretrain import pretrain as train

        loaded, overrides = None, overrides or []
        if not resume or config is not None:
            loaded = load_config(PretrainConfig, config or "s3d-resenc-l", overrides)
        outcome = _until_interrupted(
            lambda: train(store, run, loaded, overrides=overrides, resume=resume, stop=stop)
        )
    _tell(outcome)


@app.command()
def finetune(
    dataset: Annotated[
        Path, typer.Argument(metavar="DATASET", help="In nnU-Net's raw layout, with dataset.json.")
    ],
    run: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Run folder.")],
    init: Annotated[
        str | None,
        typer.Option(
            metavar="FROM", help="Weights to start from: a run, .safetensors, .pth, or none."
        ),
    ] = None,
    fold: Annotated[
        str | None, typer.Option(metavar="K", help="Cases to hold out: 0, 1, ... or all; 0.")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE|FILE.toml", help="Configuration; finetune, or scratch with --init none."
        ),
    ] = None,
    overrides: Overrides = None,
    store: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="For prepared cases, shared by runs; RUN/store."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that prepare cases.")] = 1,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the run in RUN; start it if --init is given."),
    ] = False,
) -> None:
    """Fine-tune for segmentation: plan, prepare, train; under torchrun, on several GPUs."""
    from sparsemae.signals import stop_code

    with stop_code() as stop:  # before what takes its time to import
        from sparsemae.config import load_config
        from sparsemae.finetune import FinetuneConfig
        from sparsemae.finetune import finetune as train

        loaded, overrides = None, list(overrides or [])
        if not resume or init is not None or config is not None:
            if init is None and not any(item.startswith("init=") for item in overrides):
                raise UserError("--init: give the weights to start from, or none for none")
            if init is not None:
                overrides.append(f"init={_quoted(init)}")
            if fold is not None:
                overrides.append(f"fold={fold}")
            recipe = config or ("scratch" if init == "none" else "finetune")
            loaded = load_config(FinetuneConfig, recipe, overrides)
        outcome = _until_interrupted(
            lambda: train(
                *(dataset, run, loaded),
                store=store,
                workers=workers,
                overrides=overrides,
                resume=resume,
                stop=stop,
            )
        )
    _tell(outcome)


@app.command()
def predict(
    runs: Annotated[
        Path, typer.Argument(metavar="RUN", help="From sparsemae finetune, or a folder of folds.")
    ],
    source: Annotated[
        Path | None, typer.Argument(metavar="IN", help="Folder of images CASE_0000, or one file.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for label maps.")
    ] = ...,
    also: Annotated[
        list[Path] | None,
        typer.Option(
            "--also", metavar="RUN", help="Another fold to average with; may be repeated."
        ),
    ] = None,
    validation: Annotated[
        bool, typer.Option("--validation", help="Predict the cases that RUN held out.")
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="The checkpoint of the best validation, not the newest.")
    ] = False,
    step: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Between windows, as a share of one.")
    ] = 0.5,
    no_mirror: Annotated[
        bool,
        typer.Option("--no-mirror", help="Do not average over mirrored windows: 8 times faster."),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write OUT/CASE_probabilities.nii.gz too.")
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay", help="Draw OUT/CASE.png too.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, bf16 or fp16; as trained on a GPU, fp32 on a CPU.")
    ] = None,
    sums_on: Annotated[
        str | None, typer.Option(help="cpu: sum logits up there, where a GPU is too small.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace predictions by other weights.")
    ] = False,
) -> None:
    """Segment whole volumes: label maps on the grid and with the header of the images."""
    from sparsemae.signals import PREEMPTED, stop_requested

    with stop_requested() as stopped:  # before what takes its time to import
        from rich.console import Console

        from sparsemae.predict import predict as run_predict

        if precision not in (None, "fp32", "bf16", "fp16"):
            raise UserError(f"--precision {precision}: choose fp32, bf16 or fp16")
        done = run_predict(
            *([runs, *(also or [])], source, output),
            validation=validation,
            best=best,
            step=step,
            mirror=not no_mirror,
            probabilities=probabilities,
            overlay=overlay,
            device=device,
            precision=precision,
            sums_on=sums_on,
            overwrite=overwrite,
            console=Console(),
            stopped=stopped,
        )
    for warning in done.warnings:
        _say(f"warning: {warning}")
    kept = f", {len(done.kept)} were there" if done.kept else ""
    _say(f"{len(done.written)} label maps written to {output}{kept}")
    if done.stopped:
        _say("stopped as asked; the same command goes on")
        raise typer.Exit(PREEMPTED)
    if done.failures:
        _say(f"{len(done.failures)} cases left out: {', '.join(list(done.failures)[:5])}")
        raise typer.Exit(3)


@app.command()
def evaluate(
    pred: Annotated[Path, typer.Argument(metavar="PRED", help="Label maps: a folder, or a file.")],
    ref: Annotated[Path, typer.Argument(metavar="REF", help="References of the same names.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for metrics.json, .csv.")
    ],
    labels: Annotated[
        Path | None,
        typer.Option(metavar="dataset.json", help="Names of the classes, and what to ignore."),
    ] = None,
    tolerance: Annotated[
        str, typer.Option(help="Of surface Dice in mm: 1, or for every class liver=2,spleen=1.")
    ] = "1",
    only_predicted: Annotated[
        bool, typer.Option("--only-predicted", help="Leave out references without a prediction.")
    ] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
) -> None:
    """Score label maps against references: Dice, surface Dice and Hausdorff distance per class."""
    from rich.console import Console

    from sparsemae.evaluate import evaluate as score
    from sparsemae.evaluate import parse_tolerance

    score(
        *(pred, ref, output),
        labels=labels,
        tolerance=parse_tolerance(tolerance),
        only_predicted=only_predicted,
        workers=workers,
        console=Console(),
    )
    _say(f"metrics: {output / 'metrics.json'}")


@app.command()
def reconstruct(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="From sparsemae pretrain.")],
    volume: Annotated[Path, typer.Argument(metavar="VOLUME", help="A NIfTI file.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="OUT.png", help="Picture; OUT.nii.gz goes with it."),
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the random mask.")] = 0,
) -> None:
    """Mask a volume, reconstruct it, and draw original, masked and reconstruction."""
    from sparsemae.reconstruct import reconstruct as run_reconstruct

    result = run_reconstruct(run, volume, output, seed=seed)
    for warning in result.warnings:
        _say(f"warning: {warning}")
    _say(f"mean squared error on masked voxels, z-scored: {result.error:.4f}")
    _say(f"picture: {result.picture}\nvolume:  {result.volume}")


@app.command()
def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Tell where a run stands."""
    from sparsemae.status import describe, read_status

    found = read_status(run)
    _say(json.dumps(found.as_dict(), indent=1) if as_json else describe(found))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Rebuild RUN/report.html: curves, reconstructions, configuration."""
    from sparsemae.report import write_run_report

    _say(f"{write_run_report(run)}")


@app.command()
def doctor() -> None:
    """Show versions and devices, and check every backend against the reference."""
    from sparsemae.doctor import examine

    if not examine():
        raise typer.Exit(1)


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="New folder for everything.")
    ] = Path("sparsemae-demo"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier demo in it.")
    ] = False,
) -> None:
    """Draw a few heads and run preprocess, pretrain and reconstruct on them."""
    from sparsemae.demo import run_demo

    run_demo(output, overwrite=overwrite)


def main() -> None:
    """Run the command; bad input is one line and exit code 2."""
    try:
        app()
    except UserError as error:
        _fail(str(error), 2, everywhere=True)
    except DivergedError as error:
        _fail(str(error), 1, everywhere=True)
    except (LoaderError, OutOfMemoryError) as error:
        _fail(str(error), 1)
    except RankError as error:
        _fail(str(error), 1, everywhere=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = (
            "; free some space, and run it again: what was whole before is kept" if full else ""
        )
        _fail(f"{error.filename or ''}: {error.strerror or error}{remedy}".lstrip(": "), 1)


def _until_interrupted(train: Callable[[], "Outcome"]) -> "Outcome":
    from sparsemae.signals import INTERRUPTED

    try:
        return train()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # the interpreter would wait for a checkpoint on its way


def _tell(outcome: "Outcome") -> NoReturn:
    """Say how a run ended, and end with its exit code."""
    if outcome.exit_code and _first():
        _say(f"stopped at step {outcome.step} as asked; --resume goes on from there")
    elif _first():
        _say(f"done: {outcome.checkpoint}")
    raise typer.Exit(outcome.exit_code)


def _quoted(text: str) -> str:
    """As a TOML string, whatever it looks like."""
    return json.dumps(text)


def _fail(message: str, code: int, *, everywhere: bool = False) -> None:
    """End with one line; what happened on every rank of a run is said by the first alone."""
    if _first() or not everywhere:
        print(f"sparsemae: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _first() -> bool:
    """Whether this is the process that speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    typer.echo(text)
