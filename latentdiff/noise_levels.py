"""Which times are trained: distributions over [t_min, t_max] of a schedule, given by their quantile function."""

from collections.abc import Callable

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.rng import Generators, rand
from latentdiff.schedules import NoiseSchedule


class NoiseLevels:
    """A distribution of t with quantile(u) on [0, 1], stretched over the schedule's usable interval."""

    def __init__(self, schedule: NoiseSchedule, quantile: Callable[[Tensor], Tensor]):
        self.schedule, self._quantile = schedule, quantile

    def quantile(self, u: Tensor) -> Tensor:
        """t below which a share u of the draws lie: u float64 in [0, 1] -> t in [t_min, t_max]."""
        low, high = self.schedule.t_min, self.schedule.t_max
        return (low + (high - low) * self._quantile(u)).clamp(low, high)

    def sample(
        self, batch: int, generator: Generators = None, device: torch.device | str | None = None
    ) -> Tensor:
        """t [batch], float64, independent draws; generator: None, one, or one per sample."""
        return self.quantile(rand((batch,), generator, device, torch.float64))

    def stratified(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """t [n], float64, rising: the midpoints of n strata of equal probability.  For a repeatable validation loss."""
        return self.quantile((torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n)


def _uniform(u: Tensor) -> Tensor:
    return u


def _logit_normal(mean: float, std: float) -> Callable[[Tensor], Tensor]:
    return lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u))


_DEFAULTS: dict[str, dict[str, float]] = {"uniform": {}, "logit_normal": {"mean": 0.0, "std": 1.0}}


def names() -> list[str]:
    """The names `make_noise_levels` knows."""
    return list(_DEFAULTS)


def make_noise_levels(name: str, schedule: NoiseSchedule, **params: float) -> NoiseLevels:
    """uniform, or logit_normal(mean=0, std=1) over t (2403.03206 eq. 19).

    Either is stretched over [schedule.t_min, schedule.t_max].  UserError for an unknown name or parameter.
    """
    if name not in _DEFAULTS:
        raise UserError(f"noise_levels: {name!r} is unknown; valid: {', '.join(_DEFAULTS)}")
    for key in params:
        if key not in _DEFAULTS[name]:
            valid = ", ".join(_DEFAULTS[name]) or "none"
            raise UserError(f"noise_levels: {name} has no parameter {key!r}; valid: {valid}")
    settings = {**_DEFAULTS[name], **params}
    if settings.get("std", 1.0) <= 0:
        raise UserError(f"noise_levels: std must be above 0, not {settings['std']}")
    return NoiseLevels(schedule, _logit_normal(**settings) if name == "logit_normal" else _uniform)
