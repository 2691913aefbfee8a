"""What a run logs: a progress bar on stderr, metrics.jsonl, and trackers such as TensorBoard; and running means."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import UserError, printable
from latentdiff.training.run_clock import RunClock
from latentdiff.utils import atomic, progress_bars

Values = Mapping[str, Tensor | tuple[Tensor, int]]  # name -> a mean, or (a mean, how many samples it is of)


class Averages:
    """Means of named scalars over steps and processes. Each process keeps its own sums until they are taken.

    They are part of the training state, so a resumed run logs what an unbroken one would.
    """

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # name -> float64 [2]: sum and count

    def add(self, values: Values) -> None:
        """Add one step's values. The names are the same on every process."""
        for name, value in values.items():
            mean, count = value if isinstance(value, tuple) else (value, 1)
            number = mean.detach().float().cpu().double()
            total = torch.stack([number * count if count else torch.zeros((), dtype=torch.float64), torch.tensor(float(count))])
            self.totals[name] = self.totals.get(name, torch.zeros(2, dtype=torch.float64)) + total

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes since the last call. A name without samples is left out. Every process calls it."""
        names = sorted(self.totals)
        gathered = self._gathered(accelerator)  # [processes, K, 2]
        self.totals = {}
        sums = gathered.sum(0)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def state(self, accelerator: Any) -> dict[str, Tensor]:
        """{name: float64 [processes, 2]}, sum and count of each process, for a training state. Every process calls it."""
        gathered = self._gathered(accelerator)
        return {name: gathered[:, k] for k, name in enumerate(sorted(self.totals))}

    def restore(self, tensors: Mapping[str, Tensor], accelerator: Any) -> None:
        """Continue from what `state` gave. On another number of processes the first one takes the sum of them all."""
        self.totals = {}
        for name, rows in tensors.items():
            if len(rows) == accelerator.num_processes:
                self.totals[name] = rows[accelerator.process_index].clone()
            else:
                self.totals[name] = rows.sum(0) if accelerator.process_index == 0 else torch.zeros(2, dtype=torch.float64)

    def _gathered(self, accelerator: Any) -> Tensor:
        if not self.totals:  # the same on every process; some backends cannot gather nothing
            return torch.zeros(accelerator.num_processes, 0, 2, dtype=torch.float64)
        own = torch.stack([self.totals[name] for name in sorted(self.totals)])[None]
        if accelerator.num_processes == 1:
            return own
        return accelerator.gather(own.to(accelerator.device)).cpu()


def check_trackers(names: Sequence[str]) -> None:
    """UserError where a name is none of accelerate's trackers, or the package behind it is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    built_in = {kind.value for kind in LoggerType}
    registered = {name for name in LOGGER_TYPE_TO_CLASS if name not in built_in}  # by accelerate's register_tracker_class
    usable = sorted({kind.value for kind in get_available_trackers()} | registered)
    for name in names:
        if name not in usable:
            problem = "is not installed" if name in LOGGER_TYPE_TO_CLASS else "is unknown"
            raise UserError(f"train.trackers: {name} {problem}; installed here: {', '.join(usable)}")


