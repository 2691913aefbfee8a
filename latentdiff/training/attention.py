"""The attention kernel of a training step: torch's choice, except for one case in which another kernel is faster."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT = 64  # positions up to which plain matrix products are faster than the CPU's fused kernel in bfloat16


def attention_kernel(device: torch.device, precision: str, positions: int) -> AbstractContextManager[None]:
    """A context in which attention over up to `positions` positions runs the faster kernel for a training step.

    On a CPU torch runs its flash kernel at any length. Over 16 to 64 positions in bfloat16 that takes 1.4 to 3 times as
    long as plain matrix products; from 256 positions on it is the faster one. Results differ by rounding alone.

    Args:
        device: where the step runs.
        precision: of the run, such as "bfloat16".
        positions: the longest sequence that attends to itself, height times width of a latent.
    """
    if device.type == "cpu" and precision == "bfloat16" and positions <= SHORT:
        return sdpa_kernel(SDPBackend.MATH)
    return contextlib.nullcontext()
