"""The one progress bar of `latentdiff fit`: the time of the whole plan, with the newest numbers of what is running."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from latentdiff.errors import printable
from latentdiff.utils import progress_bars

PATIENCE = 3.0  # seconds after which a bar without a plan is shown on a terminal
NUMBERS = 3  # of a run's newest numbers that are shown
FORMAT = "{percentage:3.0f}%|{bar:20}| {desc}"


class PlanBar:
    """A bar on stderr that fills with the time that has passed, not with steps. A context manager.

    Within it every bar of latentdiff (training, encoding, generating, evaluating) is written behind this one, as text. A
    thread refreshes it: each second on a terminal, each half minute in a file.

    Args:
        total_seconds: the whole plan; None while there is none. `phase` can say it later.
        used: seconds that earlier parts of a resumed plan have used, and what has passed before the bar is made.
        enabled: False shows nothing, as on all processes but the first.
    """

    def __init__(self, total_seconds: float | None, used: float = 0.0, enabled: bool = True):
        self.total = None if total_seconds is None else max(1.0, float(total_seconds))
        self.used, self.enabled = float(used), enabled
        self.began = time.monotonic()
        self.interval = 1.0 if sys.stderr.isatty() else 30.0
        self._stack = contextlib.ExitStack()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._refresh_often, name="plan bar", daemon=True)
        self._part: Part | None = None  # what is running
        self._bar: Any = None
        self._guard = threading.Lock()
        self._phase = "starting"

    def __enter__(self) -> PlanBar:
        self._stack.enter_context(progress_bars.shown_by(self._new_part))
        if self.enabled:
            self.refresh()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self.enabled:
            self._thread.join(timeout=5)
        if self._bar is not None:
            self.refresh()
            self._bar.leave = self.total is not None
            with contextlib.suppress(OSError):  # a closed terminal is no reason to lose work
                self._bar.close()
        self._stack.close()

    def phase(self, name: str, total_seconds: float | None = None) -> None:
        """A new phase of the plan begins; what the last one showed is dropped.

        Args:
            name: such as "training the U-Net".
            total_seconds: what the whole plan takes, where that has changed or become known.
        """
        self._phase, self._part = name, None
        if total_seconds is not None:
            self.total = max(1.0, float(total_seconds))
        self.refresh()

    def seconds(self) -> float:
        """Seconds of the plan that are used up."""
        return self.used + time.monotonic() - self.began

    def text(self) -> str:
        """What stands behind the bar: the phase, time used, the whole time, time left, and what is running."""
        used = self.seconds()
        if self.total is None:
            time_words = duration(used)
        else:
            left = f"{duration(self.total - used)} left" if used <= self.total else f"{duration(used - self.total)} over"
            time_words = f"{duration(used)} of {duration(self.total)}, {left}"
        words = [self._phase, time_words]
        part = self._part
        if part is not None and (text := part.text()):
            words.append(text)
        return printable("; ".join(words))

    def refresh(self) -> None:
        """Draw the bar as it is now."""
        with self._guard, contextlib.suppress(OSError, ValueError):
            if self._bar is None and self._begins():
                from tqdm import tqdm

                how = {"dynamic_ncols": True, **progress_bars.drawn(0.1)}
                self._bar = tqdm(**how, total=self.total or 1.0, bar_format=FORMAT, delay=1e-9)
            if self._bar is not None:
                self._bar.total = self.total or 1.0
                self._bar.n = self._shown()
                self._bar.set_description_str(self.text(), refresh=False)
                self._bar.refresh()

    def _begins(self) -> bool:
        """Whether the bar is to be shown now. Before there is a plan a mistake may end it all, and is then a line alone."""
        if not self.enabled:
            return False
        return self.total is not None or (sys.stderr.isatty() and time.monotonic() - self.began > PATIENCE)

    def _shown(self) -> float:
        return 0.0 if self.total is None else min(self.seconds(), self.total)

    def _refresh_often(self) -> None:
        while not self._stop.wait(self.interval):
            self.refresh()

    def _new_part(self, **settings: Any) -> Part:
        part = Part(self, **settings)
        if not part.disabled:
            self._part = part
        return part

    def _ended(self, part: Part) -> None:
        if self._part is part:
            self._part = part.outer


class Part:
    """Stands in the place of a tqdm bar while a `PlanBar` is shown. It draws nothing itself.

    Attributes:
        n: how much is done.
        total: how much there is; None where it is not known.
        outer: the part within which this one runs, as encoding may within a run.
    """

    def __init__(
        self,
        plan: PlanBar,
        total: float | None = None,
        initial: float = 0,
        unit: str = "step",
        desc: str | None = None,
        disable: bool = False,
        **ignored: Any,
    ):
        self.plan, self.total, self.n, self.first, self.unit = plan, total, initial, initial, unit
        self.desc, self.disabled = (desc or "").rstrip(": "), disable
        self.began = time.monotonic()
        self.outer = plan._part
        self.numbers: dict[str, str] = {}

    def text(self) -> str:
        """The part in a few words, such as "step 1200, 3.4 steps/s, loss 0.41" or "encoding, image 300 of 900"."""
        words = [self.desc] if self.desc else []
        # A run is ended by the clock, so its number of steps is only an upper bound
        of = "" if self.total is None or self.unit == "step" else f" of {self.total:.0f}"
        words.append(f"{self.unit} {self.n:.0f}{of}")
        passed = time.monotonic() - self.began
        if self.n > self.first and passed > 1:
            words.append(f"{(self.n - self.first) / passed:.3g} {self.unit}s/s")
        words += [f"{name} {value}" for name, value in list(self.numbers.items())[:NUMBERS]]
        return ", ".join(words)

    def update(self, n: float | None = 1) -> None:
        """So much more is done."""
        self.n += 1 if n is None else n

    def set_postfix(self, ordered_dict: Mapping[str, Any] | None = None, refresh: bool = True, **numbers: Any) -> None:
        """The newest numbers, beside those of other names. A run's loss is shown first."""
        numbers |= dict(ordered_dict or {})
        values = self.numbers | {name: str(value) for name, value in numbers.items()}
        self.numbers = dict(sorted(values.items(), key=lambda item: item[0] not in ("loss", "total", "l1")))

    def refresh(self) -> None:
        """Nothing: the plan's bar refreshes itself."""

    def write(self, text: str, file: Any = None) -> None:
        """Print a line above the plan's bar."""
        from tqdm import tqdm

        tqdm.write(text, file=file)

    def close(self) -> None:
        """The part is done; the plan's bar shows what it showed before."""
        self.plan._ended(self)

    def __enter__(self) -> Part:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def duration(seconds: float) -> str:
    """A time in words that fit a bar: "45 s", "2 min 05 s", "12 min", "1 h 05 min"."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
