"""Exponential moving average of weights, with a warm-up: the average of a short run is not mostly its start."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from latentdiff.training.distributed import fill, local, split


class Ema:
    """Running averages of a module's weights: avg <- d avg + (1 - d) w, d = min(decay, 1 - (1 + k)^-power), k = 1, 2, ...

    Floating-point parameters and buffers are averaged, others are copied. Parameters that are frozen at the start stay as
    they are, to the bit (averaging would make 0.0 of -0.0). Of a sharded module each process averages its rows.

    Args:
        module: its weights are where the averages start.
        decay: the largest decay d, below 1.
        power: how fast d rises to it.
        only: the names of the weights that are averaged; None: all of them.
    """

    def __init__(self, module: nn.Module, decay: float, power: float, only: Collection[str] | None = None):
        self.decay, self.power, self.updates = decay, power, 0
        weights = {key: value for key, value in module.state_dict().items() if only is None or key in only}
        self.average = {key: value.detach().clone() for key, value in weights.items()}
        self.frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}

    def decay_at(self, update: int) -> float:
        """The decay d of an update; the first one is 1."""
        return min(self.decay, 1.0 - (1.0 + update) ** -self.power)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Average in the module's weights, after a step of the optimizer."""
        self.updates += 1
        rate = 1.0 - self.decay_at(self.updates)
        averages, values = [], []
        for key, value in module.state_dict().items():
            if key in self.frozen or key not in self.average:
                continue
            average, value = local(self.average[key]), local(value.detach())
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, rate)

    def copy_to(self, module: nn.Module) -> None:
        """Copy the averages into a module of the same kind that is not sharded. Every process calls it."""
        fill(module, self.average)

    def state(self) -> dict[str, Tensor]:
        """The averages by name, in the same memory."""
        return self.average

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Continue from whole averages, after so many updates."""
        for key, value in self.average.items():
            value.copy_(split(tensors[key], value))
        self.updates = updates
