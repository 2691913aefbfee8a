"""What a run logs: a progress bar on stderr, metrics.jsonl and TensorBoard; running means; the clock that says when to save."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import printable
from latentdiff.utils import atomic

Values = Mapping[str, Tensor | tuple[Tensor, int]]


class Averages:
    """Sums and counts of named scalars since they were last taken; each process has its own until then."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # name -> float64 [2]: sum and count

    def add(self, values: Values) -> None:
        """A mean by name, or (mean, number of samples it is of). The names are the same on every process."""
        for name, value in values.items():
            mean, count = value if isinstance(value, tuple) else (value, 1)
            number = mean.detach().float().cpu().double()
            total = torch.stack([number * count if count else torch.zeros((), dtype=torch.float64), torch.tensor(float(count))])
            self.totals[name] = self.totals.get(name, torch.zeros(2, dtype=torch.float64)) + total

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes since the last call; a name without samples is left out. Every process calls it."""
        names = sorted(self.totals)
        gathered = self._gathered(accelerator)  # [processes, K, 2]
        self.totals = {}
        sums = gathered.sum(0)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def state(self, accelerator: Any) -> dict[str, Tensor]:
        """{name: float64 [processes, 2]}, for a training state. Every process calls it."""
        gathered = self._gathered(accelerator)
        return {name: gathered[:, k] for k, name in enumerate(sorted(self.totals))}

    def restore(self, tensors: Mapping[str, Tensor], accelerator: Any) -> None:
        """Take up what `state` gave; on another number of processes the first goes on with the sum of them all."""
        self.totals = {}
        for name, rows in tensors.items():
            if len(rows) == accelerator.num_processes:
                self.totals[name] = rows[accelerator.process_index].clone()
            else:
                self.totals[name] = rows.sum(0) if accelerator.process_index == 0 else torch.zeros(2, dtype=torch.float64)

    def _gathered(self, accelerator: Any) -> Tensor:
        if not self.totals:  # alike on every process; some backends cannot gather nothing
            return torch.zeros(accelerator.num_processes, 0, 2, dtype=torch.float64)
        own = torch.stack([self.totals[name] for name in sorted(self.totals)])[None]
        if accelerator.num_processes == 1:
            return own
        return accelerator.gather(own.to(accelerator.device)).cpu()


class RunLogger:
    """Logs of a run, on the main process: a progress bar with rate and time left on stderr, TensorBoard, metrics.jsonl.

    A context manager, so that a run that ends in an error leaves its files flushed and the bar's line finished.
    """

    def __init__(self, output: Path, steps: int, start: int, enabled: bool):
        self.enabled = enabled
        if not enabled:
            return
        from tqdm import tqdm

        # What was logged after the state that a run goes on from is logged again
        self.logs = output / "logs"
        self.writer = self._writer(start)
        self.path = output / "metrics.jsonl"
        forget_lines(self.path, start)
        forget_lines(output / "skipped.jsonl", start - 1)  # its steps count from 0
        self.lines = self.path.open("a", encoding="utf-8")
        # Written to a file the bar is refreshed rarely, so that a log stays readable
        self.bar = tqdm(total=steps, initial=start, unit="step", mininterval=1.0 if sys.stderr.isatty() else 30.0)

    def _writer(self, start: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # A run that was killed before its first state left curves that begin alike
        again = start > 0 or self.logs.is_dir()
        return SummaryWriter(str(self.logs), purge_step=start + 1 if again else None)

    def advance(self) -> None:
        if self.enabled:
            self.bar.update(1)

    def move_to(self, step: int) -> None:
        """Back to an earlier step: what was logged since is forgotten."""
        if self.enabled:
            self.lines.close()
            forget_lines(self.path, step)
            self.lines = self.path.open("a", encoding="utf-8")
            self.writer.close()
            self.writer = self._writer(step)
            self.bar.n = step
            self.bar.refresh()

    def log(self, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        with atomic.naming(self.path):
            self.lines.write(json.dumps({"step": step, **{k: round(float(v), 7) for k, v in values.items()}}) + "\n")
            self.lines.flush()
        with atomic.naming(self.logs):
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        shown = {k.rsplit("/", 1)[-1]: f"{v:.4g}" for k, v in values.items() if k.startswith("train/")}
        self.bar.set_postfix(shown, refresh=False)

    def say(self, text: str) -> None:
        if self.enabled:
            with contextlib.suppress(OSError):  # a terminal that was closed is no reason to lose work
                self.bar.write(printable(text), file=sys.stderr)

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(self, *error: object) -> None:
        if self.enabled:
            for part in (self.bar, self.writer, self.lines):
                with contextlib.suppress(OSError):  # what was not written is said by what wrote it
                    part.close()


def forget_lines(path: Path, after: int) -> None:
    """Drop the lines of a metrics file whose step is beyond `after`, and one that a killed process left half written."""
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


class SaveClock:
    """True every so many minutes, and at most once per interval."""

    def __init__(self, minutes: float):
        self.interval, self.last = minutes * 60.0, time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < self.interval:
            return False
        self.last = time.monotonic()
        return True
