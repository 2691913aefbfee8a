"""Results on stdout."""

from __future__ import annotations

import json
from typing import Any

from latentdiff.errors import printable


def dump(value: dict[str, Any]) -> str:
    """Results as JSON for stdout; of names, control characters are escaped, also those that JSON may leave as they are."""
    return printable(json.dumps(value, indent=2, ensure_ascii=False, default=str), keep="\n")
