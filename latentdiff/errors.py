"""The exceptions that stand for a user's mistake, or for files and weights that are damaged."""

import json


class UserError(ValueError):
    """A mistake in usage or input, said in one line.

    The message names the file, field or flag at fault and what would be valid. The command line prints it
    without a traceback and exits with status 2; library callers may catch it as a ValueError.
    """


class ReportedElsewhere(UserError):
    """The same mistake in the other processes of a launch: the first one prints it, and these end with status 2 in silence."""


class NotFiniteError(UserError, FloatingPointError):
    """A result that holds NaN or infinity, so that nothing may be made of it; the line names what gave it."""


def printable(text: str, keep: str = "") -> str:
    """Text with control characters written as JSON writes them, so that no name from a file drives the terminal.

    A name may hold an escape code, a line break or a change of direction. keep: characters that are left as they are.
    """
    fine = f"{keep}\u200c\u200d"  # these two join letters and emoji
    return "".join(each if each.isprintable() or each in fine else json.dumps(each)[1:-1] for each in text)
