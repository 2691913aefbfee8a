"""Files and folders that are the old ones or the new ones, whole, at whatever moment a process is killed or a disk is full.

A file or folder is written under a temporary name, synced, and put in its place by one rename; a folder that is there is
exchanged with the new one, so that at no moment it is missing. What a killed process leaves is known by its name, and
`sweep` removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError

from latentdiff.errors import UserError
from latentdiff.utils import locks

WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, None)
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)
NEW, OLD = re.compile(r"\.(.+)\.new-[0-9a-f]{8}"), re.compile(r"\.(.+)\.old-[0-9a-f]{8}")
# Names that this version gives to temporary files and folders, and those that earlier versions gave
LEFTOVERS = (
    NEW,
    OLD,
    re.compile(r"\..+\.tmp"),
    re.compile(r"\.(model|writing|saving|judge)-[a-z0-9_]{8}"),
    re.compile(r"\..+\.[0-9]+\.npz"),
    re.compile(r".+\.[0-9a-f]{32}\.tmp"),
)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary path to write a file to, which takes the place of `path` when the block ends without an error.

    The folder is made. UserError naming the file where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    with naming(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8), whose folder is made."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON; what JSON does not know becomes its text."""
    write_text(path, json.dumps(value, indent=1, default=str))


@contextlib.contextmanager
def new_folder(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A fresh folder to write to, which takes the place of `folder` when the block ends without an error.

    keep: files of the old folder that the block does not write are taken over; else they go with it.

    Only one job at a time may do so; what killed ones left of the same folder is removed first. UserError naming the
    folder where it cannot be written, or is being written by another job: the old one then stays as it is.
    """
    folder = Path(folder)
    with locks.locked(folder, "wait for it, or choose another folder", beside=True, alone=True), naming(folder):
        recover(folder)
        for path in folder.parent.glob(f".{folder.name}.*"):
            if any(kind.fullmatch(path.name) for kind in (NEW, OLD)):
                shutil.rmtree(path, ignore_errors=True)
        new = folder.with_name(f".{folder.name}.new-{uuid4().hex[:8]}")
        try:
            new.mkdir(parents=True)
            yield new
            if keep and folder.is_dir():
                _take_over(folder, new)
            for path in new.rglob("*"):
                sync(path)
            sync(new)
            _put(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)  # what stood there before, or what an error left


def recover(folder: Path) -> None:
    """Put back a folder that a killed process had renamed to make room, where folders cannot be exchanged."""
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f".{folder.name}.old-*")):
        if OLD.fullmatch(old.name):
            os.rename(old, folder)
            return


def put_back(folder: Path) -> None:
    """`recover`, for whoever only reads: unless a job is at work on the folder just now."""
    if folder.name and not folder.exists() and any(folder.parent.glob(f".{folder.name}.old-*")):
        with contextlib.suppress(UserError), locks.locked(folder, beside=True, alone=True):
            recover(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that a killed process leaves it whole, or under a name that `sweep` knows."""
    aside = folder.with_name(f".{folder.name}.old-{uuid4().hex[:8]}.tmp")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a killed process left, by its name; it may also be what a live one is writing."""
    return any(kind.fullmatch(path.name) for kind in LEFTOVERS)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder and in its sub-folders, by name. Only for whoever holds its lock.

    What another job is working on within it stays: a sub-folder, or a published folder, whose own lock is held.
    """
    # Whoever writes takes the lock first. So what is listed before the locks are looked at is of a job that shows
    entries = list(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if path.name.endswith(locks.NAME) and path.name != locks.NAME:
            _free(path.with_name(path.name[1 : -len(locks.NAME)]), beside=True)  # a lock that a killed job left
    for path in entries:
        match = OLD.fullmatch(path.name) or NEW.fullmatch(path.name)
        if match and not _free(path.with_name(match[1]), beside=True):
            continue
        if match and OLD.fullmatch(path.name) and not path.with_name(match[1]).exists():
            recover(path.with_name(match[1]))
        elif is_leftover(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            inside = list(path.iterdir())
            if not any(each.name == locks.NAME for each in inside) or _free(path, beside=False):
                sweep(path)


def _free(path: Path, beside: bool) -> bool:
    """Whether no job holds a path; a lock file that a killed job left of it is removed."""
    try:
        with locks.locked(path, beside=beside, alone=True):
            return True
    except UserError:
        return False


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Within the block a file that cannot be written is a UserError that names `path`: a full disk's error names no file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITING:  # such as a file to copy that is not there
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be written ({' '.join(reason.split())[:160]})") from error


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before what comes next."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot sync folders
            raise
    finally:
        os.close(handle)


def _put(new: Path, folder: Path) -> None:
    new.chmod(0o755)
    if not folder.exists():
        os.rename(new, folder)
    elif not _exchange(new, folder):
        old = folder.with_name(f".{folder.name}.old-{uuid4().hex[:8]}")
        os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            os.rename(old, folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one step; False where the operating system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return renameat2 is not None and renameat2(HERE, os.fsencode(first), HERE, os.fsencode(second), EXCHANGE) == 0


def _take_over(folder: Path, new: Path) -> None:
    for path in folder.rglob("*"):
        target = new / path.relative_to(folder)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
