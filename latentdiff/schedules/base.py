"""What every schedule is, and the variance-preserving family's meeting with diffusers."""

from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError

Time = float | Tensor
SCHEDULERS = (
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
)


class NoiseSchedule:
    """The parent of every schedule; a child gives alpha, sigma, d_alpha, d_sigma and time_from_log_snr.

    t_min, t_max: the interval in which the schedule may be trained and integrated.  At t_min the score is still
    finite; at t_max alpha is still large enough that x0 can be recovered from x_t and eps.
    prior_std: standard deviation of x at t_max for the prior N(0, prior_std^2), data of unit variance assumed.
    num_steps: into how many timesteps diffusers cuts [0, 1].
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    prior_std: float = 1.0
    num_steps: int = 1000

    def alpha(self, t: Time) -> Tensor:
        raise NotImplementedError

    def sigma(self, t: Time) -> Tensor:
        raise NotImplementedError

    def d_alpha(self, t: Time) -> Tensor:
        """alpha'(t), the derivative in t."""
        raise NotImplementedError

    def d_sigma(self, t: Time) -> Tensor:
        """sigma'(t), the derivative in t."""
        raise NotImplementedError

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        """The t at which log(alpha^2 / sigma^2) has this value."""
        raise NotImplementedError

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha^2 / sigma^2): falls with t; +inf where sigma is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def drift(self, t: Time) -> Tensor:
        """f(t) of the forward SDE."""
        return self.d_alpha(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t) of the forward SDE."""
        sigma = self.sigma(t)
        return (2 * sigma * self.d_sigma(t) - 2 * self.drift(t) * sigma**2).clamp_min(0).sqrt()

    def timestep(self, t: Time) -> Tensor:
        """What the U-Net is fed for time t: 1000 t, unless a child says otherwise."""
        return self.num_steps * f64(t)

    def time_from_timestep(self, timestep: Time) -> Tensor:
        """The inverse of `timestep`."""
        return f64(timestep) / self.num_steps

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        """A diffusers scheduler of this schedule; see latentdiff.schedules.SCHEDULERS for the names.

        name: diffusers' class name; by default DPMSolverMultistepScheduler, and FlowMatchEulerDiscreteScheduler for
        RectifiedFlow.  config: further entries of that class's config.  UserError where diffusers has no equal.
        """
        raise UserError(
            f"schedule: {type(self).__name__} has no equal among diffusers' schedulers; "
            "variance-preserving schedules and RectifiedFlow have one"
        )

    @staticmethod
    def from_scheduler(scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler, read from its config.

        DDPM, DDIM, DPMSolverMultistep and EulerDiscrete give DiscreteVP; FlowMatchEulerDiscrete and schedulers that
        run on flow sigmas give RectifiedFlow (a time shift moves the sampling grid, not the path).
        """
        # The children are imported here because they are built on this class.
        from latentdiff.schedules.continuous import RectifiedFlow
        from latentdiff.schedules.discrete import DiscreteVP

        config = scheduler.config
        if config.get("use_flow_sigmas") or ("beta_start" not in config and "shift" in config):
            return RectifiedFlow()
        if "beta_start" not in config:
            raise UserError(f"scheduler: {type(scheduler).__name__} is none of {', '.join(SCHEDULERS)}")
        return DiscreteVP.from_config(config, scheduler.betas)


class VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1.  The U-Net is fed N t - 1, so that diffusers' timestep k is t = (k + 1) / N."""

    def timestep(self, t: Time) -> Tensor:
        """N t - 1: diffusers' k = 0 ... N - 1 at t = 1/N ... 1."""
        return f64(t) * self.num_steps - 1

    def time_from_timestep(self, timestep: Time) -> Tensor:
        return (f64(timestep) + 1) / self.num_steps

    def betas(self) -> dict[str, Any]:
        """The entries of a diffusers config that give this schedule at t = 1/N ... 1.

        A continuous schedule is exact at these times, except that beta is kept below 0.999 as in diffusers.
        """
        t = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha(t) ** 2])
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        return {"trained_betas": betas.tolist()}

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        name = name or "DPMSolverMultistepScheduler"
        if name not in SCHEDULERS[:-1] or prediction not in ("epsilon", "sample", "v_prediction"):
            raise UserError(
                f"scheduler: {name} with prediction {prediction} is not possible for {type(self).__name__}; "
                f"valid: {', '.join(SCHEDULERS[:-1])} with epsilon, sample or v_prediction"
            )
        # Latents have no fixed range: DDPM's and DDIM's clipping to [-1, 1] would destroy them.
        unclipped = {"clip_sample": False} if name in ("DDPMScheduler", "DDIMScheduler") else {}
        settings = {
            "num_train_timesteps": self.num_steps,
            "prediction_type": prediction,
            "timestep_spacing": "trailing",
            **self.betas(),
            **unclipped,
            **config,
        }
        return diffusers_class(name)(**settings)


def f64(t: Time) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)


def diffusers_class(name: str) -> Any:
    import diffusers

    return getattr(diffusers, name)
