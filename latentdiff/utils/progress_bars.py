"""Progress bars on stderr. Within a larger job that shows one bar for everything, they become parts of that bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

_larger_job: ContextVar[Callable[..., Any] | None] = ContextVar("larger_job", default=None)


def bar(**settings: Any) -> Any:
    """A tqdm bar on stderr; or, within `shown_by`, what the larger job gives in its place.

    Where stderr is no terminal but a file or a pipe, it is a line of its own every 30 s.

    Args:
        settings: of tqdm: total, initial, unit, desc, delay, disable.

    Returns:
        An object with tqdm's update, set_postfix, refresh, write, close, n and total. It is a context manager.
    """
    make = _larger_job.get()
    if make is not None:
        return make(**settings)
    from tqdm import tqdm

    return tqdm(**{**drawn(), **settings})


def drawn(mininterval: float = 1.0) -> dict[str, Any]:
    """The settings of tqdm for a bar on a terminal, or for plain lines where stderr is a file or a pipe.

    mininterval: seconds between two drawings on a terminal.
    """
    if sys.stderr.isatty():
        return {"mininterval": mininterval}
    return {"mininterval": 30.0, "ncols": 0, "file": _Lines()}


class _Lines:
    """Turns what tqdm writes to a terminal into lines on stderr, without carriage returns and without repeats."""

    def __init__(self) -> None:
        self.last = ""

    def write(self, text: str) -> int:
        line = text.strip("\r\n").rstrip()
        if line.strip() and line != self.last:
            sys.stderr.write(line + "\n")
            self.last = line
        return len(text)

    def flush(self) -> None:
        sys.stderr.flush()


def print_line(text: str) -> None:
    """Print a line on stderr; within `shown_by` above the larger job's bar.

    It is for lines before the caller's own bar is drawn: tqdm would draw that at once, although it waits for its delay.
    """
    if alone():
        print(text, file=sys.stderr, flush=True)
        return
    from tqdm import tqdm

    tqdm.write(text, file=sys.stderr)


def alone() -> bool:
    """Whether bars are drawn by themselves: the caller is not within `shown_by`."""
    return _larger_job.get() is None


@contextlib.contextmanager
def shown_by(make: Callable[..., Any]) -> Iterator[None]:
    """Within the block `bar(**settings)` returns make(**settings). Threads that the block starts do not take part."""
    token = _larger_job.set(make)
    try:
        yield
    finally:
        _larger_job.reset(token)
