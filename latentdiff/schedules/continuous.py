"""Schedules given by a formula in t."""

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules.base import SCHEDULERS, NoiseSchedule, Time, VariancePreserving, diffusers_class, f64


class VP(VariancePreserving):
    """Variance preserving, beta(t) linear from beta_min to beta_max: 2011.13456 eq. 32-33."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def _log_alpha(self, t: Time) -> Tensor:
        t = f64(t)
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _beta(self, t: Time) -> Tensor:
        return self.beta_min + f64(t) * (self.beta_max - self.beta_min)

    def alpha(self, t: Time) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Time) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def d_alpha(self, t: Time) -> Tensor:
        return -0.5 * self._beta(t) * self.alpha(t)

    def d_sigma(self, t: Time) -> Tensor:
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def _time_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # (b1 - b0) t^2 / 4 + b0 t / 2 = c, in the form that does not cancel when t is small.
        c, slope = -log_alpha, self.beta_max - self.beta_min
        return 4 * c / (self.beta_min + (self.beta_min**2 + 4 * slope * c).sqrt())

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return self._time_from_log_alpha(0.5 * torch.nn.functional.logsigmoid(f64(log_snr)))


class SubVP(VP):
    """alpha as VP, sigma = 1 - alpha^2: 2011.13456 eq. 29 and appendix B.  The U-Net is fed 1000 t."""

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))

    def d_sigma(self, t: Time) -> Tensor:
        return self._beta(t) * self.alpha(t) ** 2

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        # sigma / alpha = 1/alpha - alpha = 2 sinh(-log alpha).
        return self._time_from_log_alpha(-torch.asinh(0.5 * torch.exp(-0.5 * f64(log_snr))))

    timestep = NoiseSchedule.timestep
    time_from_timestep = NoiseSchedule.time_from_timestep
    to_scheduler = NoiseSchedule.to_scheduler


class VE(NoiseSchedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t, 2011.13456 eq. 31.

    sigma(0) is sigma_min, not 0: t_min is 0.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max
        self._rate = math.log(sigma_max / sigma_min)

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(f64(t))

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * f64(t))

    def d_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(f64(t))

    def d_sigma(self, t: Time) -> Tensor:
        return self._rate * self.sigma(t)

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return (-0.5 * f64(log_snr) - math.log(self.sigma_min)) / self._rate


class Cosine(VariancePreserving):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2): 2102.09672 eq. 17 without offset, 2301.11093 eq. 2."""

    t_max = 0.999  # alpha(1) is 0: x0 cannot be had from eps there

    def alpha(self, t: Time) -> Tensor:
        return torch.cos(0.5 * math.pi * f64(t))

    def sigma(self, t: Time) -> Tensor:
        return torch.sin(0.5 * math.pi * f64(t))

    def d_alpha(self, t: Time) -> Tensor:
        return -0.5 * math.pi * self.sigma(t)

    def d_sigma(self, t: Time) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-0.5 * f64(log_snr)))


class RectifiedFlow(NoiseSchedule):
    """The straight path alpha = 1 - t, sigma = t: 2209.03003, 2210.02747.  The U-Net is fed 1000 t."""

    t_max = 0.999  # alpha(1) is 0: x0 cannot be had from eps or a score there; from a flow prediction it can

    def alpha(self, t: Time) -> Tensor:
        return 1 - f64(t)

    def sigma(self, t: Time) -> Tensor:
        return f64(t)

    def d_alpha(self, t: Time) -> Tensor:
        return -torch.ones_like(f64(t))

    def d_sigma(self, t: Time) -> Tensor:
        return torch.ones_like(f64(t))

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.sigmoid(-0.5 * f64(log_snr))

    def to_scheduler(self, name: str | None = None, prediction: str = "flow", **config: Any) -> Any:
        name = name or SCHEDULERS[-1]
        if name != SCHEDULERS[-1] or prediction != "flow":
            raise UserError(
                f"scheduler: {name} with prediction {prediction} is not possible for RectifiedFlow; "
                f"valid: {SCHEDULERS[-1]} with flow"
            )
        return diffusers_class(name)(**{"num_train_timesteps": 1000, "shift": 1.0, **config})
