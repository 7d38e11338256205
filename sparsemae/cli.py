"""The `sparsemae` command. It only parses and reports; the work is in the modules it calls.

Exit codes: 0 done, 2 usage, configuration or data set, 3 some cases or jobs failed, 85 stopped by a
signal as asked, 130 by Ctrl-C, 1 bug or machine.
"""

import errno
import sys

import typer

from sparsemae.commands.common import first
from sparsemae.commands.pretraining import preprocess, pretrain, reconstruct
from sparsemae.commands.segmentation import compare, evaluate, export, finetune, predict
from sparsemae.commands.upkeep import demo, doctor, report, status
from sparsemae.errors import DivergedError, LoaderError, OutOfMemoryError, RankError, UserError

app = typer.Typer(
    help="Pre-train 3D CNNs on medical volumes by masked autoencoding that skips masked voxels, "
    "and fine-tune them for segmentation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    *(doctor, demo, preprocess, pretrain, reconstruct),
    *(finetune, predict, evaluate, compare, export, status, report),
):
    app.command()(command)


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


def _fail(message: str, code: int, *, everywhere: bool = False) -> None:
    """End with one line; what happened on every rank of a run is said by the first alone."""
    if first() or not everywhere:
        print(f"sparsemae: error: {message}", file=sys.stderr)
    raise SystemExit(code)
