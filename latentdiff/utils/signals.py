"""How a command ends when it is asked to: Ctrl-C, a closed terminal (SIGHUP), and what schedulers send (SIGTERM, SIGUSR1).

`watched` is the frame of a job. Within it a signal ends the job at once by an exception, as Ctrl-C does, unless the job is
in a block of `Watch.deferred`: there the signal is noted, and the job saves its work and calls `Watch.stop`. Either way one
line on stderr says how to go on, and the exit status is 130 for Ctrl-C and 75 for the others. A second signal ends the
process.
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
# Seconds in which a second signal is taken for a copy of the first: a launcher and a scheduler may each send one, and a
# terminal sends SIGINT to a launcher and its processes alike. A person who presses Ctrl-C twice is slower than AGAIN.
GRACE, AGAIN = 2.0, 0.5

typed: list[str] | None = None  # the arguments of the command line that runs; None under the Python API
_active: Watch | None = None


class Stopped(SystemExit):
    """SIGHUP, SIGTERM or SIGUSR1 ended the job; what was done is on disk. As an exit status: 75."""

    def __init__(self) -> None:
        super().__init__(STOPPED)
        self.said = False


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the job; what was done is on disk. The command line exits with 130."""

    said = False


class Watch:
    """The signals that came. `seen`: their numbers, the first one first; empty while there is none."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.depth = 0
        self._first = 0.0

    def __bool__(self) -> bool:
        return bool(self.seen)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[Watch]:
        """Within the block a signal is only noted: look at the watch between steps, save, and call `stop`.

        Where one came that the block did not act on, leaving the block ends the job.
        """
        self.depth += 1
        try:
            yield self
        finally:
            self.depth -= 1
        if self.seen and self.depth == 0:
            self.stop()

    def stop(self, number: int | None = None) -> NoReturn:
        """Raise `Interrupted` or `Stopped`, as the first signal asks, or `number`, on which several processes agreed."""
        raise ending(number if number is not None or not self.seen else self.seen[0])

    def name(self) -> str:
        return name_of(self.seen[0] if self.seen else None)

    def note(self, number: int, frame: object) -> None:
        """The handler of all signals."""
        if self.seen:
            alike = number == self.seen[0] == signal.SIGINT
            if time.monotonic() - self._first > (AGAIN if alike else GRACE):
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self.seen.append(number)
            return
        self._first = time.monotonic()
        self.seen.append(number)
        if self.depth == 0:
            self.stop()
        if processes.rank() == 0:
            with contextlib.suppress(OSError):  # the terminal may be closed. Not print: it may be printing just now
                os.write(2, f"\nlatentdiff: {self.name()}: stopping after this step; once more ends at once\n".encode())


def ending(number: int | None) -> Stopped | Interrupted:
    """The exception by which a job ends after a signal; None: one that another process got, other than Ctrl-C."""
    return Interrupted() if number == signal.SIGINT else Stopped()


def name_of(number: int | None) -> str:
    if number is None:
        return "a signal to another process"
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


@contextlib.contextmanager
def watched(goes_on: Callable[[], str] | None = None) -> Iterator[Watch]:
    """The frame of a job: signals end it as the module says. Frames may be nested; they share one watch.

    goes_on: what a user does to go on, for the line that is printed where a signal ends the block; see `command`.

    Handlers belong to the main thread, so in another thread the block is run as it is. A signal that is ignored from
    outside stays ignored (`nohup`, and Ctrl-C for a job in the background).
    """
    global _active
    outer = _active
    if outer is not None or threading.current_thread() is not threading.main_thread():
        watch, before = outer if outer is not None and threading.current_thread() is threading.main_thread() else Watch(), {}
    else:
        watch = _active = Watch()
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, watch.note)
    try:
        yield watch
    except (Stopped, Interrupted) as end:
        if not end.said and goes_on is not None:
            say_end(watch, end, goes_on())
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if before:
            _active = None


def say_end(watch: Watch, end: Stopped | Interrupted, text: str = "") -> None:
    """The one line, on the main process, that says by what a job was ended and how to go on. Once for each ending."""
    end.said = True
    if processes.rank() == 0:
        with contextlib.suppress(OSError, ValueError):
            by = name_of(signal.SIGINT) if isinstance(end, Interrupted) else watch.name()
            print(f"latentdiff: stopped by {by}{'; ' if text else ''}{text}", file=sys.stderr, flush=True)


def command(more: Sequence[str] = (), python: str = "", without: Sequence[str] = ()) -> str:
    """The command line that is running, quoted for a shell, with `more` arguments and `without` others.

    python: what stands for it under the Python API.
    """
    if typed is None:
        return python
    kept = [argument for argument in typed if argument not in without]
    line = shlex.join([*kept, *(argument for argument in more if argument not in kept)])
    if processes.count() == 1:
        return f"latentdiff {line}"
    return f"accelerate launch OPTIONS -m latentdiff {line} (OPTIONS of the launcher as before)"


def again() -> str:
    """For jobs that are simply run again: the same command."""
    line = command()
    return f"run it again: {line}" if line else ""
