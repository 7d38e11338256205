"""doctor, demo, status and report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsemae.commands.common import say


def status(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """Tell where a run stands."""
    from sparsemae.status import describe, read_status

    found = read_status(run)
    say(json.dumps(found.as_dict(), indent=1) if as_json else describe(found))


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
) -> None:
    """Rebuild RUN/report.html: curves, pictures, configuration."""
    from sparsemae.report import write_run_report

    say(f"{write_run_report(run)}")


def doctor() -> None:
    """Show versions and devices, and check every backend against the reference."""
    from sparsemae.doctor import examine

    if not examine():
        raise typer.Exit(1)


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
