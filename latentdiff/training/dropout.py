"""Dropout whose mask follows from (seed, step, sample): the same in any batch, on any process, and when it is recomputed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.utils.random import derive_seed

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


class SampleDropout(nn.Module):
    """Dropout of [B, ...], as nn.Dropout but for the mask: it depends on the samples' keys and this layer's number alone.

    The mask is a hash (SplitMix64's output function) of key, number and place. It needs no random generator, so gradient
    checkpointing computes the same mask a second time.

    Args:
        p: share of values that are dropped, 0 to 1. In eval mode nothing is.
        number: of this layer in its network.

    `keys`, int64 [B], are set by `set_keys` before each forward pass; ValueError without them.
    """

    def __init__(self, p: float, number: int):
        super().__init__()
        self.p, self.number = p, number
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if self.keys is None or x.shape[0] % len(self.keys):
            count = None if self.keys is None else len(self.keys)
            raise ValueError(f"dropout of a batch of {x.shape[0]}: set_keys gave {count}")
        keys = self.keys.to(x.device).repeat_interleave(x.shape[0] // len(self.keys))  # [B]
        size = x[0].numel()
        places = torch.arange(size, device=x.device) + (self.number << 40)
        kept = uniform(keys[:, None] + (places * _GOLDEN)[None]) >= self.p  # [B, size]
        return x * kept.view(x.shape).to(x.dtype) / (1 - self.p)


def uniform(z: Tensor) -> Tensor:
    """Pseudo-random numbers in [0, 1), float32 of 24 bits, from int64 of any shape: SplitMix64's output function."""

    def shifted(value: Tensor, bits: int) -> Tensor:
        # A logical shift; int64's own shift keeps the sign
        return (value >> bits) & ((1 << (64 - bits)) - 1)

    z = (z ^ shifted(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ shifted(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    z = z ^ shifted(z, 31)
    return shifted(z, 40).float() / (1 << 24)


def replace_dropout(module: nn.Module) -> list[SampleDropout]:
    """Replace each nn.Dropout with p > 0 in a module by a SampleDropout; returns these, in the module's order."""
    layers: list[SampleDropout] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Dropout and child.p > 0:
                layers.append(SampleDropout(child.p, len(layers)))
                setattr(parent, name, layers[-1])
    return layers


def set_keys(layers: list[SampleDropout], seed: int, step: int, rows: Tensor) -> None:
    """Give dropout layers the keys of a batch's samples, which follow from seed, step and row.

    rows: the samples' places in the global batch, int64 [B].
    """
    if not layers:
        return
    base = derive_seed(seed, "dropout", step)
    keys = (rows.long() + 1) * -4417276706812531889 + base  # 0xC2B2AE3D27D4EB4F, far from the stride of places
    for layer in layers:
        layer.keys = keys
