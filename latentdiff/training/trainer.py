"""The loop both trainers run in: when to log, look, save and stop, and what a step that is not finite leads to."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.config import AutoencoderConfig, DiffusionConfig
from latentdiff.errors import UserError
from latentdiff.training import distributed, state
from latentdiff.training.accelerator import wait_for_everyone
from latentdiff.training.logging import Averages, RunLogger, SaveClock, Values
from latentdiff.training.optimizer import learning_rate
from latentdiff.utils import signals

SLOWEST = 2.0**-6  # of the configured learning rate: what cannot go on at it stops


@dataclass
class Work:
    """What a trainer does, for the loop to call; every process calls all of it alike.

    step(step, lr) -> (values to average, whether loss and gradient were finite); where not, nothing was changed.
    after(steps done) -> metrics to log at once: validation, pictures, the end of an epoch.
    tensors() -> the training state's tensors by name, sharded or whole.  meta() -> its JSON values.
    restore(tensors, meta) takes them back, whole.
    samples(step) -> indices of the training images in the global batch.
    lowered() -> whether a step that was not finite is worth another try, with a smaller loss scale (float16).
    made_of: what else a state depends on, by name, kept in it and compared on resume; see `check_made_of`.
    """

    step: Callable[[int, float], tuple[Values, bool]]
    after: Callable[[int], dict[str, float]]
    tensors: Callable[[], dict[str, dict[str, Tensor]]]
    meta: Callable[[], dict[str, Any]]
    restore: Callable[[dict[str, dict[str, Tensor]], dict[str, Any]], None]
    samples: Callable[[int], Tensor]
    lowered: Callable[[], bool] = lambda: False
    made_of: dict[str, Any] = field(default_factory=dict)


@dataclass
class Progress:
    """Where a run is. rate: a factor of the learning rate, halved by each roll-back. skipped: steps that were not finite."""

    step: int = 0
    rate: float = 1.0
    skipped: int = 0
    in_a_row: int = 0
    best: float | None = None
    averages: Averages = field(default_factory=Averages)


def resume(output: Path, work: Work, accelerator: Any, keep: int) -> Progress:
    """Take up the newest whole state of a run. UserError where it is of other images, of another first stage, or damaged."""
    tensors, meta = state.load_state(output, say=accelerator.is_main_process)
    check_made_of(output, meta.get("made_of"), work.made_of, accelerator.is_main_process)
    try:
        work.restore(tensors, meta)
        keys = {"rate": 1.0, "skipped": 0, "in_a_row": 0, "best": None}
        progress = Progress(meta["step"], **{key: meta.get(key, default) for key, default in keys.items()})
        progress.averages.restore(tensors.get("averages", {}), accelerator)
    except (KeyError, TypeError) as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:80]
        raise UserError(f"{output / 'state' / 'step-'}{meta['step']}: damaged training state ({missing})") from error
    if accelerator.is_main_process:  # what a kill right after the state was written has left undone
        if meta.get("is_best") and state.best_step(output) != progress.step:
            state.mark_best(output, progress.step)
        state.rotate(output, progress.step, keep)
    return progress


# What a state is made of: how a message calls it, and how a user goes on
MADE_OF = {
    "data": ("images", "put the old ones back"),
    "autoencoder": ("autoencoder weights", "name the old autoencoder"),
    "normaliser": ("latent normaliser", "name the old autoencoder, or the old setting of normaliser"),
}


def check_made_of(output: Path, before: Any, now: dict[str, Any], say: bool = True) -> None:
    """UserError where a state was made of something else than the run has now; a warning where the state does not say."""
    if not isinstance(before, dict):
        if say and now:
            print(
                f"warning: {output / 'state'}: is of a version that did not note its images; they are not compared",
                file=sys.stderr,
            )
        return
    for key, value in now.items():
        if key in before and not _alike(before[key], value):
            what, advice = MADE_OF[key]
            shown = f" ({before[key][:12]}, now {value[:12]})" if isinstance(value, str) else ""
            raise UserError(
                f"{output / 'state'}: this run was trained on other {what}{shown}; {advice}, or set output= elsewhere "
                "to start afresh"
            )


def _alike(before: Any, now: Any) -> bool:
    """Equal; numbers up to what summing up in another order changes."""
    if isinstance(before, list) and isinstance(now, list):
        return len(before) == len(now) and all(_alike(a, b) for a, b in zip(before, now, strict=True))
    if isinstance(before, float) and isinstance(now, float):
        return math.isclose(before, now, rel_tol=1e-4, abs_tol=1e-6)
    return before == now


def save(output: Path, work: Work, progress: Progress, accelerator: Any, keep: int, best: bool = False) -> None:
    """Write the state, of whole tensors however they are held. Every process calls it at the same step, the main one writes."""
    averages = progress.averages.state(accelerator)
    found = {**work.tensors(), **({"averages": averages} if averages else {})}
    tensors = distributed.gathered(found, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        meta = {name: getattr(progress, name) for name in ("rate", "skipped", "in_a_row", "best")}
        state.save_state(output, progress.step, tensors, {**work.meta(), **meta, "made_of": work.made_of}, keep, best)


def snapshot(output: Path, work: Work, progress: Progress, accelerator: Any) -> None:
    """Keep the averaged weights of this step for `latentdiff publish`. Every process calls it, the main one writes."""
    tensors = distributed.gathered({"ema": work.tensors()["ema"]}, keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        state.save_snapshot(output, progress.step, tensors, {**work.meta(), "made_of": work.made_of})


def run_loop(
    config: AutoencoderConfig | DiffusionConfig,
    work: Work,
    accelerator: Any,
    log: RunLogger,
    output: Path,
    progress: Progress,
) -> None:
    """Steps until train.steps. `signals.Stopped` or `signals.Interrupted`, the state saved, after a signal.

    UserError where more than train.bad_steps steps in a row were not finite and train.on_bad is stop.
    """
    train, clock = config.train, SaveClock(config.train.save_minutes)
    with signals.watched() as watch, watch.deferred():
        while progress.step < train.steps:
            step = progress.step
            lr = progress.rate * learning_rate(config.optimizer, step, train.steps)
            values, finite = work.step(step, lr)
            while not finite and work.lowered():
                values, finite = work.step(step, lr)
            progress.step += 1
            if finite:
                progress.averages.add(values)
                progress.in_a_row = 0
            elif _skip(config, work, accelerator, log, output, progress, step):
                continue
            log.advance()
            done, last = step + 1, step + 1 == train.steps
            if done % train.log_every == 0 or last:
                means = {f"train/{name}": value for name, value in progress.averages.take(accelerator).items()}
                skipped = {"train/skipped": float(progress.skipped)} if progress.skipped else {}
                log.log(done, {**means, **skipped, "lr": lr})
            metrics = work.after(done)
            if metrics:
                log.log(done, metrics)
            if train.snapshot_every and done % train.snapshot_every == 0:
                snapshot(output, work, progress, accelerator)
            best = _improves(train.best, metrics, progress)
            # Within a bad stretch nothing is saved by the clock: a roll-back is to lead to before it
            due, stop = agree(accelerator, progress.in_a_row == 0 and clock.due(), watch)
            if due or stop or last or best:
                save(output, work, progress, accelerator, train.keep, best)
            if stop:
                wait_for_everyone(accelerator)
                watch.stop(stop)


def _improves(metric: str | None, metrics: dict[str, float], progress: Progress) -> bool:
    value = metrics.get(metric, math.nan) if metric is not None else math.nan
    if not math.isfinite(value) or (progress.best is not None and value >= progress.best):
        return False
    progress.best = value
    return True


def _skip(config, work: Work, accelerator, log: RunLogger, output: Path, progress: Progress, step: int) -> bool:
    """Count and write down a step that was not finite; True where the run was rolled back, or UserError to stop it."""
    train = config.train
    progress.skipped += 1
    progress.in_a_row += 1
    if accelerator.is_main_process:
        with (output / "skipped.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"step": step, "samples": work.samples(step).tolist()}) + "\n")
    log.say(f"warning: step {step} is skipped, its loss or gradient is not finite ({progress.in_a_row} in a row)")
    if progress.in_a_row <= train.bad_steps:
        return False
    said = f"{output / 'skipped.jsonl'}: {progress.in_a_row} steps in a row had no finite loss or gradient"
    if train.on_bad == "stop":
        raise UserError(f"{said}; lower optimizer.lr, or set train.on_bad=rollback and --resume")
    rate = progress.rate / 2
    if rate < SLOWEST or not state.state_folders(output):
        why = "after so many roll-backs" if rate < SLOWEST else "before the first state was saved"
        raise UserError(f"{said}, {why}; lower optimizer.lr, or look at those samples")
    accelerator.wait_for_everyone()
    before = resume(output, work, accelerator, train.keep)
    progress.step, progress.averages, progress.rate, progress.in_a_row = before.step, before.averages, rate, 0
    progress.best = before.best
    log.move_to(before.step)
    log.say(f"warning: {said}; back to step {before.step}, the learning rate times {rate:g}")
    return True


def agree(accelerator: Any, due: bool, watch: signals.Watch) -> tuple[bool, int | None]:
    """(whether to save, which signal says to stop), alike on all processes.

    The main process's clock says when to save. Any process may have got a signal; Ctrl-C goes before the others.
    """
    own = watch.received[0] if watch else None
    if accelerator.num_processes == 1:
        return due, own
    said = [due and accelerator.is_main_process, own is not None and own != signal.SIGINT, own == signal.SIGINT]
    flags = torch.tensor(said, dtype=torch.float32, device=accelerator.device)
    due_sum, stop_sum, interrupted_sum = accelerator.reduce(flags, "sum").tolist()
    if interrupted_sum > 0:
        return due_sum > 0, int(signal.SIGINT)
    return due_sum > 0, (own or int(signal.SIGTERM)) if stop_sum > 0 else None


def shares(count: int, micro: int | str | None) -> list[slice]:
    """The rows of a process's `count` samples, in pieces of at most `micro`; whole where that is None, or not found yet."""
    size = micro if isinstance(micro, int) else count
    return [slice(start, min(count, start + size)) for start in range(0, count, size)]


@contextlib.contextmanager
def accumulating(networks: list[nn.Module], last: bool) -> Iterator[None]:
    """Within the block DDP sums gradients up on this process alone, but for the last piece of a batch.

    A sharded network shares its gradients out after every piece: kept back, they would be whole on each device.
    """
    with contextlib.ExitStack() as stack:
        if not last:
            for network in networks:
                stack.enter_context(getattr(network, "no_sync", contextlib.nullcontext)())
        yield
