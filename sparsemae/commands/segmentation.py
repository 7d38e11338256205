"""finetune, predict, evaluate, compare and export."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemae.commands.common import Overrides, quoted, say, tell, until_interrupted
from sparsemae.errors import UserError


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
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Plan and prepare, and train another time.")
    ] = False,
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
        from sparsemae.finetuning.config import usual_recipe

        loaded, overrides = None, list(overrides or [])
        if fold is not None:
            overrides.append(f"fold={fold}")
        if not resume or init is not None or config is not None:
            if init is not None:
                overrides.append(f"init={quoted(init)}")
            loaded = load_config(FinetuneConfig, config or usual_recipe(init), overrides)
            if "init" not in loaded.model_fields_set:
                raise UserError("--init: give the weights to start from, or none for none")
        outcome = until_interrupted(
            lambda: train(
                *(dataset, run, loaded),
                store=store,
                workers=workers,
                overrides=overrides,
                resume=resume,
                prepare_only=prepare_only,
                stop=stop,
            )
        )
    tell(outcome)


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
        say(f"warning: {warning}")
    kept = f", {len(done.kept)} were there" if done.kept else ""
    say(f"{len(done.written)} label maps written to {output}{kept}")
    if done.stopped:
        say("stopped as asked; the same command goes on")
        raise typer.Exit(PREEMPTED)
    if done.failures:
        say(f"{len(done.failures)} cases left out: {', '.join(list(done.failures)[:5])}")
        raise typer.Exit(3)


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
    say(f"metrics: {output / 'metrics.json'}")


def compare(
    suite: Annotated[Path, typer.Argument(metavar="SUITE.toml", help="Methods and data sets.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Folder for all of it.")
    ],
    only: Annotated[
        str | None,
        typer.Option(metavar="I/N|JOB", help="Do part I of N, from 0, or one job by its name."),
    ] = None,
    listing: Annotated[
        Path | None,
        typer.Option("--list", metavar="FILE", help="Write a command per job left; run none."),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; report on what is finished.")
    ] = False,
) -> None:
    """Fine-tune and evaluate methods on data sets, and compare them; run again, it goes on."""
    from sparsemae.signals import stop_code

    with stop_code() as stop:  # before what takes its time to import
        from sparsemae.compare import compare as run

        code = run(suite, output, only=only, listing=listing, report_only=report_only, stop=stop)
    raise typer.Exit(code)


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, or a file of weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="To write.")],
    format: Annotated[str, typer.Option(help="nnunet, nnssl, safetensors or encoder.")],
    plans: Annotated[
        Path | None, typer.Option(metavar="P", help="nnU-Net's plans.json: its network.")
    ] = None,
    dataset_json: Annotated[
        Path | None, typer.Option(metavar="D", help="dataset.json that goes with --plans.")
    ] = None,
    configuration: Annotated[str, typer.Option(help="Of the plans.")] = "3d_fullres",
    trainer: Annotated[
        bool, typer.Option("--trainer", help="Put nnU-Net's fine-tuning trainer beside it.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Give weights to nnU-Net, nnssl or others; says what was copied, adapted and left fresh."""
    from rich.console import Console

    from sparsemae.export import TRAINER_FOLDER
    from sparsemae.export import export as write

    table = write(
        *(run, format, output),
        plans=plans,
        dataset_json=dataset_json,
        configuration=configuration,
        trainer=trainer,
        overwrite=overwrite,
    )
    for note in table.notes:
        say(note)
    Console().print(table.table())
    say(f"{table.summary()}\nwritten: {output}")
    if trainer:
        folder = (output.parent / TRAINER_FOLDER).resolve()
        say(f"trainer: export nnUNet_extTrainer={folder}; then -tr nnUNetTrainerSawtooth")
