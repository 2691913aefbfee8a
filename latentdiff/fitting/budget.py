"""The time that a fit may take: a clock that counts all its parts, also those that were killed, and its shares for the phases.

The seconds used lie in clock.json, which a thread writes again every few seconds. So a kill loses at most these seconds.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.utils import atomic

FILE = "clock.json"
REFRESH = 3.0  # seconds between two writings of the clock
LEAST_HOURS = 0.03  # below, starting up and measuring leave no time to train
LEAST_SHARE = 1.0  # seconds that a phase gets in any case


class Budget:
    """A clock of the seconds that a fit has used, over all its parts. As a context it keeps the file up to date.

    Args:
        folder: the fit's folder. Its clock.json holds what earlier parts used.
        hours: what the whole fit may take.
        age: seconds that this part had already run when the clock was made.
        write: whether this process writes the file.
        clock: gives seconds; only differences count.
    """

    def __init__(
        self,
        folder: Path,
        hours: float,
        age: float = 0.0,
        write: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.file, self.hours = folder / FILE, hours
        self.before, self.parts = read_clock(folder)
        self._clock, self._start = clock, clock() - age
        self._writes, self._stop, self._guard = write, threading.Event(), threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def used(self) -> float:
        """Seconds that all parts have used up to now."""
        return self.before + self._clock() - self._start

    @property
    def left(self) -> float:
        """Seconds that are left; negative after the end."""
        return self.hours * 3600 - self.used

    def share(self, phase: str, needs: Mapping[str, float], order: Sequence[str]) -> float:
        """Seconds that a phase may take from now on.

        It is what is left, less what the phases after it need. Where the plan was overrun, it is at least the phase's
        proportional part of what is left, so that each phase shrinks and none is starved.

        Args:
            phase: which one begins.
            needs: planned seconds of each phase.
            order: the phases that are not done, in order.
        """
        own = max(needs.get(phase, 0.0), LEAST_SHARE)
        later = sum(needs.get(name, 0.0) for name in order[list(order).index(phase) + 1 :])
        left = max(self.left, 0.0)
        return max(left - later, left * own / (own + later), LEAST_SHARE)

    def write(self) -> None:
        """Write clock.json: {"seconds", "parts", "hours", "time"}.

        hours: None while there is no plan that says them. time: of this writing, in seconds since 1970.
        """
        hours = self.hours if math.isfinite(self.hours) else None
        with self._guard:
            if not self._writes:
                return
            content = {"seconds": round(self.used, 2), "parts": self.parts + 1, "hours": hours, "time": time.time()}
            atomic.write_json(self.file, content)

    def discard(self) -> None:
        """Remove the file and write none any more: the fit was refused."""
        with self._guard:
            self._writes = False
            self.file.unlink(missing_ok=True)

    def __enter__(self) -> Budget:
        self.write()
        if self._writes:
            self._thread = threading.Thread(target=self._refresh, name="latentdiff fit's clock", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(UserError):  # a full disk has its own message, which ended the block
            self.write()

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH):
            with contextlib.suppress(UserError):  # a full disk: training says so when it saves
                self.write()


def read_clock(folder: Path) -> tuple[float, int]:
    """(seconds used, parts) of the clock in a fit's folder; (0, 0) where there is none that can be read."""
    try:
        content: Any = json.loads((folder / FILE).read_text(encoding="utf-8"))
        seconds, parts = float(content["seconds"]), int(content["parts"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return 0.0, 0
    return (max(0.0, seconds), parts) if math.isfinite(seconds) else (0.0, parts)


def process_age() -> float:
    """Seconds since this process was started, importing included."""
    import psutil

    return max(0.0, time.time() - psutil.Process(os.getpid()).create_time())


def check_hours(hours: float) -> None:
    """UserError for hours that are no budget."""
    if not math.isfinite(hours) or hours < LEAST_HOURS:
        raise UserError(f"--hours {hours:g}: give at least {LEAST_HOURS:g}, which is {LEAST_HOURS * 60:.0f} minutes")


def in_words(seconds: float) -> str:
    """A duration for people: "40 s", "12 min", "3.5 h"."""
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
