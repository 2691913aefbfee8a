"""`train.micro_batch: auto`: the most samples that a process can take through its network at once, found by trying.

A micro-batch changes memory and speed alone: gradients add up over the pieces, and whatever is random belongs to a sample.
So the number is no part of the training state, and a resumed run tries again.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch

from latentdiff.errors import UserError
from latentdiff.training.memory import Memory
from latentdiff.training.precision import AUTO, OneProcess, Trial
from latentdiff.utils import progress_bars

USABLE = 0.9  # share of the memory that may be used: pictures need some of it, and it fragments


def find_micro_batch(config: Any, accelerator: Any, trial: Trial) -> Any:
    """The config with train.micro_batch as a number, the same on every process; unchanged where it is not "auto".

    Each process tries steps by itself, and the smallest result is used by all. The random state stays as it was.

    Args:
        config: of one of the two stages.
        accelerator: the run's.
        trial: makes the steps to try; see `precision.Trial`.

    Raises:
        UserError: not even one sample fits in memory.
    """
    if config.train.micro_batch != AUTO:
        return config
    device, share = accelerator.device, config.train.batch_size // accelerator.num_processes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        forecast = MemoryForecast(Memory(device))
        size = largest(share, partial(trial(OneProcess(device)), config.train.precision), forecast)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if accelerator.num_processes > 1:
        size = int(accelerator.gather(torch.tensor([size], device=device)).min())
    if accelerator.is_local_main_process:
        progress_bars.print_line(f"train.micro_batch: {size} of {share} samples at a time (auto)")
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})


def largest(share: int, attempt: Callable[[int], None], forecast: Callable[[int], bool] = lambda size: True) -> int:
    """The largest of share, share / 2, share / 4, ... (rounded up) samples with which a step fits in memory.

    Sizes are tried from the smallest on, so the memory is never filled: Linux ends processes that take too much.

    Args:
        share: samples of one process in a step.
        attempt: (size) takes one step of so many samples; it raises where the memory does not suffice.
        forecast: (size) whether the next size is likely to fit; it is asked once for each size after the smallest.

    Raises:
        UserError: the smallest size does not fit.
    """
    sizes = [share]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    fits = 0
    for size in reversed(sizes):
        if fits and not forecast(size):
            break
        try:
            attempt(size)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            break
        fits = size
    if not fits:
        raise UserError(
            "train.micro_batch: not even one sample fits in memory; set train.gradient_checkpointing=true, or make the model "
            "or data.size smaller"
        )
    return fits


class MemoryForecast:
    """Forecasts whether a step of twice the samples fits, from the memory that the steps so far took.

    A step's memory has a constant part (weights, moments) and a part in proportion to its samples. The last two sizes tell
    them apart; before there are two, all of it counts as proportional.

    Args:
        memory: a `Memory`, made before the first step.
        available: (device) how many bytes can still be had; `bytes_available` unless given.
    """

    def __init__(self, memory: Any, available: Callable[[torch.device], int] | None = None):
        self.memory, self.available = memory, available or bytes_available
        self.taken: list[tuple[int, int]] = []

    def __call__(self, size: int) -> bool:
        previous = -(-size // 2)  # the size of the last step
        self.taken.append((previous, self.memory.facts()["step_bytes"]))
        samples, bytes_now = self.taken[-1]
        before, bytes_before = self.taken[-2] if len(self.taken) > 1 else (0, 0)
        per_sample = max(0, bytes_now - bytes_before) / max(1, samples - before)
        return (size - samples) * per_sample <= USABLE * self.available(self.memory.device)


def bytes_available(device: torch.device) -> int:
    """Bytes of memory that can still be had: the GPU's, or the system's."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
