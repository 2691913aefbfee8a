"""One job at a time in a folder: a lock that the kernel frees when its holder ends, however it ends.

The lock is flock(2) on a small file. It belongs to a job, not to a process: of the processes of a launch the first one
takes it, and all of them learn the outcome. The file is removed when the lock is given back. A killed job leaves the file
behind, but not the lock: the next job takes the file over and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from latentdiff.errors import ReportedElsewhere, UserError
from latentdiff.utils import processes

NAME = ".latentdiff.lock"  # in a folder; beside a file or folder it is .NAME.latentdiff.lock
PATIENCE = 0.3  # seconds in which a lock that is just being given back is tried again
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what flock raises where a file system has none


class InUse(UserError):
    """Another job holds the lock."""


_held: dict[tuple[str, int], _Lock] = {}  # of this process, by the lock file's real path and the thread
_guard = threading.Lock()
_warned: set[str] = set()


@contextlib.contextmanager
def locked(
    path: str | Path,
    advice: str = "wait for it or choose another output=",
    *,
    shared: bool = False,
    beside: bool = False,
    alone: bool = False,
) -> Iterator[None]:
    """Hold a folder for the length of the block. The folder is made where it is missing, and removed if it stays empty.

    Every process of a launch enters the block alike; under accelerate, after the Accelerator was made. The same thread may
    hold a folder twice, another thread may not. A forked child does not hold what its parent holds.

    Args:
        path: the folder; with `beside`, a file or folder that this job replaces as a whole, so that the lock lies beside it.
        advice: what the message tells the user to do.
        alone: only this process of a launch calls it, so there is nobody to agree with.
        shared: any number of jobs may hold it shared, such as the parts of one cache, but none beside an exclusive holder.

    Raises:
        InUse: another job holds it (the message names the folder, the process and its host), or it cannot be written
            to. In the other processes of the launch `ReportedElsewhere`, for which the command line prints nothing.
    """
    path = Path(path)
    folder, name = (path.absolute().parent, f".{path.name}{NAME}") if beside else (path, NAME)
    lock, problem = None, None
    if alone or processes.rank() == 0:
        try:
            lock = _take(folder, name, path, shared, advice)
        except UserError as error:
            problem = error
        except OSError as error:
            problem = UserError(f"{path}: cannot be written to ({error.strerror or error})")
    if not (problem is None if alone else processes.agree(problem is None)):
        raise problem if problem is not None else ReportedElsewhere(f"{path}: is in use by another run")
    try:
        yield
    finally:
        if lock is not None:
            lock.give_back()


def is_lock(path: Path) -> bool:
    """Whether a file is a lock of this module, which is no content of a folder."""
    return path.name.endswith(NAME)


def contents(folder: Path) -> list[Path]:
    """What lies in a folder, but for locks; empty where there is no folder."""
    return sorted(path for path in folder.iterdir() if not is_lock(path)) if folder.is_dir() else []


class _Lock:
    def __init__(self, handle: int | None, path: Path, key: tuple[str, int], shared: bool, made: list[Path]):
        self.handle, self.path, self.key, self.shared, self.made = handle, path, key, shared, made
        self.count = 1

    def give_back(self) -> None:
        with _guard:
            self.count -= 1
            if self.count > 0 or _held.get(self.key) is not self:
                return  # held further out, or by the parent of a forked child
            del _held[self.key]
        if self.handle is not None:
            # Only an exclusive holder may remove the file: a newcomer would else lock a new one beside other holders
            with contextlib.suppress(OSError):
                if self.shared:
                    _flock(self.handle, shared=False)
                if os.path.samestat(os.fstat(self.handle), os.stat(self.path)):
                    os.unlink(self.path)
            os.close(self.handle)
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _take(folder: Path, name: str, shown: Path, shared: bool, advice: str) -> _Lock:
    path, key = folder / name, (os.path.join(os.path.realpath(folder), name), threading.get_ident())
    with _guard:
        own = _held.get(key)
        if own is not None and (shared or not own.shared):
            own.count += 1
            return own
    made, until = [], time.monotonic() + PATIENCE
    while True:
        try:
            made += _make(folder)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # whoever held the folder has just removed it
            continue
        try:
            works = _flock(handle, shared)
            if not works:
                _warn(folder)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # its last holder removed the file meanwhile
        except BlockingIOError:
            if time.monotonic() > until:
                holder = _holder(handle)
                os.close(handle)
                raise InUse(f"{shown}: is in use by another run{holder}; {advice}") from None
            time.sleep(0.02)
        os.close(handle)
    if works and not shared:
        with contextlib.suppress(OSError):  # on a full disk the lock holds all the same, its holder unnamed
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    lock = _Lock(handle, path, key, shared, made)
    with _guard:
        _held[key] = lock
    return lock


def _make(folder: Path) -> list[Path]:
    """Make a folder; which folders were made, the outermost first."""
    missing: list[Path] = []
    above = folder.absolute()
    while not above.exists():
        missing.insert(0, above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flock(handle: int, shared: bool) -> bool:
    """Lock at once or raise BlockingIOError; False where the file system, or the operating system, has no such locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return False
        raise
    return True


def _holder(handle: int) -> str:
    """The process and its host, in brackets, as the holder wrote them into the file; or nothing."""
    text = os.pread(handle, 300, 0).decode(errors="replace").split("\n")[0].strip()
    return f" ({text})" if text.startswith("process ") and text.isprintable() else ""


def _warn(folder: Path) -> None:
    if str(folder) not in _warned:
        _warned.add(str(folder))
        print(f"warning: {folder}: this file system has no locks; see to it that no other run uses the folder", file=sys.stderr)


def _forget() -> None:
    """In a forked child: close its copies of the locks, which would else outlive the parent."""
    global _guard
    _guard = threading.Lock()
    for lock in _held.values():
        if lock.handle is not None:
            os.close(lock.handle)
            lock.handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
