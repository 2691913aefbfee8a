"""Training in float16: the loss is multiplied by a factor, so that small gradients do not vanish in 16 bits.

Mixed Precision Training (arXiv:1710.03740, section 3.2). torch's GradScaler keeps the factor: it halves it where a gradient
overflowed, and doubles it after 2,000 steps in a row that did not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LEAST = 1.0  # below it nothing is gained: what overflows then is the network itself


class LossScale:
    """The factor of a run, the same on every process. In any precision but float16 it is 1 and nothing is done.

    A step multiplies its loss by it (`scaled`), and divides the gradients before it looks at them (`unscale`). The step is
    then either taken by all optimizers and closed (`stepped`), or taken again at a smaller factor (`lowered`).
    """

    def __init__(self, precision: str, device: torch.device):
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")  # type: ignore[attr-defined]

    @property
    def enabled(self) -> bool:
        return self.scaler.is_enabled()

    def factor(self) -> float:
        """What the loss is multiplied by."""
        return float(self.scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        return self.scaler.scale(loss)

    def unscale(self, *optimizers: Any) -> None:
        """Divide the gradients of these optimizers' parameters; accelerate's wrappers are taken off."""
        for optimizer in optimizers:
            self.scaler.unscale_(getattr(optimizer, "optimizer", optimizer))

    def stepped(self) -> None:
        """All optimizers have taken the step: the factor may grow."""
        self.scaler.update()

    def lowered(self) -> bool:
        """Halve the factor, since a gradient overflowed; whether the step is worth another try.

        Without a factor, and where it has come below LEAST, it is not: then the step is wrong by itself.
        """
        if not self.enabled:
            return False
        self.scaler.update()
        return self.factor() >= LEAST

    def logged(self) -> dict[str, Tensor]:
        """What a step reports of it: nothing without a factor."""
        return {"loss_scale": torch.tensor(self.factor())} if self.enabled else {}

    def state(self) -> dict[str, Tensor]:
        """For a training state: the factor, and how many steps it has gone well. Empty without a factor."""
        if not self.enabled:
            return {}
        values = self.scaler.state_dict()
        return {
            "factor": torch.tensor(values["scale"], dtype=torch.float64),
            "growth": torch.tensor(values["_growth_tracker"], dtype=torch.int64),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what `state` gave."""
        if not self.enabled or not tensors:
            return
        values = self.scaler.state_dict()
        self.scaler.load_state_dict(values | {"scale": float(tensors["factor"]), "_growth_tracker": int(tensors["growth"])})
