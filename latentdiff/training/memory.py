"""Peak memory: allocated on a GPU, else resident in the process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch

PROC = Path("/proc/self")


class Memory:
    """The peak of memory since this object was made: allocated on the GPU, else resident in the process."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            return
        try:
            (PROC / "clear_refs").write_text("5")  # resets the kernel's peak to what is in use now
        except OSError:
            pass  # not Linux, or not allowed: then `step_bytes` may be too small, never too large
        self.start = self._resident()

    def facts(self) -> dict[str, Any]:
        """{"measured": what was measured, "step_bytes": growth since the start, "peak_bytes": the peak}, in bytes."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            return {"measured": "allocated on the GPU", "step_bytes": peak - self.start, "peak_bytes": peak}
        peak = self._resident()
        return {"measured": "resident memory of the process", "step_bytes": peak - self.start, "peak_bytes": peak}

    def _resident(self) -> int:
        """Bytes of the process's resident memory at its peak."""
        try:
            lines = (PROC / "status").read_text().splitlines()
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        except (OSError, StopIteration):
            import resource  # absent on Windows

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
