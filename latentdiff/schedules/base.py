"""What every schedule is, and the variance-preserving family's meeting with diffusers."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.utils.random import Generators, randn

Time = float | Tensor
# For schedules made of betas, with the predictions each takes
VP_SCHEDULERS = {
    "DPMSolverMultistepScheduler": ("epsilon", "sample", "v_prediction"),
    "DDIMScheduler": ("epsilon", "sample", "v_prediction"),
    "DDPMScheduler": ("epsilon", "sample", "v_prediction"),
    "EulerDiscreteScheduler": ("epsilon", "sample", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction"),
}
# Schedulers whose steps have a second stage in sigma, and the options that give them another grid of sigmas
TWO_STAGE = ("HeunDiscreteScheduler",)
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# With less of the data left at t = 1, the first step of such a scheduler goes from sigma = 1000 or more to about 10
LEAST_ALPHA_BAR = 1e-6
# Every saved config says these, also for the schedulers that users swap in by from_config: the defaults of DDPM and DDIM
# (clip_sample=True) would clip latents, which have no fixed range, to [-1, 1].
UNCLIPPED = {"clip_sample": False, "thresholding": False}
SCHEDULERS = (*VP_SCHEDULERS, "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")


class NoiseSchedule:
    """The parent of every schedule; a child gives alpha, sigma, d_alpha, d_sigma and time_from_log_snr.

    t_min, t_max: the interval in which the schedule may be trained and integrated.  At t_min the score is still
    finite; at t_max alpha is still large enough that x0 can be recovered from x_t and eps.
    prior_std: standard deviation of x at t_max for the prior N(0, prior_std^2), data of unit variance assumed.
    num_steps: into how many timesteps diffusers cuts [0, 1].
    counts_steps: whether `timestep` counts those, so that one a hair from an integer is meant to be that integer.
    sigma_data: the data's standard deviation as EDM's preconditioning sees it; 1, as latents are normalised.
    default_scheduler: the diffusers class `to_scheduler` makes when not told; None where diffusers has no equal.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    prior_std: float = 1.0
    num_steps: int = 1000
    counts_steps: bool = True
    sigma_data: float = 1.0
    default_scheduler: str | None = None

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

    def start_std(self, t: Time) -> Tensor:
        """Standard deviation of the Gaussian from which sampling starts at t, float64 of t's shape: prior_std from t_max on.

        Below it in proportion to that of x_t for data of unit variance, sqrt(alpha^2 + sigma^2): 1 wherever variance is
        preserved, sigma (and a hair more, for the data) where alpha is 1.
        """
        t = f64(t).clamp(max=self.t_max)
        spread = torch.hypot(self.alpha(t), self.sigma(t))
        return self.prior_std * (spread / torch.hypot(self.alpha(self.t_max), self.sigma(self.t_max)))

    def prior_sample(self, shape: Sequence[int], generator: Generators = None) -> Tensor:
        """x at t_max drawn from N(0, prior_std^2 I): float32 of the given shape; generator as in utils.random.randn."""
        return self.prior_std * randn(shape, generator)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, prior_std^2 I) in nats, [B] float64, for x [B, ...] at t_max."""
        x = x.reshape(x.shape[0], -1).double()  # [B, D]
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi * self.prior_std**2)
        return -0.5 * (x / self.prior_std).square().sum(1) - constant

    def input_scale(self, t: Time) -> Tensor:
        """What x is multiplied by before the U-Net sees it: 1, unless x's spread changes by orders of magnitude."""
        return torch.ones_like(f64(t))

    def timestep(self, t: Time) -> Tensor:
        """What the U-Net is fed for time t: 1000 t, unless a child says otherwise."""
        return self.num_steps * f64(t)

    def time_from_timestep(self, timestep: Time) -> Tensor:
        """The inverse of `timestep`."""
        return f64(timestep) / self.num_steps

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        """A diffusers scheduler of this schedule; see latentdiff.schedules.SCHEDULERS for the names.

        name: diffusers' class name, default_scheduler if None.  config: further entries of that class's config.
        UserError where diffusers has no equal.
        """
        raise UserError(
            f"schedule: {type(self).__name__} has no equal among diffusers' schedulers; "
            "sample with latentdiff's own (in a config: sample.scheduler=null)"
        )

    @staticmethod
    def from_scheduler(scheduler: Any) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler, read from its config.

        Schedulers made of betas (DDPM, DDIM, DPMSolverMultistep, EulerDiscrete, HeunDiscrete, zero terminal SNR
        included) give DiscreteVP; EDMEuler gives EDM; FlowMatchEulerDiscrete and schedulers that run on flow sigmas
        give RectifiedFlow (a time shift moves the sampling grid, not the path).  UserError for any other.
        """
        for read in _READERS:
            if (schedule := read(scheduler)) is not None:
                return schedule
        raise UserError(f"scheduler: {type(scheduler).__name__} is none of {', '.join(SCHEDULERS)}")


class VariancePreserving(NoiseSchedule):
    """alpha^2 + sigma^2 = 1.  The U-Net is fed N t - 1, so that diffusers' timestep k is t = (k + 1) / N."""

    default_scheduler: str | None = "DPMSolverMultistepScheduler"

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
        name = name or str(self.default_scheduler)
        if prediction not in VP_SCHEDULERS.get(name, ()):
            raise UserError(
                f"scheduler: {name} with prediction {prediction} is not possible for {type(self).__name__}; "
                f"valid: {', '.join(VP_SCHEDULERS)} with epsilon, v_prediction or (Heun apart) sample"
            )
        settings = {
            "num_train_timesteps": self.num_steps,
            "prediction_type": prediction,
            "timestep_spacing": "trailing",
            **self.betas(),
            **config,
        }
        if settings["timestep_spacing"] == "trailing":
            settings.setdefault("steps_offset", 1)  # plays no part here, but Stable Diffusion's pipelines warn of 0
        scheduler = make_scheduler(name, settings, beside=UNCLIPPED)
        if name in TWO_STAGE and not any(settings.get(key) for key in SIGMA_OPTIONS):
            left = float(torch.cumprod(1 - scheduler.betas.double(), 0)[-1])
            if left < LEAST_ALPHA_BAR:
                raise UserError(
                    f"scheduler: {name} cannot start at alpha^2 = {left:.1e}, where {type(self).__name__} ends: its first step "
                    f"is too long; set use_karras_sigmas=true in its config, or take {self.default_scheduler}"
                )
        return scheduler


_Reader = Callable[[Any], NoiseSchedule | None]
_READERS: list[_Reader] = []


def reads_scheduler(read: _Reader) -> _Reader:
    """A decorator: let `NoiseSchedule.from_scheduler` try `read`, which returns None for schedulers of another schedule.

    So this module need not import the schedules that are built on it. At most one of the readers takes a scheduler.
    """
    _READERS.append(read)
    return read


def f64(t: Time) -> Tensor:
    """t as a float64 tensor of the same shape, on its device."""
    return torch.as_tensor(t, dtype=torch.float64)


def make_scheduler(name: str, settings: dict[str, Any], beside: dict[str, Any] | None = None) -> Any:
    """A diffusers scheduler; UserError with its own words where it refuses its settings.

    beside: config entries for other classes, made of this one's config by from_config; this class takes those it knows.
    """
    import diffusers

    cls = getattr(diffusers, name)
    beside = beside or {}
    valid = inspect.signature(cls).parameters
    own = {key: value for key, value in beside.items() if key in valid}
    try:
        scheduler = cls(**{**own, **settings})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"scheduler: {name} refuses its config: {' '.join(str(error).split())}") from None
    scheduler.register_to_config(**{key: value for key, value in beside.items() if key not in valid})
    return scheduler
