"""The training loop that both stages share, and the training state."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.training import distributed, state
from latentdiff.training.logging import Averages, RunLogger, Values
from latentdiff.training.loss_scale import LossScale
from latentdiff.training.optimizer import learning_rate
from latentdiff.training.run_clock import Due, RunClock
from latentdiff.utils import signals

SMALLEST_LR_FACTOR = 2.0**-6  # a run that still fails at this share of its learning rate is stopped

Tensors = dict[str, dict[str, Tensor]]  # of a training state: a file's name -> its tensors by name


@dataclass
class Progress:
    """Where a run is. All of it is part of the training state.

    Attributes:
        step: steps that are done.
        rate: a factor of the learning rate. Each roll-back halves it.
        skipped: steps that were not finite, since the run began.
        in_a_row: how many of them came directly one after another, up to now.
        best: the lowest value of train.best so far.
        averages: means of what the steps since the last line of the log reported.
    """

    step: int = 0
    rate: float = 1.0
    skipped: int = 0
    in_a_row: int = 0
    best: float | None = None
    averages: Averages = field(default_factory=Averages)


class Trainer(ABC):
    """The loop over training steps, and the training state. Each stage fills in its step and what its state holds.

    With several processes, every process calls every method, in the same order.

    Attributes:
        config: the run's config. micro_batch and precision are resolved: neither is "auto".
        accelerator: an accelerate.Accelerator, or a `precision.OneProcess` while steps are timed.
        loss_scale: the factor of the loss in float16.
        progress: where the run is.
        clock: the time that the run has used, and what is due by it.
        due: what the clock said about the present step; the same on all processes.
        log: the run's logs, while `run` runs.
    """

    def __init__(self, config: Any, accelerator: Any):
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.output)
        self.loss_scale = LossScale(config.train.precision, accelerator.device)
        self.progress = Progress()
        self.clock, self.due = RunClock(config.train), Due()
        self.log: RunLogger | None = None

    # What a stage fills in

    @abstractmethod
    def train_step(self, step: int, lr: float) -> tuple[Values, bool]:
        """One update of the weights, on the global batch of `step` (0 is the first), at the learning rate lr.

        Returns ({name: mean, or (mean, samples it is of)} for the log, whether loss and gradients were finite). Where they
        were not, no weight was changed.
        """

    @abstractmethod
    def after_step(self, done: int) -> dict[str, float]:
        """What is due after `done` steps: validation, pictures, the end of an epoch. Returns metrics for the log.

        See also `due` and `is_last`.
        """

    @abstractmethod
    def image_indices(self, step: int) -> Tensor:
        """The training images of a step's global batch, int64 [batch_size]."""

    @abstractmethod
    def state_tensors(self) -> Tensors:
        """The tensors of the training state. They may be sharded."""

    @abstractmethod
    def state_meta(self) -> dict[str, Any]:
        """What else the training state holds, as JSON values."""

    @abstractmethod
    def made_from(self) -> dict[str, Any]:
        """What a training state depends on besides the config, by the keys of MADE_FROM, as JSON values."""

    @abstractmethod
    def load_state(self, tensors: Tensors, meta: dict[str, Any]) -> None:
        """Continue from what `state_tensors` and `state_meta` gave. tensors: whole, on the CPU."""

    # The loop

    def run(self, log: RunLogger) -> None:
        """Take the steps from `progress.step` to train.steps, with logs, training states and snapshots on the way.

        With train.minutes the run ends by the clock, if that is earlier.

        Raises:
            signals.Stopped, signals.Interrupted: after a signal, once the state is saved.
            UserError: more than train.bad_steps steps in a row were not finite, and train.on_bad does not help.
        """
        config, train, progress = self.config, self.config.train, self.progress
        self.log = log
        saves, clock = SaveClock(train.save_minutes), self.clock
        clock.enter_loop()
        with signals.watched() as watch, watch.deferred():
            if clock.active:
                _, _, self.due = agree(self.accelerator, False, watch, clock.due(progress.step))
                self._say_time_is_over()
            while progress.step < train.steps and not self.due.over:
                step = progress.step

                # Update the weights. In float16 a gradient that overflows halves the loss scale, and the step is repeated.
                lr = progress.rate * learning_rate(config.optimizer, step, train.steps, self.due.share)
                with clock.timing("step"):
                    values, finite = self.train_step(step, lr)
                    while not finite and self.loss_scale.lowered():
                        values, finite = self.train_step(step, lr)

                # Count the step. A few that are not finite are skipped; after too many the run stops or rolls back.
                progress.step += 1
                if finite:
                    progress.averages.add(values)
                    progress.in_a_row = 0
                elif self._skip(step):
                    continue
                log.advance()

                # Log the means over the steps since the last line.
                done, last = step + 1, self.is_last(step + 1)
                if done % train.log_every == 0 or last:
                    means = {f"train/{name}": value for name, value in progress.averages.take(self.accelerator).items()}
                    skipped = {"train/skipped": float(progress.skipped)} if progress.skipped else {}
                    log.metrics(done, {**means, **skipped, "lr": lr})

                # Validate and draw pictures, when they are due.
                with clock.timing("after"):
                    metrics = self.after_step(done)
                if metrics:
                    log.metrics(done, metrics)
                if self.due.snapshot or (train.snapshot_every and done % train.snapshot_every == 0):
                    self.save_snapshot()

                # Save the state: by the clock, at the end, after a signal, and when it is the best so far. While steps
                # are not finite the clock does not count: a roll-back has to lead to before them.
                best = self._improves(metrics)
                save = progress.in_a_row == 0 and saves.due()
                due = clock.due(done, saves=save or best) if clock.active else Due()
                save, stop, due = agree(self.accelerator, save, watch, due)
                if save or stop or last or best:
                    with clock.timing("save"):
                        self.save(best)
                if stop:
                    self.accelerator.wait_for_everyone()
                    watch.stop(stop)
                if last:
                    break
                self.due = due

    def _say_time_is_over(self) -> None:
        """Print that train.minutes were used up before this part of the run began, if they were."""
        minutes, step = self.config.train.minutes, self.progress.step
        assert self.log is not None
        if self.due.over:
            self.log.print(f"train.minutes: the run has used its {minutes:g} minutes and ends with the weights of step {step}")
        elif self.due.last:
            self.log.print(f"warning: train.minutes: {minutes:g} minutes were over before the first step, so one step is taken")

    def is_last(self, done: int) -> bool:
        """Whether the run ends after `done` steps: they are train.steps, or the time of train.minutes is used up."""
        return self.due.last or done == self.config.train.steps

    def _improves(self, metrics: dict[str, float]) -> bool:
        """Whether the metric that train.best names is lower than ever before; keeps it as the lowest."""
        name, best = self.config.train.best, self.progress.best
        value = metrics.get(name, math.nan)
        if not math.isfinite(value) or (best is not None and value >= best):
            return False
        self.progress.best = value
        return True

    def _skip(self, step: int) -> bool:
        """Count and record a step that was not finite. True where the run was rolled back; UserError where it has to stop."""
        train, progress, log = self.config.train, self.progress, self.log
        assert log is not None
        progress.skipped += 1
        progress.in_a_row += 1
        if self.accelerator.is_main_process:
            with (self.output / "skipped.jsonl").open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"step": step, "samples": self.image_indices(step).tolist()}) + "\n")
        log.print(f"warning: step {step} is skipped, its loss or gradient is not finite ({progress.in_a_row} in a row)")
        if progress.in_a_row <= train.bad_steps:
            return False

        problem = f"{self.output / 'skipped.jsonl'}: {progress.in_a_row} steps in a row had no finite loss or gradient"
        if train.on_bad == "stop":
            raise UserError(f"{problem}; lower optimizer.lr, or set train.on_bad=rollback and --resume")
        rate, skipped = progress.rate / 2, progress.skipped
        if rate < SMALLEST_LR_FACTOR or not state.state_folders(self.output):
            reason = "after so many roll-backs" if rate < SMALLEST_LR_FACTOR else "before the first state was saved"
            raise UserError(f"{problem}, {reason}; lower optimizer.lr, or look at those samples")
        self.accelerator.wait_for_everyone()
        self.resume()
        progress.rate, progress.skipped, progress.in_a_row = rate, skipped, 0
        log.move_to(progress.step)
        log.print(f"warning: {problem}; back to step {progress.step}, the learning rate times {rate:g}")
        return True

    # The training state

    def resume(self) -> None:
        """Continue from the newest undamaged state of the run. UserError where it was made from other images or weights."""
        main, keep = self.accelerator.is_main_process, self.config.train.keep
        tensors, meta = state.load_state(self.output, warn=main)
        check_made_from(self.output, meta.get("made_of"), self.made_from(), main)
        try:
            self.load_state(tensors, meta)
            self.progress.step = meta["step"]
            for name, default in {"rate": 1.0, "skipped": 0, "in_a_row": 0, "best": None}.items():
                setattr(self.progress, name, meta.get(name, default))
            self.clock.restore(meta.get("clock", {}))
            self.progress.averages.restore(tensors.get("averages", {}), self.accelerator)
        except (KeyError, TypeError) as error:
            missing = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:80]
            folder = self.output / "state" / f"step-{meta['step']}"
            raise UserError(f"{folder}: damaged training state ({missing})") from error
        if main:
            # A run that was killed right after it wrote the state may not have come to this
            if meta.get("is_best") and state.best_step(self.output) != self.progress.step:
                state.mark_best(self.output, self.progress.step)
            state.rotate(self.output, self.progress.step, keep)

    def save(self, best: bool = False) -> None:
        """Write the training state. Its tensors are whole, however they are sharded. best: mark it as the best so far."""
        averages = self.progress.averages.state(self.accelerator)
        tensors = {**self.state_tensors(), **({"averages": averages} if averages else {})}
        tensors = distributed.gathered(tensors, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            progress = {name: getattr(self.progress, name) for name in ("rate", "skipped", "in_a_row", "best")}
            meta = {**self.state_meta(), **progress, **self._clock_meta(self.due.last), "made_of": self.made_from()}
            state.save_state(self.output, self.progress.step, tensors, meta, self.config.train.keep, best)

    def _clock_meta(self, last: bool) -> dict[str, Any]:
        """What a state keeps of the clock. Without minutes nothing: states of equal runs are then equal to the byte."""
        return {"clock": self.clock.state(last=last)} if self.clock.active else {}

    def save_snapshot(self) -> None:
        """Keep the averaged weights of this step for good, for `latentdiff publish`."""
        tensors = distributed.gathered({"ema": self.state_tensors()["ema"]}, keep=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            meta = {**self.state_meta(), **self._clock_meta(False), "made_of": self.made_from()}
            state.save_snapshot(self.output, self.progress.step, tensors, meta)


def micro_batches(count: int, size: int | str | None) -> list[slice]:
    """`count` rows in pieces of at most `size`; in one piece where that is None, or "auto" and not yet resolved."""
    size = size if isinstance(size, int) else count
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


@contextlib.contextmanager
def accumulating(networks: list[nn.Module], last: bool) -> Iterator[None]:
    """Within the block gradients add up on this process; only for the last piece of a batch DDP averages them over all.

    A sharded network (FSDP) shares its gradients after every piece: kept back, each device would hold all of them whole.
    """
    with contextlib.ExitStack() as stack:
        if not last:
            for network in networks:
                stack.enter_context(getattr(network, "no_sync", contextlib.nullcontext)())
        yield


class SaveClock:
    """Tells when another `minutes` have passed; at most once per interval."""

    def __init__(self, minutes: float):
        self.interval, self.last = minutes * 60.0, time.monotonic()

    def due(self) -> bool:
        """Whether the interval is over; if so, the next one begins."""
        if time.monotonic() - self.last < self.interval:
            return False
        self.last = time.monotonic()
        return True


def agree(accelerator: Any, save: bool, watch: signals.Watch, due: Due) -> tuple[bool, int | None, Due]:
    """(whether to save, the signal to stop for, or None, what is due at the next step), the same on all processes.

    The main process's clock decides when to save and what is due. Any process may have got a signal; SIGINT (Ctrl-C) goes
    before others.
    """
    own = watch.received[0] if watch else None
    if accelerator.num_processes == 1:
        return save, own, due
    signalled = [own is not None and own != signal.SIGINT, own == signal.SIGINT]
    by_clock = [save, *due] if accelerator.is_main_process else [0.0] * (1 + len(due))
    numbers = torch.tensor([*signalled, *by_clock], dtype=torch.float32, device=accelerator.device)
    stopped, interrupted, saving, share, *flags = accelerator.reduce(numbers, "sum").tolist()
    agreed = Due(share, *(flag > 0 for flag in flags))
    if interrupted > 0:
        return saving > 0, int(signal.SIGINT), agreed
    return saving > 0, (own or int(signal.SIGTERM)) if stopped > 0 else None, agreed


# What a state is made from: its name in a message, and what the user can do
MADE_FROM = {
    "data": ("images", "put the old ones back"),
    "autoencoder": ("autoencoder weights", "name the old autoencoder"),
    "base": ("base weights (model.pretrained)", "put the old ones back"),
    "condition images": ("second images", "put the old ones back"),
    "source": ("images of bridge.source", "put the old ones back"),
    "normaliser": ("latent normaliser", "name the old autoencoder, or the old setting of normaliser"),
}


def check_made_from(output: Path, before: Any, now: dict[str, Any], warn: bool = True) -> None:
    """UserError where a training state was made from other images, autoencoder weights or normaliser than the run has now.

    Args:
        output: the run's folder, for the message.
        before: what the state says; where it says nothing (older versions), a warning on stderr.
        now: what the run has, by the keys of MADE_FROM.
        warn: whether this process prints the warning.
    """
    if not isinstance(before, dict):
        if warn and now:
            problem = "is of a version that did not note its images; they are not compared"
            print(f"warning: {output / 'state'}: {problem}", file=sys.stderr)
        return
    for key, value in now.items():
        if key in before and not _close(before[key], value):
            what, advice = MADE_FROM[key]
            shown = f" ({before[key][:12]}, now {value[:12]})" if isinstance(value, str) else ""
            raise UserError(
                f"{output / 'state'}: this run was trained on other {what}{shown}; {advice}, or set output= elsewhere "
                "to start afresh"
            )


def _close(before: Any, now: Any) -> bool:
    """Equal; floats up to what summing in another order changes."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_close(a, b) for a, b in zip(before, now, strict=True))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-4, abs_tol=1e-6)
    return before == now
