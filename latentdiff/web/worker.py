"""The one thread of a server that computes.

torch divides an operation among a team of OpenMP threads, and each thread of Python that computes has a team of its own. A team
waits for the next operation without sleeping, but only while all teams together have no more threads than there are cores. With
a second team an image takes a third longer. So models are loaded and used by one thread alone.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

Result = TypeVar("Result")


class Worker:
    """A thread that runs functions one after the other. It begins with the first one, and ends with the process."""

    def __init__(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, function: Callable[[], Result]) -> Future[Result]:
        """Have the thread run a function, after those that it was given before. The result, or the error, is in the future."""
        future: Future[Result] = Future()
        self._tasks.put((function, future))
        with self._guard:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="computing", daemon=True)
                self._thread.start()
        return future

    def call(self, function: Callable[[], Result]) -> Result:
        """The function's result: run by the thread and waited for, or at once where the caller is the thread itself."""
        if threading.current_thread() is self._thread:
            return function()
        return self.start(function).result()

    def _work(self) -> None:
        while True:
            function, future = self._tasks.get()
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del function, future  # nothing of a request stays while the thread waits


WORKER = Worker()  # of this process, whatever servers it has
