"""Hashes of weight files: whatever writes weights writes hashes.json beside them, whatever reads weights checks it.

Each network's folder has its own file (unet/hashes.json), so that a part that replaces another one, such as a newly trained
autoencoder, brings its own hashes. A folder without the file comes from another program and is not checked. The hashes
detect damage from copying and from disks. They do not protect against somebody who changes both files.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

FILE = "hashes.json"
_CHECKED = ContextVar("checked", default=True)
_CHUNK = 1 << 20  # bytes read at a time
_LARGEST = 1 << 24  # bytes of the largest hash file that is read; one of 100,000 shards is smaller


def sha256_of(file: str | Path) -> str:
    """The hex sha256 of a file's content. The file is read once, 1 MiB at a time."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_hashes(folder: str | Path) -> None:
    """Write hashes.json, {name: {bytes, sha256}} of each .safetensors file of a folder; without such files, remove it."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        (folder / FILE).unlink(missing_ok=True)
        return
    entries = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    new = folder / f".{FILE}.new"
    new.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    os.replace(new, folder / FILE)


@contextmanager
def checked(verify: bool) -> Iterator[None]:
    """Within the block, verify=False turns `check_hashes` off. For commands that open many networks (--no-verify)."""
    token = _CHECKED.set(verify)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def is_checked() -> bool:
    """Whether `check_hashes` is on here. A thread that is started within `checked(False)` does not know of it by itself."""
    return _CHECKED.get()


def check_hashes(files: Iterable[Path]) -> None:
    """Check weight files against the hashes.json beside each; takes about two seconds a gigabyte on a slow core.

    Nothing is checked where there is no hashes.json, or within `checked(False)`.

    Raises:
        UserError: a file's length or hash differs, hashes.json does not list it, or hashes.json cannot be read.
    """
    for file in files if _CHECKED.get() else ():
        listed = file.parent / FILE
        if not listed.is_file():
            continue
        entry, advice = _read(listed).get(file.name), f"if the change is yours, delete {listed}"
        if entry is None:
            raise UserError(f"{file}: {FILE} beside it does not list it, so it was put there later; {advice}")
        size = file.stat().st_size
        if size != entry["bytes"]:
            reason = f"has {size} bytes, and {FILE} says {entry['bytes']}"
        elif sha256_of(file) != entry["sha256"]:
            reason = f"its sha256 is not the one in {FILE}"
        else:
            continue
        raise UserError(f"{file}: {reason}: damaged, or changed after it was published; copy it again, or, {advice}")


def _read(file: Path) -> dict[str, Any]:
    """The entries of a hash file by file name, each with bytes (int) and sha256 (str)."""
    try:
        if file.stat().st_size > _LARGEST:
            raise ValueError(f"it has more than {_LARGEST} bytes")
        entries = json.loads(file.read_text(encoding="utf-8"))
        for entry in entries.values():
            if not isinstance(entry["bytes"], int) or not isinstance(entry["sha256"], str):
                raise TypeError("bytes must be a number and sha256 a text")
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{file}: not a list of files with bytes and sha256 ({reason}); delete it, or copy it again") from None
    return entries
