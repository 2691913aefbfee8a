"""Where the time goes, by torch's profiler: the operators that took the most themselves. For speed.py --profile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import reporting
import torch

STEPS, TOP = 3, 12


def table(title: str, step: Callable[[int], Any], device: torch.device) -> reporting.Table:
    """The TOP operators of a call, by the time they took without what they call: means over STEPS calls, after one unseen."""
    from torch.profiler import ProfilerActivity, profile

    step(0)
    here, kinds = "self_cpu_time_total", [ProfilerActivity.CPU]
    if device.type == "cuda":
        here, kinds = "self_device_time_total", [*kinds, ProfilerActivity.CUDA]
    with profile(activities=kinds) as found:
        for number in range(1, STEPS + 1):
            step(number)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    spent = sorted(found.key_averages(), key=lambda event: -getattr(event, here))
    total = sum(getattr(event, here) for event in spent)  # µs
    rows = {
        f"`{event.key}`": {
            "share": [getattr(event, here) / total],
            "ms": [getattr(event, here) / 1e3 / STEPS],
            "calls": [event.count / STEPS],
        }
        for event in spent[:TOP]
    }
    formats = {"share": "{:.1%}", "ms": "{:.1f}", "calls": "{:.0f}"}
    about = {"ms in all": total / 1e3 / STEPS, "threads": torch.get_num_threads()}
    return reporting.Table(f"Profile of {title[0].lower()}{title[1:]}", formats, rows, about)


def generation(device: torch.device) -> list[reporting.Table]:
    """Of 16 images by the pipeline of weights/fashion-mnist at its own settings, in both precisions."""
    from sampling import ours

    classes = [k % 10 for k in range(16)]
    return [
        table(f"Generating 16 images, {precision}", partial(ours(precision, device), classes), device)
        for precision in ("float32", "bfloat16")
    ]
