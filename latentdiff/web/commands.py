"""The command and the Python code that do what a request of the page does, made of the same arguments."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any


def command_line(command: str, positional: Sequence[str], flags: Mapping[str, Any]) -> str:
    """A command of latentdiff, quoted for a shell.

    positional: what is given without a flag. flags: {argument: value}; None, False and empty lists are left out, True is a flag
    without a value, and a list or tuple gives several values.
    """
    words = ["latentdiff", command, *(f"./{word}" if word.startswith("-") else word for word in positional)]
    for name, value in flags.items():
        if value is None or value is False or value == [] or value == ():
            continue
        flag = "--" + name.replace("_", "-")
        values = [] if value is True else list(value) if isinstance(value, (list, tuple)) else [value]
        if len(values) == 1 and str(values[0]).startswith("-"):
            words.append(f"{flag}={values[0]}")  # else it would be taken for a flag
        else:
            words += [flag, *map(str, values)]
    return shlex.join(words)


def python_call(function: str, arguments: Mapping[str, Any], module: str = "latentdiff") -> str:
    """Python code that imports a function and calls it with keyword arguments, one a line."""
    lines = [f"    {name}={value!r}," for name, value in arguments.items()]
    return "\n".join([f"from {module} import {function}", "", f"{function}(", *lines, ")"])
