"""The one exception that means "your input, not our bug"."""


class UserError(ValueError):
    """Bad input: the message is one line that names the place and the remedy.

    The command line prints it without a traceback and exits with 2.
    """
