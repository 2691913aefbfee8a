"""The clock of a run: what it has used of train.minutes, over all its parts, and what is due by the clock.

Only the main process reads a clock. `RunClock.due` is what it says about the next step, and `trainer.agree` gives that to the
other processes, so that all of them take the same step at the same learning rate, and end together.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from latentdiff.config import LoopConfig

RECENT = 8  # steps whose median is what the next one is expected to take


class Due(NamedTuple):
    """What the clock says about the next step. Numbers only: the processes share it as a tensor.

    Attributes:
        share: of the time for training steps, what is used when the step begins, 0 to 1; always 0 without train.minutes.
        last: the time suffices for no step after this one.
        over: the time was used up before this part of the run began, so no step is taken.
        picture: train.picture_minutes have passed, so a picture is drawn after the step.
        snapshot: train.snapshot_minutes have passed, so averaged weights are kept after the step.
    """

    share: float = 0.0
    last: bool = False
    over: bool = False
    picture: bool = False
    snapshot: bool = False


class RunClock:
    """How long a run has taken, and what is due by the clock. Its times are part of the training state.

    The time for training steps is train.minutes without what comes before the loop, and without what follows the last step:
    pictures, the last state and the published weights, by what they have taken so far in this run.

    Attributes:
        limit: seconds that the run may take; None: no limit.
        began: when this part of the run began, by `now`. Set it where that was before the clock was made.
    """

    def __init__(self, train: LoopConfig):
        self.minutes = train.minutes
        self.limit = None if train.minutes is None else 60.0 * train.minutes
        self.picture = Interval(train.picture_minutes)
        self.snapshot = Interval(train.snapshot_minutes)
        self.active = self.limit is not None or self.picture.seconds is not None or self.snapshot.seconds is not None
        self.began = now()
        self._before = self._loop_before = 0.0  # seconds of the run's earlier parts: in all, and in their loops
        self._entered: float | None = None  # when the loop began
        self._step_seconds: deque[float] = deque(maxlen=RECENT)
        self._longest = {"after": 0.0, "save": 0.0}  # seconds that what follows a step, and a training state, took at most
        self._ended: float | None = None  # train.minutes of an earlier part that ended by the clock

    def seconds(self) -> float:
        """Seconds that the run has used, over all its parts."""
        return self._before + now() - self.began

    def loop_seconds(self) -> float:
        """Seconds that the run has spent in the loop over training steps, over all its parts."""
        return self._loop_before + (0.0 if self._entered is None else now() - self._entered)

    def left(self) -> float:
        """Seconds that are left for training steps; infinite without train.minutes. It may be negative."""
        if self.limit is None:
            return math.inf
        # The published weights are a part of a state, and take no longer to write than one
        return self.limit - self.seconds() - self._longest["after"] - 2 * self._longest["save"]

    def enter_loop(self) -> None:
        """The loop over training steps begins."""
        self._entered = now()
        for interval in (self.picture, self.snapshot):
            interval.reset(self.loop_seconds())

    def due(self, step: int, saves: bool = False) -> Due:
        """What is due with the step of this number, which comes next. What is due at intervals is due once.

        saves: whether a training state is saved before that step.
        """
        left = self.left() - (self._longest["save"] if saves else 0.0)
        spent, expected = self.loop_seconds(), statistics.median(self._step_seconds or [0.0])
        # This goes by the clock alone: where a machine becomes slower, fewer steps are left, and as much time
        share = 1.0 if left <= 0.0 else spent / (spent + left)
        # A step begins while the time suffices for it, and the last one is known beforehand. A new run takes one at least
        ended = self._ended is not None and self.minutes is not None and self.minutes <= self._ended
        over = step > 0 and (left <= 0.0 or ended) and not self._step_seconds
        # Where the run ends before another picture would be drawn, the one at its end has to do
        picture = self.picture.due(spent) and left > self._longest["after"] + 2 * expected
        return Due(share, left < 2 * expected or left <= 0.0, over, picture, self.snapshot.due(spent))

    @contextlib.contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Note how long the block takes. what: "step", "after" (what follows a step) or "save" (a training state)."""
        start = now()
        yield
        if what == "step":
            self._step_seconds.append(now() - start)
        else:
            self._longest[what] = max(self._longest[what], now() - start)

    # The training state

    def state(self, last: bool) -> dict[str, Any]:
        """What a training state keeps of the clock, as JSON values. last: the run ended by the clock."""
        times = {"seconds": round(self.seconds(), 3), "loop_seconds": round(self.loop_seconds(), 3)}
        return {**times, "longest": dict(self._longest), "ended": self.minutes if last else None}

    def restore(self, times: Mapping[str, Any]) -> None:
        """Go on from what `state` gave; {} of versions that kept no times. In the loop (after a roll-back) time goes on."""
        if self._entered is not None or not times:
            return
        self._before, self._loop_before = float(times["seconds"]), float(times["loop_seconds"])
        self._longest = {name: float(times["longest"][name]) for name in self._longest}
        self._ended = times["ended"]


class Interval:
    """Tells when another `minutes` of the loop's time have passed; None: never."""

    def __init__(self, minutes: float | None):
        self.seconds = None if minutes is None else 60.0 * minutes
        self._count = 0

    def reset(self, spent: float) -> None:
        """The intervals that are over after `spent` seconds do not count any more."""
        self._count = 0 if self.seconds is None else int(spent // self.seconds)

    def due(self, spent: float) -> bool:
        """Whether another interval is over after `spent` seconds; each of them once."""
        before = self._count
        self.reset(spent)
        return self._count > before


def now() -> float:
    """Seconds of a clock that never goes back."""
    return time.monotonic()
