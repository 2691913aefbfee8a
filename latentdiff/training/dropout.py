"""Dropout whose mask is a function of (seed, step, sample): the same in any batch, on any process, and when recomputed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.utils.random import derive_seed

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


class SampleDropout(nn.Module):
    """nn.Dropout of [B, ...] whose mask depends on its samples' keys and its own number alone; off in eval mode.

    The mask is a hash (SplitMix64's output function) of key, number and place, so it needs no generator, and gradient
    checkpointing computes it alike a second time. keys: int64 [B], set by `set_keys` ahead of each forward pass.
    """

    def __init__(self, p: float, number: int):
        super().__init__()
        self.p, self.number = p, number
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.keys is None or x.shape[0] % len(self.keys):
            given = None if self.keys is None else len(self.keys)
            raise ValueError(f"dropout of a batch of {x.shape[0]}: set_keys gave {given}")
        keys = self.keys.to(x.device).repeat_interleave(x.shape[0] // len(self.keys))  # [B]
        size = x[0].numel()
        places = torch.arange(size, device=x.device) + (self.number << 40)
        kept = uniform(keys[:, None] + (places * _GOLDEN)[None]) >= self.p  # [B, size]
        return x * kept.view(x.shape).to(x.dtype) / (1 - self.p)


def uniform(z: Tensor) -> Tensor:
    """int64 of any shape -> numbers in [0, 1) of 24 bits, float32: SplitMix64's output function in wrapping arithmetic."""

    def shifted(value: Tensor, bits: int) -> Tensor:  # logical, where int64's own shift keeps the sign
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shifted(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ shifted(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ shifted(z, 31)
    return shifted(z, 40).float() / (1 << 24)


def replace_dropout(module: nn.Module) -> list[SampleDropout]:
    """Put a SampleDropout in place of each nn.Dropout with p > 0, in the module's own order; returns them."""
    made: list[SampleDropout] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout and child.p > 0:
                made.append(SampleDropout(child.p, len(made)))
                setattr(parent, name, made[-1])
    return made


def set_keys(layers: list[SampleDropout], seed: int, step: int, rows: Tensor) -> None:
    """Keys of a batch's samples: functions of (seed, step, place of the sample in the global batch). rows: int64 [B]."""
    if not layers:
        return
    base = derive_seed(seed, "dropout", step)
    keys = (rows.long() + 1) * -4417276706812531889 + base  # 0xC2B2AE3D27D4EB4F: far from the places' stride
    for layer in layers:
        layer.keys = keys
