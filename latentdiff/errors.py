"""The one exception that stands for a user's mistake."""


class UserError(ValueError):
    """A mistake in usage or input, said in one line.

    The message names the file, field or flag at fault and what would be valid. The command line prints it
    without a traceback and exits with status 2; library callers may catch it as a ValueError.
    """


class ReportedElsewhere(UserError):
    """The same mistake in the other processes of a launch: the first one prints it, and these end with status 2 in silence."""
