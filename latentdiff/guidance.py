"""Guidance: denoisers made of denoisers.  Samplers never know."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.denoiser import Denoised, Denoiser
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.tensors import flat_std, per_sample, widen


class ClassifierFree:
    """Classifier-free guidance (2207.12598 eq. 6 with scale = 1 + w): uncond + scale (cond - uncond), every channel.

    denoiser: a Denoiser or another guidance, called with `conditional` or `unconditional` (the same keys; tensors are
    [B, ...], anything else must be equal in both).  Both go through it in one forward of 2 B samples.
    scale: 1 is off, one forward of B samples, and `unconditional` is not looked at.
    interval: (low, high) in t, 2404.07724; a sample whose t is outside gets the conditional prediction alone, and costs
    one forward.
    rescale: phi of 2305.08891 eq. 15-16 in [0, 1], applied to x0: its standard deviation, per sample, goes from the
    guided one (0) to the conditional one (1); eps follows from x0, so that x_t = alpha x0 + sigma eps still holds.
    """

    def __init__(
        self,
        denoiser: "Denoiser | ClassifierFree",
        conditional: dict[str, Any],
        unconditional: dict[str, Any],
        scale: float,
        interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ):
        if interval is not None and not interval[0] <= interval[1]:
            raise UserError(f"guidance interval: {interval} is not (low, high) in t with low <= high")
        if not 0 <= rescale <= 1:
            raise UserError(f"guidance rescale: {rescale} is not in [0, 1]")
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
        guided = self._guided(times)  # [G]
        if guided.numel() == 0:
            return self.denoiser(x, times, **conditional)
        unconditional = {**conditioning, **self.unconditional}
        both = self.denoiser(
            torch.cat([x, x[guided]]),  # [B + G, ...]
            torch.cat([times, times[guided]]),
            **{key: _joined(key, conditional[key], unconditional[key], guided) for key in conditional},
        )
        batch = x.shape[0]
        cond_x0, cond_eps = both.x0[:batch], both.eps[:batch]
        x0 = torch.lerp(both.x0[batch:], cond_x0[guided], self.scale)  # [G, ...]
        eps = torch.lerp(both.eps[batch:], cond_eps[guided], self.scale)
        if self.rescale > 0:
            x0 = self._rescaled(x0, cond_x0[guided])
            alpha, sigma = self.schedule.alpha(times[guided]), self.schedule.sigma(times[guided])
            eps = (x[guided].to(x0.dtype) - widen(alpha, x0) * x0) / widen(sigma, x0)
        return Denoised(cond_x0.index_copy(0, guided, x0), cond_eps.index_copy(0, guided, eps), self.schedule, times)

    def _guided(self, times: Tensor) -> Tensor:
        """Indices of the samples that are guided at their t: int64 [G]."""
        inside = torch.full_like(times, self.scale != 1, dtype=torch.bool)
        if self.interval is not None:
            inside &= (times >= self.interval[0]) & (times <= self.interval[1])
        return inside.nonzero()[:, 0]

    def _rescaled(self, x0: Tensor, cond_x0: Tensor) -> Tensor:
        ratio = flat_std(cond_x0) / flat_std(x0)  # [G]
        return x0 * widen(1 + self.rescale * (ratio - 1), x0)


def _joined(key: str, conditional: Any, unconditional: Any, guided: Tensor) -> Any:
    if isinstance(conditional, Tensor) and isinstance(unconditional, Tensor):
        return torch.cat([conditional, unconditional[guided.to(unconditional.device)]])
    if conditional is not unconditional and conditional != unconditional:
        raise UserError(f"guidance: {key} must be a tensor in both conditions, or equal in both")
    return conditional
