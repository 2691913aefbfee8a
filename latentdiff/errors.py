"""The exceptions for mistakes of a user, and for damaged files and weights."""

import json


class UserError(ValueError):
    """A mistake in usage or input, in one line that names the file, field or flag at fault and what would be valid.

    The command line prints the line without a traceback and exits with status 2. Callers of the library may catch it as a
    ValueError.
    """


class ReportedElsewhere(UserError):
    """A mistake that process 0 of a launch prints. The other processes raise this, print nothing and exit with status 2."""


class NotFiniteError(UserError, FloatingPointError):
    """A result that holds NaN or infinity and must not be used. The line names what produced it."""


def printable(text: str, keep: str = "") -> str:
    """The text with control characters escaped as in JSON, so that a name from a file cannot drive the terminal.

    Such characters are escape codes, line breaks and changes of direction. keep: characters that are not escaped.
    """
    fine = f"{keep}\u200c\u200d"  # these two join letters and emoji
    return "".join(each if each.isprintable() or each in fine else json.dumps(each)[1:-1] for each in text)
