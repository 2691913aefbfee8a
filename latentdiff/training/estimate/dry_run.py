"""A few training steps on random data, for what they cost: time, memory, floating-point operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from latentdiff.config import TrainConfig
from latentdiff.training.memory import Memory

TIMED = 3  # steps, after one that only warms up


def dry_run(
    step: Callable[[int, int], None], phases: Sequence[tuple[int, int]], train: TrainConfig, memory: Memory
) -> dict[str, Any]:
    """Run step(number, batch) as training would, and say what it cost.

    phases: (number of the first step, how many steps) of each stretch of the run whose steps cost alike. The hours are
    of all steps alone, without reading images, validation, pictures and states.
    Where the memory does not suffice, {"out_of_memory": the reason} instead.
    """
    timed: dict[str, list[float]] = {}
    try:
        for number, _ in phases:
            step(number, train.batch_size)
            timed[f"step {number}"] = [_seconds(step, number, train.batch_size, memory.device) for _ in range(TIMED)]
        used = memory.facts()
        flops = _flops(step, phases[-1][0])
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return {"out_of_memory": f"train.batch_size {train.batch_size}: {' '.join(str(error).split())[:160]}"}
    total = sum(statistics.median(times) * count for times, (_, count) in zip(timed.values(), phases, strict=True))
    seconds = total / train.steps
    return {
        "flops_per_sample": flops,
        "step": {
            "device": str(memory.device),
            "precision": train.precision,
            "threads": torch.get_num_threads(),
            "batch_size": train.batch_size,
            "seconds": short(seconds),
            "samples_per_second": short(train.batch_size / seconds),
            "flops_per_second": short(flops * train.batch_size / statistics.median(timed[f"step {phases[-1][0]}"])),
            "timed": {name: [short(value) for value in times] for name, times in timed.items()},
        },
        "memory": used,
        "hours": {"training": short(total / 3600)},
    }


def short(value: float) -> float:
    """Three figures: no more can be known from three steps."""
    return float(f"{value:.3g}")


def _seconds(step: Callable[[int, int], None], number: int, batch: int, device: torch.device) -> float:
    start = time.perf_counter()
    step(number, batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _flops(step: Callable[[int, int], None], number: int) -> int:
    """Operations of one training step on one sample, forward and backward, a multiplication and its addition as two.

    Attention is taken apart into its products: fused, it is not counted on every device.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(number, 1)
    return counter.get_total_flops()
