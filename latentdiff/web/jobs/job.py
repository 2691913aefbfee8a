"""One running request, as what computes it sees it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
        return f"Step {self.step} of {self.steps}" if self.steps else "Working …"


class Job:
    """One running request. It can be cancelled from any thread."""

    def __init__(self, send: Callable[[Update], None] = lambda update: None):
        """send: is given each update; by default nobody hears of them."""
        self._send = send
        self._cancelled = threading.Event()

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
        self._send(Update(step=step, steps=steps, shown=shown))