class RunLogger:
    """Logs of a run: a bar on stderr with rate and time left, metrics.jsonl, and the trackers of train.trackers.

    A context manager: a run that ends in an error leaves its files flushed and the bar's line finished. Every process may
    have one; all but the main process's do nothing.

    Args:
        output: the run's folder. TensorBoard's files go to <output>/logs.
        steps: how many steps the run has.
        start: the step it continues from. Whatever was logged after it is forgotten, since it is logged again.
        accelerator: keeps the trackers; an accelerate.Accelerator.
        trackers: names that `check_trackers` accepts.
        clock: the run's. Where that limits the run, the bar shows its time instead of its steps; None: no limit.
    """

    def __init__(
        self,
        output: Path,
        steps: int,
        start: int,
        accelerator: Any,
        trackers: Sequence[str] = ("tensorboard",),
        clock: RunClock | None = None,
    ):
        self.enabled = accelerator.is_main_process
        if not self.enabled:
            return
        self.output, self.accelerator = output, accelerator
        self.path = output / "metrics.jsonl"
        self.tracker_folder = output / "logs"
        # A run that was killed before its first state left logs too, although it starts again from step 0
        rewrites = start > 0 or self.tracker_folder.is_dir()
        forget_lines(self.path, start)
        forget_lines(output / "skipped.jsonl", start - 1)  # its steps count from 0
        self.lines = self.path.open("a", encoding="utf-8")
        accelerator.log_with = [self._tracker(name, start if rewrites else None) for name in trackers]
        accelerator.init_trackers("latentdiff")
        self.bar: Any
        if clock is not None and clock.limit is not None and progress_bars.alone():
            self.bar = TimeBar(clock, start)
        else:
            self.bar = progress_bars.bar(total=steps, initial=start, unit="step")

    def _tracker(self, name: str, start: int | None) -> Any:
        """accelerate's tracker of this name. start: the step whose successors TensorBoard shall forget."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        cls = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":
            return cls("logs", self.output, purge_step=None if start is None else start + 1)
        arguments = (self.tracker_folder,) if cls.requires_logging_directory else ()
        return cls("latentdiff", *arguments)

    def advance(self) -> None:
        """One more step is done."""
        if self.enabled:
            self.bar.update(1)

    def move_to(self, step: int) -> None:
        """Go back to an earlier step: whatever was logged after it is forgotten, in metrics.jsonl and in TensorBoard.

        Other trackers keep what they have; some of them then ignore steps that they have seen.
        """
        if not self.enabled:
            return
        self.lines.close()
        forget_lines(self.path, step)
        self.lines = self.path.open("a", encoding="utf-8")
        for k, tracker in enumerate(self.accelerator.trackers):
            if tracker.name == "tensorboard":
                tracker.finish()
                self.accelerator.trackers[k] = self._tracker("tensorboard", step)
                self.accelerator.trackers[k].start()
        self.bar.n = step
        self.bar.refresh()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars after `step` steps; those under train/ are shown beside the bar too."""
        if not self.enabled:
            return
        with atomic.naming(self.path):
            self.lines.write(json.dumps({"step": step, **{k: round(float(v), 7) for k, v in values.items()}}) + "\n")
            self.lines.flush()
        with atomic.naming(self.tracker_folder):
            self.accelerator.log({name: float(value) for name, value in values.items()}, step=step)
        shown = {k.rsplit("/", 1)[-1]: f"{v:.4g}" for k, v in values.items() if k.startswith("train/")}
        self.bar.set_postfix(shown, refresh=False)

    def picture(self, step: int, name: str, path: Path) -> None:
        """Give the picture in a file to those trackers that take pictures."""
        if not self.enabled:
            return
        takers = [tracker for tracker in self.accelerator.trackers if hasattr(tracker, "log_images")]
        if not takers:
            return
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # uint8 [H, W, 3]
        with atomic.naming(self.tracker_folder):
            for tracker in takers:
                # Each tracker has its own form: TensorBoard a batch, Aim and ClearML one picture, the others a list
                if tracker.name == "tensorboard":
                    tracker.log_images({name: pixels[None]}, step=step, dataformats="NHWC")
                elif tracker.name in ("aim", "clearml"):
                    tracker.log_images({name: pixels}, step=step)
                else:
                    tracker.log_images({name: [pixels]}, step=step)

    def print(self, text: str) -> None:
        """Print a line on stderr, above the bar."""
        if self.enabled:
            with contextlib.suppress(OSError):  # a closed terminal is no reason to lose work
                self.bar.write(printable(text), file=sys.stderr)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *error: object) -> None:
        if not self.enabled:
            return
        for close in (self.bar.close, *(tracker.finish for tracker in self.accelerator.trackers), self.lines.close):
            with contextlib.suppress(OSError):  # an error in writing was raised where it was written
                close()
        self.accelerator.trackers.clear()  # accelerate would finish them once more at the end


class TimeBar:
    """A bar over the seconds of a run that ends by the clock. As other bars it is told of steps.

    Args:
        clock: the run's, with a limit.
        step: the step that the run continues from.
    """

    def __init__(self, clock: RunClock, step: int):
        assert clock.limit is not None
        self.clock, self.limit, self.n = clock, clock.limit, step
        shape, used = "{percentage:3.0f}%|{bar}| {desc}{postfix}", min(clock.seconds(), clock.limit)
        self.bar = progress_bars.bar(total=clock.limit, initial=used, desc=self._text(used), bar_format=shape)
        self.set_postfix, self.write, self.close = self.bar.set_postfix, self.bar.write, self.bar.close

    def update(self, n: float = 1) -> None:
        """n more steps are done."""
        self.n += int(n)
        used = min(self.clock.seconds(), self.limit)
        self.bar.set_description_str(self._text(used), refresh=False)
        self.bar.update(used - self.bar.n)

    def refresh(self) -> None:
        """Draw the bar again, with the step that `n` was set to."""
        self.bar.set_description_str(self._text(self.bar.n))

    def _text(self, used: float) -> str:
        """What stands behind the bar after so many seconds."""
        from tqdm import tqdm

        return f"step {self.n}, {tqdm.format_interval(self.limit - used)} left"


def forget_lines(path: Path, after: int) -> None:
    """Drop the lines of a JSON-lines file whose step is beyond `after`, and one that a killed process left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if json.loads(line)["step"] <= after:
                kept.append(line.decode() + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    atomic.write_text(path, "".join(kept))
