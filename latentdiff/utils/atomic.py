"""Atomic writing: a file or folder is the old one or the new one, whole, whenever a process is killed or a disk is full.

A file or folder is written under a temporary name, synced, and put in its place by one rename. A folder that exists is
exchanged with the new one in one step, so that it is never missing. What a killed process leaves has a name by which `sweep`
finds and removes it.
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

# Errors of writing itself. Others, such as a file to copy that does not exist, are passed on as they are
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, None)
RENAME_EXCHANGE, AT_FDCWD = 2, -100  # of renameat2(2)
NEW, OLD = re.compile(r"\.(.+)\.new-[0-9a-f]{8}"), re.compile(r"\.(.+)\.old-[0-9a-f]{8}")
# Names of temporary files and folders, of this version and of earlier ones
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
    """A temporary path to write a file to. It takes the place of `path` when the block ends without an error.

    The file's folder is made. UserError, naming the file, where it cannot be written.
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
    """Write a text file (UTF-8) and make its folder. UserError, naming the file, where it cannot be written."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as a JSON file, as `write_text` does. What JSON has no type for is written as its str()."""
    write_text(path, json.dumps(value, indent=1, default=str))


@contextlib.contextmanager
def new_folder(folder: Path, keep: bool = False) -> Iterator[Path]:
    """A fresh folder to write to. It takes the place of `folder` when the block ends without an error.

    Only one job at a time may do so; what killed jobs left of the same folder is removed first.

    keep: keep the files of the old folder that the block does not write; otherwise they are removed.

    UserError, naming the folder, where it cannot be written or another job is writing it. The old folder is then unchanged.
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
            shutil.rmtree(new, ignore_errors=True)  # now the old folder, or what an error left


def recover(folder: Path) -> None:
    """Put back a folder that a killed process had renamed to make room, on a system that cannot exchange folders.

    The caller holds the folder's lock. Nothing happens where the folder exists.
    """
    if folder.exists():
        return
    for old in sorted(folder.parent.glob(f".{folder.name}.old-*")):
        if OLD.fullmatch(old.name):
            os.rename(old, folder)
            return


def put_back(folder: Path) -> None:
    """Do `recover` for a job that only reads the folder, unless another job is writing the folder just now."""
    if folder.name and not folder.exists() and any(folder.parent.glob(f".{folder.name}.old-*")):
        with contextlib.suppress(UserError), locks.locked(folder, beside=True, alone=True):
            recover(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder. A process killed meanwhile leaves it whole, or under a name that `sweep` removes."""
    aside = folder.with_name(f".{folder.name}.old-{uuid4().hex[:8]}.tmp")
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def is_leftover(path: Path) -> bool:
    """Whether a name is that of a temporary file or folder: a killed process left it, or a live one is writing it."""
    return any(kind.fullmatch(path.name) for kind in LEFTOVERS)


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder and in its sub-folders. The caller holds the folder's lock.

    What another job is writing stays: a sub-folder, or a published folder, whose own lock is held.
    """
    # A job takes its lock before it writes. So the list is made before the locks are tested
    entries = list(folder.iterdir()) if folder.is_dir() else []

    # Locks that killed jobs left
    for path in entries:
        if path.name.endswith(locks.NAME) and path.name != locks.NAME:
            _is_free(path.with_name(path.name[1 : -len(locks.NAME)]), beside=True)

    # Temporary files and folders, and then sub-folders
    for path in entries:
        match = OLD.fullmatch(path.name) or NEW.fullmatch(path.name)
        target = path.with_name(match[1]) if match else None
        if target is not None and not _is_free(target, beside=True):
            continue
        if target is not None and OLD.fullmatch(path.name) and not target.exists():
            recover(target)
        elif is_leftover(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        elif path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            inside = list(path.iterdir())
            if not any(each.name == locks.NAME for each in inside) or _is_free(path, beside=False):
                sweep(path)


def _is_free(path: Path, beside: bool) -> bool:
    """Whether no job holds the lock of a path. The file of a lock that a killed job left is removed."""
    try:
        with locks.locked(path, beside=beside, alone=True):
            return True
    except UserError:
        return False


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error of writing within the block into a UserError that names `path`.

    The error of a full disk names no file.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno not in WRITE_ERRORS:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(f"{path}: cannot be written ({' '.join(reason.split())[:160]})") from error


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot sync folders
            raise
    finally:
        os.close(handle)


def _put(new: Path, folder: Path) -> None:
    """Put a new folder in the place of `folder`."""
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
    return (
        renameat2 is not None and renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0
    )


def _take_over(folder: Path, new: Path) -> None:
    """Copy the files of a folder that the new one does not have."""
    for path in folder.rglob("*"):
        target = new / path.relative_to(folder)
        if path.is_file() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
