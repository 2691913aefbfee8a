"""The exceptions that stand for a user's mistake, or for files and weights that are damaged."""


class UserError(ValueError):
    """A mistake in usage or input, said in one line.

    The message names the file, field or flag at fault and what would be valid. The command line prints it
    without a traceback and exits with status 2; library callers may catch it as a ValueError.
    """


class ReportedElsewhere(UserError):
    """The same mistake in the other processes of a launch: the first one prints it, and these end with status 2 in silence."""


class NotFiniteError(UserError, FloatingPointError):
    """A result that holds NaN or infinity, so that nothing may be made of it; the line names what gave it."""
