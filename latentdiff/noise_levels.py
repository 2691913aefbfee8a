"""Which times are trained: distributions of t over [t_min, t_max] of a schedule, given by their quantile functions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.random import Generators, rand


class NoiseLevels:
    """A distribution of t over [t_min, t_max] of a schedule.

    Args:
        schedule: gives t_min and t_max.
        quantile: quantile(u) -> the t below which a share u of the draws lie, float64, of the shape of u.
        density: density(t) of the distribution, where `correction` is to divide it out of the loss. None: levels that are drawn
            more often are meant to have more weight.
        in_strata: spread the draws of a batch evenly over the distribution.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        quantile: Callable[[Tensor], Tensor],
        density: Callable[[Tensor], Tensor] | None = None,
        in_strata: bool = False,
    ):
        self.schedule, self._quantile, self._density, self.in_strata = schedule, quantile, density, in_strata

    def quantile(self, u: Tensor) -> Tensor:
        """The t in [t_min, t_max] below which a share u of the draws lie. u: float64 in [0, 1], of any shape."""
        return self._quantile(u).clamp(self.schedule.t_min, self.schedule.t_max)

    def sample(self, batch: int, generator: Generators = None, device: torch.device | str | None = None) -> Tensor:
        """Draw t [batch], float64.

        The draws are independent. In strata, one is from each of `batch` parts of equal probability, in random order: every t
        has the same distribution, but the mean loss of the batch has a smaller variance (VDM, arXiv 2107.00630, appendix I.1).

        Args:
            batch: how many.
            generator: None, one, or (not in strata) a list with one per sample.
            device: of the result.

        Raises:
            ValueError: a list of generators in strata.
        """
        u = rand((batch,), generator, device, torch.float64)
        if self.in_strata:
            if not (generator is None or isinstance(generator, torch.Generator)):
                raise ValueError("strata are drawn for the batch as a whole: pass one generator, not one per sample")
            place = torch.randperm(batch, generator=generator, device=generator.device if generator else None)
            u = (place.to(u.device) + u) / batch
        return self.quantile(u)

    def midpoints(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """t [n], float64, rising: the midpoints of n strata of equal probability. For a repeatable validation loss."""
        return self.quantile((torch.arange(n, dtype=torch.float64, device=device) + 0.5) / n)

    def correction(self, t: Tensor) -> Tensor:
        """The factor on a loss at t [B], float64 [B]: uniform density / own density for importance sampling, else 1.

        With it the mean loss is that of uniform times, whatever the levels.
        """
        if self._density is None:
            return torch.ones_like(t, dtype=torch.float64)
        return 1 / ((self.schedule.t_max - self.schedule.t_min) * self._density(t))


def _uniform(s: NoiseSchedule) -> NoiseLevels:
    return NoiseLevels(s, lambda u: s.t_min + (s.t_max - s.t_min) * u)


def _logit_normal(s: NoiseSchedule, mean: float, std: float) -> NoiseLevels:
    return NoiseLevels(s, lambda u: s.t_min + (s.t_max - s.t_min) * torch.sigmoid(mean + std * torch.special.ndtri(u)))


def _log_normal(s: NoiseSchedule, mean: float, std: float) -> NoiseLevels:
    """ln(sigma/alpha) is normal, cut off at t_min and t_max: the normal's own quantiles between these."""
    low, high = torch.special.ndtr((_log_ratio_ends(s) - mean) / std)
    return NoiseLevels(s, lambda u: s.time_from_log_snr(-2 * (mean + std * torch.special.ndtri(low + (high - low) * u))))


def _importance(s: NoiseSchedule) -> NoiseLevels:
    """Density proportional to g^2/sigma^2 = -d log-SNR/dt, so the quantile is a straight line in log-SNR."""
    low, high = _log_ratio_ends(s)
    span = 2 * (high - low)  # of the log-SNR
    return NoiseLevels(
        s,
        lambda u: s.time_from_log_snr(-2 * low - span * u),
        lambda t: s.diffusion(t) ** 2 / (s.sigma(t) ** 2 * span),
    )


def _log_ratio_ends(s: NoiseSchedule) -> Tensor:
    """ln(sigma / alpha) at t_min and t_max, [2]."""
    return -0.5 * s.log_snr(torch.tensor([s.t_min, s.t_max], dtype=torch.float64))


_LEVELS: dict[str, tuple[Callable[..., NoiseLevels], dict[str, Any]]] = {
    "uniform": (_uniform, {}),
    "log_normal": (_log_normal, {"mean": -0.5, "std": 1.2}),
    "logit_normal": (_logit_normal, {"mean": 0.0, "std": 1.0}),
    "importance": (_importance, {}),
    "stratified": (_uniform, {"stratified": True}),
}


def names() -> list[str]:
    """The names that `make_noise_levels` takes."""
    return list(_LEVELS)


def make_noise_levels(name: str, schedule: NoiseSchedule, **params: Any) -> NoiseLevels:
    """A distribution of t over [schedule.t_min, schedule.t_max], by name.

    Args:
        name: one of these. All but "stratified" have a parameter stratified=False.
            "uniform".
            "log_normal": mean=-0.5, std=1.2; ln(sigma/alpha) is normal (EDM, arXiv 2206.00364, table 1). The paper's mean of
                -1.2 is for data of standard deviation 0.5; for latents, of standard deviation 1, that is -0.5.
            "logit_normal": mean=0, std=1, over t stretched to [0, 1] (Stable Diffusion 3, arXiv 2403.03206, eq. 19).
            "importance": importance sampling for the likelihood weighting, with a density proportional to g^2/sigma^2 (Maximum
                likelihood training, arXiv 2101.09258, section 5). The loss is corrected for it, so that its mean stays that of
                uniform times.
            "stratified": uniform, with each batch spread evenly.
        schedule: gives t_min and t_max.
        params: the distribution's parameters, by keyword.

    Raises:
        UserError: an unknown name or parameter, or a value out of range.
    """
    if name not in _LEVELS:
        raise UserError(f"noise_levels: {name!r} is unknown; valid: {', '.join(_LEVELS)}")
    build, defaults = _LEVELS[name]
    defaults = {"stratified": False, **defaults}
    for key in params:
        if key not in defaults:
            raise UserError(f"noise_levels: {name} has no parameter {key!r}; valid: {', '.join(reversed(defaults))}")
        if not isinstance(params[key], (int, float)):
            raise UserError(f"noise_levels: {name}'s {key} must be a number or true or false, not {params[key]!r}")
    settings = {**defaults, **params}
    in_strata = settings.pop("stratified")
    if settings.get("std", 1.0) <= 0:
        raise UserError(f"noise_levels: std must be above 0, not {settings['std']}")
    levels = build(schedule, **settings)
    levels.in_strata = bool(in_strata)
    return levels
