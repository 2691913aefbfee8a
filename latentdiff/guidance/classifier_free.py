"""Classifier-free guidance."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.common import Interval, check_options, replaced, touched
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import per_sample


class ClassifierFree:
    """Classifier-free guidance (2207.12598 eq. 6 with scale = 1 + w): uncond + scale (cond - uncond), every channel.

    denoiser: a Denoiser or another guidance, called with `conditional` or `unconditional` (the same keys; tensors are
    [B, ...], in a dict too, as SDXL's added_cond_kwargs has them; anything else must be equal in both).  Both go through
    it in one forward of 2 B samples.
    scale: 1 is off, one forward of B samples, and `unconditional` is not looked at.
    interval: (low, high) in t, 2404.07724; a sample whose t is outside gets the conditional prediction alone, and costs
    one forward.
    rescale: phi of 2305.08891 eq. 15-16 in [0, 1], applied to x0: its standard deviation, per sample, goes from the
    guided one (0) to the conditional one (1).
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        conditional: dict[str, Any],
        unconditional: dict[str, Any],
        scale: float,
        interval: Interval = None,
        rescale: float = 0.0,
    ):
        check_options(interval, rescale)
        if scale != 1 and conditional.keys() != unconditional.keys():
            raise UserError(
                f"guidance: conditional has {sorted(conditional)} and unconditional {sorted(unconditional)}; "
                "the keys must be the same"
            )
        self.denoiser, self.conditional, self.unconditional = denoiser, conditional, unconditional
        self.scale, self.interval, self.rescale = scale, interval, rescale
        self.schedule: NoiseSchedule = denoiser.schedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """x: [B, ...]; t: float or [B]; conditioning: given to both branches, [B, ...] where it is a tensor."""
        times = per_sample(t, x)
        conditional = {**conditioning, **self.conditional}
        rows = touched(times, self.scale != 1, self.interval)
        if not bool(rows.any()):
            return self.denoiser(x, times, **conditional)
        guided = rows.nonzero()[:, 0]  # [G]
        unconditional = {**conditioning, **self.unconditional}
        both = self.denoiser(
            torch.cat([x, x[guided]]),  # [B + G, ...]
            torch.cat([times, times[guided]]),
            **{key: _joined(key, conditional[key], unconditional[key], guided) for key in conditional},
        )
        seen = Denoised(both.x0[: len(x)], both.eps[: len(x)], self.schedule, times)
        x0 = torch.lerp(both.x0[len(x) :], seen.x0[guided], self.scale)  # [G, ...]
        eps = torch.lerp(both.eps[len(x) :], seen.eps[guided], self.scale)
        x0, eps = seen.x0.index_copy(0, guided, x0), seen.eps.index_copy(0, guided, eps)
        return replaced(x, seen, x0, eps, rows, self.rescale)


def _joined(key: str, conditional: Any, unconditional: Any, guided: Tensor) -> Any:
    if isinstance(conditional, Tensor) and isinstance(unconditional, Tensor):
        return torch.cat([conditional, unconditional[guided.to(unconditional.device)]])
    if isinstance(conditional, dict) and isinstance(unconditional, dict) and conditional.keys() == unconditional.keys():
        return {name: _joined(f"{key}.{name}", conditional[name], unconditional[name], guided) for name in conditional}
    if conditional is not unconditional and conditional != unconditional:
        raise UserError(f"guidance: {key} must be a tensor in both conditions, or equal in both")
    return conditional
