"""How a command ends after a signal: Ctrl-C, a closed terminal (SIGHUP), and what schedulers send (SIGTERM, SIGUSR1).

A job runs within `watched`. There a signal ends the job at once by an exception, as Ctrl-C does in Python, except in a block
of `Watch.deferred`: there the signal is only noted, and the job saves its work and calls `Watch.stop`. In both cases one line
on stderr says how to go on, and the exit status is 130 for Ctrl-C and 75 for the others. A second signal ends the process.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from latentdiff.utils import processes

STOPPED = 75  # exit status after SIGHUP, SIGTERM and SIGUSR1: EX_TEMPFAIL, "try again"
INTERRUPTED = 130  # exit status after Ctrl-C
SIGNALS = ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1")
# A signal may come twice: a launcher and a scheduler may each send one, and a terminal sends SIGINT to a launcher and to its
# processes. For so many seconds a second signal counts as a copy of the first. A person who presses Ctrl-C twice is slower
# than COPY_OF_CTRL_C.
COPY = 2.0
COPY_OF_CTRL_C = 0.5

command_line: list[str] | None = None  # the arguments of the running command line; None under the Python API
_active: Watch | None = None


class Stopped(SystemExit):
    """SIGHUP, SIGTERM or SIGUSR1 ended the job, and what was done is on disk. The exit status is 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)
        self.reported = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the job, and what was done is on disk. The exit status is 130."""

    reported = False


class Watch:
    """The signals that a job has received; false while there is none.

    received: their numbers, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._deferring = 0
        self._first = 0.0

    def __bool__(self) -> bool:
        return bool(self.received)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[Watch]:
        """Within the block a signal is only noted: test the watch between steps, save, and call `stop`.

        If a signal came and the block did not call `stop`, the end of the block does.
        """
        self._deferring += 1
        try:
            yield self
        finally:
            self._deferring -= 1
        if self.received and not self._deferring:
            self.stop()

    def stop(self, number: int | None = None) -> NoReturn:
        """Raise `Interrupted` or `Stopped`, by the first signal received, or by `number`, on which processes agreed."""
        if number is None and self.received:
            number = self.received[0]
        raise Interrupted() if number == signal.SIGINT else Stopped()

    def name(self) -> str:
        """The first signal in words."""
        if not self.received:
            return "a signal to another process"
        return "Ctrl-C" if self.received[0] == signal.SIGINT else signal.Signals(self.received[0]).name

    def note(self, number: int, frame: object) -> None:
        """The handler of all signals."""
        self.received.append(number)
        if len(self.received) > 1:
            is_ctrl_c = number == self.received[0] == signal.SIGINT
            if time.monotonic() - self._first > (COPY_OF_CTRL_C if is_ctrl_c else COPY):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self._first = time.monotonic()
        if not self._deferring:
            self.stop()
        if processes.rank() == 0:
            # Not print, which may be running just now. The terminal may be closed
            with contextlib.suppress(OSError):
                os.write(2, f"\nlatentdiff: {self.name()}: stopping after this step; once more ends at once\n".encode())


@contextlib.contextmanager
def watched(goes_on: Callable[[], str] | None = None) -> Iterator[Watch]:
    """The frame of a job, within which signals end it as this module says. Nested frames share one watch.

    goes_on: gives the text that tells the user how to go on. It is printed where a signal ends the block; see `command`.

    Python runs signal handlers in the main thread only, so in another thread the block runs as it is. A signal that is
    ignored when the block starts stays ignored (`nohup`, and Ctrl-C for a job in the background).
    """
    global _active
    in_main_thread = threading.current_thread() is threading.main_thread()
    is_outermost = in_main_thread and _active is None
    watch = _active if in_main_thread and _active is not None else Watch()
    previous = {}
    if is_outermost:
        _active = watch
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        previous = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        for number in previous:
            signal.signal(number, watch.note)
    try:
        yield watch
    except (Stopped, Interrupted) as end:
        if not end.reported and goes_on is not None:
            end.reported = True
            _report(watch, end, goes_on())
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if is_outermost:
            _active = None


def _report(watch: Watch, end: Stopped | Interrupted, advice: str) -> None:
    """Print, on process 0, which signal ended the job and how to go on."""
    if processes.rank() == 0:
        by = "Ctrl-C" if isinstance(end, Interrupted) else watch.name()
        with contextlib.suppress(OSError, ValueError):
            print(f"latentdiff: stopped by {by}{'; ' if advice else ''}{advice}", file=sys.stderr, flush=True)


def command(more: Sequence[str] = (), python: str = "", without: Sequence[str] = ()) -> str:
    """The running command line, quoted for a shell, with the arguments `more` and without the arguments `without`.

    python: the result under the Python API, where there is no command line.
    """
    if command_line is None:
        return python
    kept = [argument for argument in command_line if argument not in without]
    line = shlex.join([*kept, *(argument for argument in more if argument not in kept)])
    if processes.count() == 1:
        return f"latentdiff {line}"
    return f"accelerate launch OPTIONS -m latentdiff {line} (OPTIONS of the launcher as before)"


def again() -> str:
    """How to go on with a job that is simply run again: the same command."""
    line = command()
    return f"run it again: {line}" if line else ""
