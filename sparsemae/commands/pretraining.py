"""preprocess, pretrain and reconstruct."""

from pathlib import Path
from typing import Annotated

import typer

from sparsemae.commands.common import Overrides, say, tell, until_interrupted


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
        outcome = until_interrupted(
            lambda: train(store, run, loaded, overrides=overrides, resume=resume, stop=stop)
        )
    tell(outcome)


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
        say(f"warning: {warning}")
    say(f"mean squared error on masked voxels, z-scored: {result.error:.4f}")
    say(f"picture: {result.picture}\nvolume:  {result.volume}")
