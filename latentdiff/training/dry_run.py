"""A few training steps on random data, to measure what they cost: time, memory, floating-point operations."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from latentdiff.config import TrainConfig
from latentdiff.training.memory import Memory

TIMED = 3  # steps, after one that only warms up

Step = Callable[[int, int], None]  # step(number of the step, batch size)


def dry_run(step: Step, phases: Sequence[tuple[int, int]], train: TrainConfig, memory: Memory) -> dict[str, Any]:
    """Run step(number, batch) as training would and return what it cost, as JSON values.

    Args:
        step: takes one training step on `batch` samples.
        phases: (number of the first step, count of steps) of each stretch of the run whose steps cost the same.
        train: its steps and batch_size; precision is reported.
        memory: measures the device; its device is where the steps run.

    Returns:
        flops_per_sample, step (device, seconds, samples_per_second ...), memory and hours. The hours are of the training
        steps alone, without reading images, validation, pictures and saved states. {"out_of_memory": reason} instead,
        where a step needs more memory than there is.
    """
    timed: dict[str, list[float]] = {}
    try:
        for number, _ in phases:
            step(number, train.batch_size)
            again = partial(step, number, train.batch_size)
            timed[f"step {number}"] = [seconds_of(again, memory.device) for _ in range(TIMED)]
        used = memory.facts()
        flops = _flops(step, phases[-1][0])
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        return {"out_of_memory": f"train.batch_size {train.batch_size}: {' '.join(str(error).split())[:160]}"}
    total = sum(statistics.median(times) * count for times, (_, count) in zip(timed.values(), phases, strict=True))
    seconds = total / train.steps
    last = statistics.median(timed[f"step {phases[-1][0]}"])
    return {
        "flops_per_sample": flops,
        "step": {
            "device": str(memory.device),
            "precision": train.precision,
            "threads": torch.get_num_threads(),
            "batch_size": train.batch_size,
            "seconds": three_figures(seconds),
            "samples_per_second": three_figures(train.batch_size / seconds),
            "flops_per_second": three_figures(flops * train.batch_size / last),
            "timed": {name: [three_figures(value) for value in times] for name, times in timed.items()},
        },
        "memory": used,
        "hours": {"training": three_figures(total / 3600)},
    }


def three_figures(value: float) -> float:
    """The value to three significant figures: a few steps tell no more."""
    return float(f"{value:.3g}")


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that some work takes on a device, until the device has done it."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _flops(step: Step, number: int) -> int:
    """Operations of one training step on one sample, forward and backward; a multiplication and an addition count as two."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The math kernel shows attention as its matrix products. A fused kernel is not counted on every device
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(number, 1)
    return counter.get_total_flops()
