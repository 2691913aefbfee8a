"""The server's side of the process that computes: see `jobs.process`."""

from __future__ import annotations

import contextlib
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.web.jobs.job import Job, Update
from latentdiff.web.jobs.process import FAILED, NO_MEMORY, REFUSED, Failure

if TYPE_CHECKING:
    from latentdiff.web.jobs.models import Models

# Nothing is imported from the folder where the command was given but what the server itself would import from there
PROGRAM = "import sys; sys.path[:] = {path!r}; from latentdiff.web.jobs.process import main; main()"
PATIENCE = 5.0  # seconds that the process has to end


class Failed(Exception):
    """A request failed by no mistake of the visitor. The process that computes has printed why."""


class Request:
    """A request that the process was given."""

    def __init__(self, cancel: Callable[[], None]):
        self.cancel = cancel
        self._answers: queue.SimpleQueue[Update | Failure | Exception] = queue.SimpleQueue()

    def answer(self, answer: Update | Failure | Exception) -> None:
        """Put something that `next` gives or raises."""
        self._answers.put(answer)

    def next(self) -> Update:
        """The next update, waited for.

        Raises:
            UserError: a mistake of the visitor, or the process has ended.
            MemoryError: there is too little memory.
            Failed: something else went wrong.
        """
        answer = self._answers.get()
        if isinstance(answer, Update):
            return answer
        if isinstance(answer, Exception):
            raise answer
        raise {REFUSED: UserError, NO_MEMORY: MemoryError, FAILED: Failed}[answer.kind](answer.text)


class Worker:
    """The process that computes, as long as the server has it. One that the system has ended is started again when needed."""

    def __init__(self, setup: Callable[[], Models]):
        """setup: run by the process at its start; it gives what every request is given. Functions must be ones pickle knows."""
        self._setup = pickle.dumps(setup)
        self._guard = threading.Lock()  # of all below
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: dict[int, Request] = {}  # those that have not ended
        self._number = 0
        self._closed = False
        with self._guard:
            self._start()

    @property
    def process_id(self) -> int | None:
        """Of the process; None while there is none."""
        with self._guard:
            return None if self._process is None else self._process.pid

    def start(self, function: Callable[[Models, Job], Any]) -> Request:
        """Have function(models, job) run, after those that were given before. Its updates are the request's."""
        content = pickle.dumps(function)
        with self._guard:
            if self._process is None:
                if self._closed:
                    raise UserError("the server is ending")
                self._start()
            self._number += 1
            number = self._number
            request = self._requests[number] = Request(lambda: self._cancel(number))
            self._send(("run", number, content))
        return request

    def call(self, function: Callable[[Models, Job], Any]) -> Any:
        """What function(models, job) returns, waited for. Raises as `Request.next` does."""
        request = self.start(function)
        while not (update := request.next()).done:
            pass
        return update.result

    def close(self) -> None:
        """End the process."""
        with self._guard:
            self._closed = True
            process = self._process
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _cancel(self, number: int) -> None:
        with self._guard:
            if number in self._requests:
                self._send(("cancel", number))

    def _start(self) -> None:
        """Start the process. The caller holds the guard."""
        program = PROGRAM.format(path=sys.path)
        streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # Out of the terminal's group, so that a Ctrl-C in its first moments prints no traceback
        self._process = subprocess.Popen([sys.executable, "-c", program], start_new_session=True, **streams)
        threading.Thread(target=self._read, args=(self._process,), name="answers", daemon=True).start()
        self._send(self._setup)

    def _send(self, message: Any) -> None:
        """Send a message. Of a process that has ended, `_read` knows. The caller holds the guard."""
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        """In a thread: give answers to their requests until the process ends."""
        assert process.stdout is not None
        while True:
            try:
                number, answer = pickle.load(process.stdout)
            except Exception:  # mostly EOFError. What pickle raises for other bytes is of many kinds
                break
            is_last = isinstance(answer, Failure) or answer.done
            with self._guard:
                request = self._requests.pop(number) if is_last else self._requests[number]
            request.answer(answer)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
        process.kill()  # if it has not ended by itself
        error = UserError(f"the process that computes has ended ({_reason(process.wait())}); ask again, it starts anew")
        with self._guard:
            lost, self._requests = list(self._requests.values()), {}
            self._process = None
        for request in lost:
            request.answer(error)


def _reason(code: int) -> str:
    """Why a process has ended, of its return code."""
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        return f"{name}, often for want of memory" if name == "SIGKILL" else name
    return f"signal {-code}"
