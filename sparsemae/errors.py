"""Exceptions that a person reads: "your input, not our bug", and a run that diverged."""

from collections.abc import Sequence


class UserError(ValueError):
    """Bad input: the message is one line that names the place and the remedy.

    The command line prints it without a traceback and exits with 2.
    """


class DivergedError(RuntimeError):
    """The loss or its gradient is not finite; the last checkpoint is untouched."""


class OutOfMemoryError(RuntimeError):
    """A step needs more memory than there is; the message names what to change."""


class RankError(RuntimeError):
    """Another rank of the run failed; that one says why."""


class LoaderError(RuntimeError):
    """Reading training data failed for no fault of the input: a worker died or hung, or a bug.

    The message is one line that names the case; what caused it is chained or noted.
    """


def listed(names: Sequence[str], shown: int = 3) -> str:
    """The first names, and how many more there are, for a message of one line."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
