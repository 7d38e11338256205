"""What commands have in common: how they speak, and how a run ends."""

import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from sparsemae.training.run import Outcome

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key.")
]


def until_interrupted(train: Callable[[], "Outcome"]) -> "Outcome":
    """What `train` returns; a Ctrl-C that it lets through ends the process at once."""
    from sparsemae.signals import INTERRUPTED

    try:
        return train()
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # the interpreter would wait for a checkpoint on its way


def tell(outcome: "Outcome") -> NoReturn:
    """Say how a run ended, and end with its exit code."""
    if not outcome.checkpoint.name.startswith("step-") and first():
        if outcome.exit_code:
            say("stopped before the first step as asked; the same command goes on")
        else:
            say("done: no step was done yet; the same command without --prepare-only trains")
    elif outcome.exit_code and first():
        say(f"stopped at step {outcome.step} as asked; --resume goes on from there")
    elif first():
        say(f"done: {outcome.checkpoint}")
    raise typer.Exit(outcome.exit_code)


def quoted(text: str) -> str:
    """As a TOML string, whatever it looks like."""
    return json.dumps(text)


def first() -> bool:
    """Whether this is the process that speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line."""
    typer.echo(text)
