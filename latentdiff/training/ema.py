"""Exponential moving average of weights, with a warm-up so that a short run is not mostly its own start."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentdiff.training.distributed import fill, local, split


class Ema:
    """Keeps avg <- d avg + (1 - d) w with d = min(decay, 1 - (1 + k)^-power) at update k = 1, 2, ...

    Only floating-point parameters and buffers are averaged; others follow the model, and parameters frozen from the start
    stay to the bit (averaging makes 0.0 of -0.0). Of a sharded module's each process averages its rows.
    """

    def __init__(self, module: nn.Module, decay: float, power: float):
        self.decay, self.power, self.updates = decay, power, 0
        self.average = {key: value.detach().clone() for key, value in module.state_dict().items()}
        self.frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}

    def decay_at(self, update: int) -> float:
        return min(self.decay, 1.0 - (1.0 + update) ** -self.power)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        rate = 1.0 - self.decay_at(self.updates)
        averages, values = [], []
        for key, value in module.state_dict().items():
            if key in self.frozen:
                continue
            average, value = local(self.average[key]), local(value.detach())
            if value.is_floating_point():
                averages.append(average)
                values.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(averages, values, rate)

    def memory(self) -> float:
        """Updates the average looks back over, about 1 / (1 - decay) once warm."""
        return 1.0 / (1.0 - self.decay)

    def copy_to(self, module: nn.Module) -> None:
        """Into an unsharded module of the same kind. Every process calls it where the averages are sharded."""
        fill(module, self.average)

    def state(self) -> dict[str, Tensor]:
        return self.average

    def restore(self, tensors: dict[str, Tensor], updates: int) -> None:
        for key, value in self.average.items():
            value.copy_(split(tensors[key], value))
        self.updates = updates
