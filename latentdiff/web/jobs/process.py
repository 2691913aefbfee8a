"""The process that computes: it has the models in memory, and runs one request after the other in its main thread.

A server starts it before it does anything else, and both import their libraries at the same time. What visitors ask the server
meanwhile takes no time from a network, and a process that the system ends, for want of memory, leaves the server running.

Within the process one thread computes. torch divides an operation among a team of OpenMP threads, and each thread of Python
that computes has a team of its own. A team waits for the next operation without sleeping, but only while all teams together
have no more threads than there are cores. With a second team an image takes a third longer.

The two processes send each other pickled tuples, through the standard input and output of this one. No one else can write
there, and what libraries print goes elsewhere; what visitors send stays text and bytes.

    to this process    the setup, once: function() -> Models, pickled
                       ("run", number, function(models, job) -> result, pickled), or ("cancel", number)
    to the server      (number, Update) or (number, Failure), the last one of a number has done set, or is a Failure
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from latentdiff.errors import UserError
from latentdiff.utils import collection
from latentdiff.web.jobs.job import Cancelled, Job, Update

if TYPE_CHECKING:
    from latentdiff.web.jobs.models import Models

REFUSED, NO_MEMORY, FAILED = "refused", "no memory", "failed"


@dataclass(frozen=True)
class Failure:
    """Why a request has no result.

    Attributes:
        kind: REFUSED, a mistake of the visitor; NO_MEMORY; or FAILED, whose traceback this process has printed.
        text: the line of a mistake.
    """

    kind: str
    text: str = ""


def failure_of(error: BaseException) -> Failure:
    """What is sent for an error. The traceback of what is no mistake of the visitor is printed to stderr."""
    if isinstance(error, UserError):
        return Failure(REFUSED, str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return Failure(NO_MEMORY)
    traceback.print_exception(error, file=sys.stderr)
    return Failure(FAILED)


class Process:
    """Reads requests from a stream, and writes what becomes of them to another one."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO):
        self._requests, self._answers = requests, answers
        self._waiting: queue.SimpleQueue[tuple[int, bytes]] = queue.SimpleQueue()
        self._jobs: dict[int, Job] = {}  # those that wait, and the one that runs

    def run(self) -> None:
        """Run requests until the server ends, which ends this process."""
        setup = pickle.load(self._requests)
        threading.Thread(target=self._read, name="reading", daemon=True).start()
        models: Models | None = None
        failure = None
        try:
            with collection.paused():
                models = pickle.loads(setup)()
        except BaseException as error:
            failure = failure_of(error)
        while True:
            number, content = self._waiting.get()
            answer = failure or self._result(models, self._jobs[number], content)
            del content, self._jobs[number]
            self._send(number, answer)
            del answer  # nothing of a request stays while the process waits

    def _read(self) -> None:
        """In a thread: put requests into the queue, and cancel them."""
        while True:
            try:
                kind, number, *content = pickle.load(self._requests)
            except Exception:  # the server has ended, in whatever way
                os._exit(0)
            if kind == "cancel":
                job = self._jobs.get(number)
                if job is not None:
                    job.cancel()
            else:
                self._jobs[number] = Job(lambda update, number=number: self._send(number, update))
                self._waiting.put((number, content[0]))

    def _result(self, models: Models | None, job: Job, content: bytes) -> Update | Failure:
        """Run a request: its last update, or its failure."""
        try:
            job.check()
            return Update(done=True, result=pickle.loads(content)(models, job))
        except Cancelled:
            return Update(done=True, stopped=True)
        except BaseException as error:
            return failure_of(error)

    def _send(self, number: int, answer: Update | Failure) -> None:
        try:  # all of it or nothing
            content = pickle.dumps((number, answer))
        except Exception as error:
            content = pickle.dumps((number, failure_of(error)))
        try:
            self._answers.write(content)
            self._answers.flush()
        except OSError:  # the server has ended
            os._exit(0)


def main() -> None:
    """Compute for the server that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, whose end is the end of this process too
    requests, answers = (os.fdopen(os.dup(number), mode) for number, mode in ((0, "rb"), (1, "wb")))
    # What libraries print, or read, is not to get among the messages
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    Process(requests, answers).run()
