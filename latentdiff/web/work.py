"""Running the requests of visitors: progress, cancel that stops at the next step, and errors in one line."""

from __future__ import annotations

import re
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError, printable
from latentdiff.web.jobs.job import Job, Update
from latentdiff.web.worker import Failed, Request, Worker

if TYPE_CHECKING:
    from latentdiff.web.jobs.models import Models

# How events that compute are given to gradio: they wait in one queue, and run one at a time
QUEUE: dict[str, Any] = {"concurrency_id": "work", "concurrency_limit": 1}
FAILED = "the server failed; its terminal says why"
LOOK = 0.05  # seconds between two looks at whether a request has ended
LONGEST = 1000  # letters of an error that are shown: it may quote what a visitor sent, or a file
# A path, where it begins: not within a word, a URL or a command such as a/b
PATH = re.compile(
    r"(?<![\w.:/~<-])(?:(?:~|[A-Za-z]:)?/|[A-Za-z]:\\)(?=[^\s/\\])(?:[^\s:;,'\"()<>|/\\]+[/\\])*([^\s:;,'\"()<>|/\\]*)"
)


class Work:
    """Runs requests, and knows them, so that each visitor can stop their own."""

    def __init__(self, worker: Worker, names: Mapping[str | Path, str] | None = None):
        """
        Args:
            worker: the process that computes.
            names: {folder of the server: what a message calls it}.
        """
        self.worker = worker
        self._names = {str(folder): name for folder, name in (names or {}).items()}
        self._requests: dict[str, list[Request]] = {}  # those of each visitor that run or wait
        self._stopping: set[Request] = set()  # those of them that were cancelled
        self._guard = threading.Lock()

    @property
    def running(self) -> int:
        """How many requests run or wait for those before them."""
        with self._guard:
            return sum(map(len, self._requests.values()))

    def run(self, visitor: str | None, function: Callable[[Models, Job], Any]) -> Iterator[Update]:
        """Have function(models, job) run in the process that computes; yield its updates, the last one with its result.

        The first update comes at once, and says that the request runs or waits. Requests run one after the other. Closing the
        iterator cancels this one.

        Args:
            visitor: who may cancel it, see `cancel`; None for nobody.
            function: one that pickle knows. So is what it returns.

        Raises:
            gradio.Error: one line, for a mistake of the visitor and for a failure of the server.
        """
        key = str(visitor or uuid.uuid4())
        try:
            request = self.worker.start(function)
        except Exception as error:
            raise self.error(error) from None
        with self._guard:
            self._requests.setdefault(key, []).append(request)
        try:
            update = Update()
            yield update  # the request runs already
            while not update.done:
                try:
                    update = request.next()
                except Exception as error:
                    raise self.error(error) from None
                yield update
        finally:
            request.cancel()
            with self._guard:
                self._requests[key].remove(request)
                self._stopping.discard(request)
                if not self._requests[key]:
                    del self._requests[key]

    def cancel(self, visitor: str | None) -> int:
        """Ask the running requests of a visitor to stop; returns how many there are."""
        with self._guard:
            requests = list(self._requests.get(visitor, ())) if visitor else []
            self._stopping.update(requests)
        for request in requests:
            request.cancel()
        return len(requests)

    def wait(self, visitor: str | None, seconds: float) -> bool:
        """Wait, at most so long, until what was cancelled has ended; returns whether it has. Later requests may run."""
        end = time.monotonic() + seconds
        while visitor:
            with self._guard:
                if self._stopping.isdisjoint(self._requests.get(visitor, ())):
                    break
            if time.monotonic() >= end:
                return False
            time.sleep(LOOK)
        return True

    def line(self, error: BaseException) -> str:
        """An error as the one line that the command line would print, without any path of the server.

        What is no mistake of the visitor is printed to the server's stderr, and the line says so.
        """
        if not isinstance(error, UserError):
            if isinstance(error, MemoryError):
                return "there is not enough memory for this; ask for fewer images"
            if not isinstance(error, Failed):  # which the process that computes has printed
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
