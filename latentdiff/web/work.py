"""Running the requests of visitors: progress, cancel that stops at the next step, and errors in one line."""

from __future__ import annotations

import contextvars
import queue
import re
import sys
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, printable
from latentdiff.web.worker import WORKER

# How events that compute are given to gradio: they wait in one queue, and run one at a time
QUEUE: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1}
FAILED = "the server failed; its terminal says why"
LONGEST = 1000  # letters of an error that are shown: it may quote what a visitor sent, or a file
# A path, where it begins: not within a word, a URL or a command such as a/b
PATH = re.compile(
    r"(?<![\w.:/~<-])(?:(?:~|[A-Za-z]:)?/|[A-Za-z]:\\)(?=[^\s/\\])(?:[^\s:;,'\"()<>|/\\]+[/\\])*([^\s:;,'\"()<>|/\\]*)"
)


class Cancelled(Exception):
    """The visitor has stopped the request."""


@dataclass(frozen=True)
class Update:
    """How far a request is.

    Attributes:
        done: whether this is the last update; `result` then holds what the function returned.
        step, steps: the step that is done, of how many; 0 and 0 where that is not known.
        shown: what the function gave to be shown meanwhile, such as a picture.
        result: what the function returned.
        stopped: whether the visitor stopped it; there is no result then.
    """

    done: bool = False
    step: int = 0
    steps: int = 0
    shown: Any = None
    result: Any = None
    stopped: bool = False

    @property
    def text(self) -> str:
        """The update in words."""
        if self.stopped:
            return "Stopped."
        if self.done:
            return "Done."
        return f"Step {self.step} of {self.steps}" if self.steps else "Working"


class Job:
    """One running request, as its function sees it."""

    def __init__(self) -> None:
        self._cancelled = threading.Event()
        self._updates: queue.SimpleQueue[Update | BaseException] = queue.SimpleQueue()

    @property
    def cancelled(self) -> bool:
        """Whether the request is to stop."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Ask the request to stop."""
        self._cancelled.set()

    def check(self) -> None:
        """Raise `Cancelled` if the request is to stop. Long work calls it in each step."""
        if self._cancelled.is_set():
            raise Cancelled

    def step(self, step: int, steps: int = 0, shown: Any = None) -> None:
        """Say how far the work is, and stop here if the visitor wishes so. See `Update`."""
        self.check()
        self._updates.put(Update(step=step, steps=steps, shown=shown))

    def _run(self, function: Callable[[Job], Any]) -> None:
        """In the thread that computes: its result, or its error, is the last thing it puts into the queue."""
        try:
            self.check()
            self._updates.put(Update(done=True, result=function(self)))
        except Cancelled:
            self._updates.put(Update(done=True, stopped=True))
        except BaseException as error:
            self._updates.put(error)

    def next(self) -> Update:
        """The next update, waited for. Raises what the function raised."""
        update = self._updates.get()
        if isinstance(update, BaseException):
            raise update
        return update


class Work:
    """Runs requests, and knows them, so that each visitor can stop their own."""

    def __init__(self, names: Mapping[str | Path, str] | None = None):
        """names: {folder of the server: what a message calls it}."""
        self._names = {str(folder): name for folder, name in (names or {}).items()}
        self._jobs: dict[str, list[Job]] = {}  # the running jobs of each visitor
        self._guard = threading.Lock()

    @property
    def running(self) -> int:
        """How many requests run or wait for those before them."""
        with self._guard:
            return sum(map(len, self._jobs.values()))

    def run(self, visitor: str | None, function: Callable[[Job], Any]) -> Iterator[Update]:
        """Run function(job) in the thread that computes, see `worker`; yield its updates, the last one with its result.

        Requests run one after the other. Closing the iterator cancels the job.

        visitor: who may cancel it, see `cancel`; None for nobody.

        Raises:
            gradio.Error: one line, for a mistake of the visitor and for a failure of the server.
        """
        job, key = Job(), str(visitor or uuid.uuid4())
        with self._guard:
            self._jobs.setdefault(key, []).append(job)
        WORKER.start(partial(contextvars.copy_context().run, job._run, function))
        try:
            update = Update()
            while not update.done:
                try:
                    update = job.next()
                except Exception as error:
                    raise self.error(error) from None
                yield update
        finally:
            job.cancel()
            with self._guard:
                self._jobs[key].remove(job)
                if not self._jobs[key]:
                    del self._jobs[key]

    def cancel(self, visitor: str | None) -> int:
        """Ask the running requests of a visitor to stop; returns how many there are."""
        with self._guard:
            jobs = list(self._jobs.get(visitor, ())) if visitor else []
        for job in jobs:
            job.cancel()
        return len(jobs)

    def line(self, error: BaseException) -> str:
        """An error as the one line that the command line would print, without any path of the server.

        What is no mistake of the visitor is printed to the server's stderr, and the line says so.
        """
        if not isinstance(error, UserError):
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                return "there is not enough memory for this; ask for fewer images"
            traceback.print_exception(error, file=sys.stderr)
            return FAILED
        return self.without_paths(str(error)[:LONGEST])

    def without_paths(self, text: str) -> str:
        """A text in one line, in which folders of the server have their names, and other paths only their last part."""
        text = " ".join(text.split())
        for folder in sorted(self._names, key=len, reverse=True):
            text = text.replace(folder, self._names[folder])
        return printable(PATH.sub(lambda found: found[1] or "a folder", text))

    def error(self, error: BaseException) -> Exception:
        """An error as gradio shows it: see `line`."""
        import gradio

        if isinstance(error, gradio.Error):
            return error
        return gradio.Error(self.line(error), duration=None, print_exception=False)


def names_of(folders: Mapping[str, Path], others: Sequence[tuple[Path | None, str]] = ()) -> dict[str, str]:
    """{path: what a message calls it} for `Work`, with paths as they were given and as they are in full."""
    named: dict[str, str] = {}
    for folder, name in [*((folder, name) for name, folder in folders.items()), *others]:
        if folder is not None:
            named |= {str(folder): name, str(folder.absolute()): name, str(folder.resolve()): name}
    return named
