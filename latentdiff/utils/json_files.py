"""Files of a checkpoint that hold a JSON object."""

import json
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file. UserError where the file is missing or holds something else."""
    if not file.is_file():
        raise UserError(f"{file}: missing; the checkpoint is incomplete")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: must hold a JSON object, not a {type(content).__name__}")
    return content
