"""Noise schedules that are given by a formula in t."""

import math
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules.base import (
    SIGMA_OPTIONS,
    NoiseSchedule,
    Time,
    VariancePreserving,
    f64,
    make_scheduler,
    reads_scheduler,
)


class VP(VariancePreserving):
    """Variance preserving, with beta(t) linear from beta_min to beta_max (Score SDE, arXiv 2011.13456, eq. 32-33).

    alpha = exp(-t^2 (beta_max - beta_min) / 4 - t beta_min / 2). UserError unless 0 <= beta_min <= beta_max and beta_max > 0.
    """

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        if not 0 <= beta_min <= beta_max or beta_max == 0:
            raise UserError(f"schedule: beta_min {beta_min}, beta_max {beta_max}: must be 0 <= beta_min <= beta_max > 0")
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

    def diffusion(self, t: Time) -> Tensor:
        t = f64(t)  # at t = 0 sigma' is infinite and sigma is 0; g^2 is beta_min there
        return torch.where(t == 0, self._beta(t).sqrt(), super().diffusion(t))

    def _time_from_log_alpha(self, log_alpha: Tensor) -> Tensor:
        # (b1 - b0) t^2 / 4 + b0 t / 2 = c, in the form that does not cancel when t is small.
        c, slope = -log_alpha, self.beta_max - self.beta_min
        return 4 * c / (self.beta_min + (self.beta_min**2 + 4 * slope * c).sqrt())

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return self._time_from_log_alpha(0.5 * torch.nn.functional.logsigmoid(f64(log_snr)))


class SubVP(VP):
    """Sub-variance preserving: alpha as in `VP`, sigma = 1 - alpha^2 (Score SDE, arXiv 2011.13456, eq. 29 and appendix B).

    The U-Net is given 1000 t. diffusers has no such scheduler.
    """

    def sigma(self, t: Time) -> Tensor:
        return -torch.expm1(2 * self._log_alpha(t))

    def d_sigma(self, t: Time) -> Tensor:
        return self._beta(t) * self.alpha(t) ** 2

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        # sigma / alpha = 1/alpha - alpha = 2 sinh(-log alpha).
        return self._time_from_log_alpha(-torch.asinh(0.5 * torch.exp(-0.5 * f64(log_snr))))

    default_scheduler = None
    diffusion = NoiseSchedule.diffusion
    timestep = NoiseSchedule.timestep
    time_from_timestep = NoiseSchedule.time_from_timestep
    to_scheduler = NoiseSchedule.to_scheduler


class Exploding(NoiseSchedule):
    """A schedule with alpha = 1.

    x grows with sigma, so the U-Net is given x / sqrt(sigma^2 + sigma_data^2) (c_in of EDM, arXiv 2206.00364, table 1).
    """

    def alpha(self, t: Time) -> Tensor:
        return torch.ones_like(f64(t))

    def d_alpha(self, t: Time) -> Tensor:
        return torch.zeros_like(f64(t))

    def input_scale(self, t: Time) -> Tensor:
        return (self.sigma(t) ** 2 + self.sigma_data**2).rsqrt()


