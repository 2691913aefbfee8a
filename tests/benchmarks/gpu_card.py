"""What the card itself reaches: the measure that training steps are held against."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch
from speed import timed


def matrix_rate(device: torch.device, size: int, dtype: torch.dtype, repeat: int = 10) -> float:
    """FLOP/s of products of two random matrices of this size; the first ones only warm up."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return repeat * 2 * size**3 / timed(lambda: [a @ b for _ in range(repeat)], device)


def copy_rate(device: torch.device, count: int) -> float:
    """Bytes a second of a copy on the device, read and written ones together."""
    a = torch.randn(count, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 10 * 2 * a.nbytes / timed(lambda: [b.copy_(a) for _ in range(10)], device)


def launch_seconds(device: torch.device) -> float:
    """Seconds of one tiny operation, its launch mostly: what bounds small networks."""
    a = torch.zeros(1, device=device)
    began = time.perf_counter()
    timed(lambda: [a.add_(1) for _ in range(1000)], device)
    return (time.perf_counter() - began) / 1000


def measure(name: str, device: torch.device, clock: Any, results: Any) -> None:
    import diffusers

    size, count = (256, 2**16) if clock.dry else (8192, 2**28)
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    results.add("machine", value=what)
    results.add("versions", value=f"torch {torch.__version__}, diffusers {diffusers.__version__}")
    results.add("CPU cores", value=os.cpu_count())
    if device.type == "cuda":
        results.add("memory, GiB", value=torch.cuda.get_device_properties(device).total_memory / 2**30)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rate = matrix_rate(device, size, dtype)
        results.add(f"{size}³ product in {str(dtype).removeprefix('torch.')}, TFLOP/s", value=rate / 1e12)
    results.add("copy, GB/s read and written", value=copy_rate(device, count) / 1e9)
    results.add("one small operation, microseconds", value=launch_seconds(device) * 1e6)
