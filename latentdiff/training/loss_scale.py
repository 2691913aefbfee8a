"""Training in float16: the loss is multiplied by a factor, so that small gradients do not become 0 in 16 bits.

Mixed Precision Training (arXiv:1710.03740, section 3.2). torch's GradScaler keeps the factor: it halves it after a gradient
overflowed, and doubles it after 2,000 steps in a row without one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SMALLEST = 1.0  # at a smaller factor still, it is the network itself that overflows


class LossScale:
    """The factor of a run, the same on every process. In any precision but float16 it is 1, and every method does nothing.

    A training step multiplies its loss by the factor (`scaled`) and later divides the gradients by it (`unscale`). Then
    either all optimizers take the step and it is closed (`stepped`), or it is repeated with a smaller factor (`lowered`).
    """

    def __init__(self, precision: str, device: torch.device):
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")  # type: ignore[attr-defined]

    @property
    def enabled(self) -> bool:
        """Whether the run is in float16."""
        return self.scaler.is_enabled()

    def factor(self) -> float:
        """The factor; 1 unless in float16."""
        return float(self.scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the factor, for the backward pass."""
        return self.scaler.scale(loss)

    def unscale(self, *optimizers: Any) -> None:
        """Divide the gradients of these optimizers' parameters by the factor. They may be wrapped by accelerate."""
        for optimizer in optimizers:
            self.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))

    def stepped(self) -> None:
        """Close a step that all optimizers have taken: the factor may grow."""
        self.scaler.update()

    def lowered(self) -> bool:
        """Halve the factor after a gradient overflowed. Returns whether to repeat the step.

        False without a factor, and where it is below SMALLEST: then the step would fail at any factor.
        """
        if not self.enabled:
            return False
        self.scaler.update()
        return self.factor() >= SMALLEST

    def logged(self) -> dict[str, Tensor]:
        """The factor for a step's log; {} without one."""
        return {"loss_scale": torch.tensor(self.factor())} if self.enabled else {}

    def state(self) -> dict[str, Tensor]:
        """For a training state: the factor, and how many steps in a row went well. {} without a factor."""
        if not self.enabled:
            return {}
        values = self.scaler.state_dict()
        return {
            "factor": torch.tensor(values["scale"], dtype=torch.float64),
            "growth": torch.tensor(values["_growth_tracker"], dtype=torch.int64),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from what `state` gave."""
        if not self.enabled or not tensors:
            return
        values = self.scaler.state_dict()
        self.scaler.load_state_dict(values | {"scale": float(tensors["factor"]), "_growth_tracker": int(tensors["growth"])})
