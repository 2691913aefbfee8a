"""Results on stdout."""

from __future__ import annotations

import json
from typing import Any

from latentdiff.cli.commands import load
from latentdiff.errors import printable


def dump(value: dict[str, Any]) -> str:
    """Results as JSON for stdout; of names, control characters are escaped, also those that JSON may leave as they are."""
    return printable(json.dumps(value, indent=2, ensure_ascii=False, default=str), keep="\n")


def in_text(result: Any, output: str) -> str:
    """What a command prints of its result, without the last line break. output: of its `Command`."""
    if output == "json":
        return dump(result)
    if output == "paths":
        return "\n".join(map(str, result if isinstance(result, list) else [result]))
    text = result if output == "text" else load(output)(result)
    return printable(text, keep="\n").removesuffix("\n")
