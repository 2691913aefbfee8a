"""One job at a time in a folder: a lock that the kernel releases when its holder ends, however it ends.

The lock is flock(2) on a small file. It belongs to a job, not to a process: in a launch of several processes, process 0 takes
it and all of them learn the outcome. The file is removed when the lock is released. A killed job leaves the file, but not the
lock: the next job takes the file over and removes it.

The package filelock is not used here: it has no shared flock, leaves its file on disk, does not name the holder, and refuses
file systems without flock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from latentdiff.errors import UserError
from latentdiff.utils import processes

NAME = ".latentdiff.lock"  # the file in a folder; beside a file or folder it is .NAME.latentdiff.lock
PATIENCE = 0.3  # seconds in which a lock is tried again, because its holder may be about to release it
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # what flock raises on a file system without it


class InUse(UserError):
    """Another job holds the lock."""


_held: dict[tuple[str, int], _Lock] = {}  # the locks of this process, by the file's real path and the thread
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
    """Hold a folder for the length of the block. A missing folder is made, and removed again if it stays empty.

    Every process of a launch enters the block alike; under accelerate, after the Accelerator was made. The same thread may
    hold a folder twice; another thread may not. A forked child does not hold what its parent holds.

    Args:
        path: the folder; with `beside`, a file or folder that this job replaces as a whole.
        advice: what the message tells the user to do.
        shared: any number of jobs may hold the folder shared, but none together with an exclusive holder.
        beside: the lock file lies beside `path`, not in it.
        alone: only this process of a launch calls this, so there is nobody to agree with.

    Raises:
        InUse: another job holds it. The message names the folder, the process and its host.
        UserError: the folder cannot be written to.
        ReportedElsewhere: either of them, in the other processes of a launch; the command line prints nothing for it.
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
    if not alone:
        processes.raise_together(problem)
    elif problem is not None:
        raise problem
    try:
        yield
    finally:
        if lock is not None:
            lock.give_back()


def is_lock(path: Path) -> bool:
    """Whether a file is a lock of this module."""
    return path.name.endswith(NAME)


def holder_runs(text: str) -> bool:
    """Whether the process that a lock's file names still runs, as far as this machine can tell.

    text: what the file holds. A process on another host counts as running; a file that names none does not.
    """
    import psutil

    match = re.fullmatch(r"process (\d{1,9}) on (\S+)\s*", text)
    return match is not None and (match[2] != socket.gethostname() or psutil.pid_exists(int(match[1])))


def contents(folder: Path) -> list[Path]:
    """What lies in a folder except locks, sorted; [] where there is no folder."""
    return sorted(path for path in folder.iterdir() if not is_lock(path)) if folder.is_dir() else []


@dataclass
class _Lock:
    handle: int | None  # of the open file; None in a forked child
    path: Path
    key: tuple[str, int]  # in _held
    shared: bool
    made: list[Path]  # the folders that were made for the lock, the outermost first
    count: int = 1  # of the blocks that hold it

    def give_back(self) -> None:
        with _guard:
            self.count -= 1
            if self.count > 0 or _held.get(self.key) is not self:
                return  # an outer block holds it, or the parent of a forked child
            del _held[self.key]
        if self.handle is not None:
            # Only an exclusive holder may remove the file: else a newcomer would lock a new file beside other holders
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
    """Take the lock of a file in a folder. InUse, which names the path `shown`, where another job or thread holds it."""
    path = folder / name
    key = os.path.join(os.path.realpath(folder), name), threading.get_ident()

    # Held by this thread already
    with _guard:
        own = _held.get(key)
        if own is not None and (shared or not own.shared):
            own.count += 1
            return own

    # Lock the file, and make sure that it is still the one on disk
    made: list[Path] = []
    give_up = time.monotonic() + PATIENCE
    while True:
        try:
            made += _make(folder)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the last holder has just removed the folder
            continue
        try:
            works = _flock(handle, shared)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        except FileNotFoundError:
            pass  # the last holder has just removed the file
        except BlockingIOError:
            if time.monotonic() > give_up:
                holder = _holder(handle)
                os.close(handle)
                raise InUse(f"{shown}: is in use by another run{holder}; {advice}") from None
            time.sleep(0.02)
        os.close(handle)

    # Write who holds it
    if not works and str(folder) not in _warned:
        _warned.add(str(folder))
        print(f"warning: {folder}: this file system has no locks; see to it that no other run uses the folder", file=sys.stderr)
    if works and not shared:
        with contextlib.suppress(OSError):  # on a full disk the holder stays unnamed
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    lock = _Lock(handle, path, key, shared, made)
    with _guard:
        _held[key] = lock
    return lock


def _make(folder: Path) -> list[Path]:
    """Make a folder and return the folders that were made, the outermost first."""
    missing: list[Path] = []
    above = folder.absolute()
    while not above.exists():
        missing.insert(0, above)
        above = above.parent
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _flock(handle: int, shared: bool) -> bool:
    """Lock at once or raise BlockingIOError; False where the file system or the operating system has no such locks."""
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
    """The process and host that hold the lock, in brackets, as its file names them; "" where it names none."""
    text = os.pread(handle, 300, 0).decode(errors="replace").split("\n")[0].strip()
    return f" ({text})" if text.startswith("process ") and text.isprintable() else ""


def _forget() -> None:
    """In a forked child: close the child's copies of the locks, which would outlive the parent's."""
    global _guard
    _guard = threading.Lock()
    for lock in _held.values():
        if lock.handle is not None:
            os.close(lock.handle)
            lock.handle = None
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
