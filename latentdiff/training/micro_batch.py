"""`train.micro_batch: auto`: the most samples that a process can take through its network at once, found by trying.

A micro batch changes memory and speed alone: gradients are summed over the pieces, and all that is random belongs to the
sample. So what was found need not be kept, and a resumed run looks again.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil
import torch

from latentdiff.errors import UserError
from latentdiff.training.memory import Memory
from latentdiff.training.precision import AUTO, OneProcess, Trial

FULL = 0.9  # share of the memory that may be in use: a long run needs some room for pictures, and memory comes apart


def find_micro_batch(config: Any, accelerator: Any, trial: Trial) -> Any:
    """The config with train.micro_batch as a number, alike on every process; unchanged where it is not auto.

    Every process tries the trial's steps by itself, and the smallest result holds for all. The random state is left as it
    was. UserError where not even one sample fits.
    """
    if config.train.micro_batch != AUTO:
        return config
    device, share = accelerator.device, config.train.batch_size // accelerator.num_processes
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        room = Room(Memory(device))
        found = largest(share, partial(trial(OneProcess(device)), config.train.precision), room)
    _let_go(device)
    if accelerator.num_processes > 1:
        found = int(accelerator.gather(torch.tensor([found], device=device)).min())
    accelerator.print(f"train.micro_batch: {found} of {share} samples at a time (auto)", file=sys.stderr)
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": found})})


def largest(share: int, attempt: Callable[[int], None], room: Callable[[int], bool] = lambda size: True) -> int:
    """The largest of share, share / 2, share / 4, ... (rounded up) with which a step fits in memory.

    attempt(size): one step of so many samples; it raises where the memory does not suffice. room(size): whether the next
    size is worth trying. Sizes grow from the smallest, so a system that ends processes which take too much memory, as
    Linux does, is never filled. UserError where the smallest does not fit.
    """
    sizes = [share]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    found = 0
    for size in reversed(sizes):
        if found and not room(size):
            break
        try:
            attempt(size)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            break
        found = size
    if not found:
        raise UserError(
            "train.micro_batch: not even one sample fits in memory; set train.gradient_checkpointing=true, or make the model "
            "or data.size smaller"
        )
    return found


class Room:
    """Whether a step of a larger size is likely to fit, judged by what the steps so far have taken.

    A step's memory is a constant (weights, moments) and a part in proportion to its samples. The two are told apart by the
    last two sizes; before there are two, everything counts as proportional.
    """

    def __init__(self, memory: Any, available: Callable[[torch.device], int] | None = None):
        self.memory, self.available = memory, available or bytes_available
        self.taken: list[tuple[int, int]] = []

    def __call__(self, size: int) -> bool:
        tried = -(-size // 2)  # sizes double
        self.taken.append((tried, self.memory.facts()["step_bytes"]))
        samples, bytes_now = self.taken[-1]
        before, bytes_before = self.taken[-2] if len(self.taken) > 1 else (0, 0)
        a_sample = max(0, bytes_now - bytes_before) / max(1, samples - before)
        return (size - samples) * a_sample <= FULL * self.available(self.memory.device)


def bytes_available(device: torch.device) -> int:
    """Bytes of a device's memory that are still to be had: of a GPU's, or of the system's."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _let_go(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