class VE(Exploding):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Score SDE, arXiv 2011.13456, eq. 30-31).

    sigma(0) is sigma_min, not 0, and t_min is 0. UserError unless 0 < sigma_min < sigma_max.
    """

    t_min = 0.0

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0):
        _check_sigmas(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max
        self.prior_std = sigma_max
        self._rate = math.log(sigma_max / sigma_min)

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * f64(t))

    def d_sigma(self, t: Time) -> Tensor:
        return self._rate * self.sigma(t)

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return (-0.5 * f64(log_snr) - math.log(self.sigma_min)) / self._rate


class EDM(Exploding):
    """The schedule of EDM (arXiv 2206.00364, table 1): alpha = 1, sigma = sigma_max t. The U-Net is given ln(sigma) / 4.

    A network is trained from sigma_min up. sigma(0) is 0, so the last step of sampling may end on data, as in the paper.
    UserError unless 0 < sigma_min < sigma_max.
    """

    counts_steps = False
    default_scheduler = "EDMEulerScheduler"

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, sigma_data: float = 1.0):
        _check_sigmas(sigma_min, sigma_max)
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, sigma_data
        self.t_min, self.prior_std = sigma_min / sigma_max, sigma_max

    def sigma(self, t: Time) -> Tensor:
        return self.sigma_max * f64(t)

    def d_sigma(self, t: Time) -> Tensor:
        return torch.full_like(f64(t), self.sigma_max)

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        return torch.exp(-0.5 * f64(log_snr)) / self.sigma_max

    def timestep(self, t: Time) -> Tensor:
        """ln(sigma) / 4: c_noise of EDM (arXiv 2206.00364, table 1), which EDMEulerScheduler of diffusers has for timesteps."""
        return 0.25 * self.sigma(t).log()

    def time_from_timestep(self, timestep: Time) -> Tensor:
        """exp(4 timestep) / sigma_max: the inverse of `timestep`."""
        return torch.exp(4 * f64(timestep)) / self.sigma_max

    def to_scheduler(self, name: str | None = None, prediction: str = "edm", **config: Any) -> Any:
        """EDMEulerScheduler, for the prediction "edm"; see `NoiseSchedule.to_scheduler`."""
        name = name or self.default_scheduler
        if name != self.default_scheduler or prediction != "edm":
            raise UserError(
                f"scheduler: {name} with prediction {prediction} is not possible for EDM; "
                f"valid: {self.default_scheduler} with edm"
            )
        own = {key: getattr(self, key) for key in ("sigma_min", "sigma_max", "sigma_data")}
        settings = {"num_train_timesteps": self.num_steps, "prediction_type": "epsilon", **own, **config}
        return make_scheduler(name, settings)


class Cosine(VariancePreserving):
    """The cosine schedule alpha = cos(pi t / 2), sigma = sin(pi t / 2).

    Improved DDPM (arXiv 2102.09672) eq. 17 without its offset; Simple Diffusion (arXiv 2301.11093) eq. 2.
    """

    t_max = 0.999  # alpha(1) is 0: x0 cannot be computed from eps there

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
    """The straight path alpha = 1 - t, sigma = t (Rectified Flow, arXiv 2209.03003; Flow Matching, arXiv 2210.02747).

    The U-Net is given num_steps t.
    """

    t_max = 0.999  # alpha(1) is 0: x0 cannot be computed from eps or a score there; from a flow prediction it can
    # Not FlowMatchEuler: its grid does not fit what is trained, see `to_scheduler`
    default_scheduler = "DPMSolverMultistepScheduler"

    def __init__(self, num_steps: int = 1000):
        self.num_steps = num_steps

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
        """DPMSolverMultistepScheduler or UniPCMultistepScheduler on flow sigmas, or FlowMatchEulerDiscreteScheduler; see
        `NoiseSchedule.to_scheduler`.

        The first has the grid 0.999 (1 - i/n), i = 0 ... n, which starts at t_max. The second (UniPC, arXiv 2302.04867) has
        1 - 0.999 i/n, and then 0: it starts at t = 1, a little beyond what is trained. The third goes evenly from 1 to 0.001 in
        n - 1 steps, and then to 0: it also starts at t = 1, and its last step does almost nothing, so n = 2 is one step. No
        entry of its config changes that; a caller may pass it `sigmas`.

        flow_shift or shift bend the grid (Stable Diffusion 3, arXiv 2403.03206, eq. 23); the path stays straight.
        """
        name = name or self.default_scheduler
        if name not in _FLOW_SETTINGS or prediction != "flow":
            raise UserError(
                f"scheduler: {name} with prediction {prediction} is not possible for RectifiedFlow; "
                f"valid: {', '.join(_FLOW_SETTINGS)} with flow"
            )
        settings = {"num_train_timesteps": self.num_steps, **_FLOW_SETTINGS[name], **config}
        other_grids = [key for key in (*SIGMA_OPTIONS, "use_lu_lambdas") if settings.get(key)]
        if other_grids and name != "FlowMatchEulerDiscreteScheduler":  # diffusers would use the sigmas of betas
            raise UserError(f"scheduler: {name} does not run a flow with {', '.join(other_grids)}; leave it out")
        shift = settings.get("shift", settings.get("flow_shift", 1.0))
        # The same shift under the other schedulers' names, so that from_config makes any of them from this config
        others = {**_ON_FLOW_SIGMAS, "flow_shift": shift, "shift": shift}
        return make_scheduler(name, settings, others=others)


# final_sigmas_type "sigma_min" would end on the first beta of a schedule that is not used here. "zero" also makes the last step
# one of first order, which ends on its x0 whatever solver_order and lower_order_final are
_ON_FLOW_SIGMAS = {
    "use_flow_sigmas": True,
    "prediction_type": "flow_prediction",
    "flow_shift": 1.0,
    "final_sigmas_type": "zero",
}
_FLOW_SETTINGS: dict[str, dict[str, Any]] = {
    "FlowMatchEulerDiscreteScheduler": {"shift": 1.0},
    "DPMSolverMultistepScheduler": _ON_FLOW_SIGMAS,
    "UniPCMultistepScheduler": _ON_FLOW_SIGMAS,
}


@reads_scheduler
def _edm_of(scheduler: Any) -> EDM | None:
    """EDM, where the scheduler's config has a sigma_data."""
    config = scheduler.config
    return EDM(config["sigma_min"], config["sigma_max"], config["sigma_data"]) if "sigma_data" in config else None


@reads_scheduler
def _flow_of(scheduler: Any) -> RectifiedFlow | None:
    """RectifiedFlow, where the scheduler runs on flow sigmas."""
    config = scheduler.config
    is_flow = config.get("use_flow_sigmas") or ("beta_start" not in config and "shift" in config)
    return RectifiedFlow(config["num_train_timesteps"]) if is_flow and "sigma_data" not in config else None


def _check_sigmas(low: float, high: float) -> None:
    if not 0 < low < high:
        raise UserError(f"schedule: sigma_min {low} and sigma_max {high} must be 0 < sigma_min < sigma_max")
