"""The parent of all noise schedules, that of the variance-preserving ones, and how schedules become diffusers schedulers."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.utils.random import Generators, randn

Time = float | Tensor
# Schedulers for schedules made of betas, with the predictions that each takes
VP_SCHEDULERS = {
    "DPMSolverMultistepScheduler": ("epsilon", "sample", "v_prediction"),
    "UniPCMultistepScheduler": ("epsilon", "sample", "v_prediction"),
    "DDIMScheduler": ("epsilon", "sample", "v_prediction"),
    "DDPMScheduler": ("epsilon", "sample", "v_prediction"),
    "EulerDiscreteScheduler": ("epsilon", "sample", "v_prediction"),
    "HeunDiscreteScheduler": ("epsilon", "v_prediction"),
}
# Schedulers whose steps have two stages, and the options that give them another grid of sigmas
TWO_STAGE = ("HeunDiscreteScheduler",)
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# With a smaller alpha^2 at t = 1, the first step of a two-stage scheduler goes from sigma = 1000 or more to about 10
LEAST_ALPHA_BAR = 1e-6
# Every saved config has these, also for the schedulers that users make of it by from_config. By default DDPM and DDIM
# (clip_sample=True) would clip latents to [-1, 1], but latents have no fixed range
UNCLIPPED = {"clip_sample": False, "thresholding": False}
SCHEDULERS = (*VP_SCHEDULERS, "EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler")


class NoiseSchedule:
    """A Gaussian path x_t = alpha(t) x0 + sigma(t) eps, for t in [0, 1]. The parent of every schedule.

    A child gives `alpha`, `sigma`, `d_alpha`, `d_sigma` and `time_from_log_snr`. Methods of a time t take a float or a tensor
    of any shape and return a float64 tensor of that shape, on the same device.

    Attributes:
        t_min, t_max: the interval of t in which a network is trained and the ODE is solved. At t_min the score is still finite;
            at t_max alpha is still large enough that x0 can be computed from x_t and eps.
        prior_std: standard deviation of x at t_max: the prior is N(0, prior_std^2 I), for data of unit variance.
        num_steps: the number of timesteps into which diffusers divides [0, 1].
        counts_steps: whether `timestep` counts those steps. A value that differs from an integer by rounding is then rounded.
        sigma_data: standard deviation of the data in EDM's preconditioning; 1, because latents are normalised.
        default_scheduler: name of the diffusers class that `to_scheduler` makes by default; None where diffusers has none.
    """

    t_min: float = 1e-3
    t_max: float = 1.0
    prior_std: float = 1.0
    num_steps: int = 1000
    counts_steps: bool = True
    sigma_data: float = 1.0
    default_scheduler: str | None = None

    def alpha(self, t: Time) -> Tensor:
        """alpha(t), the scale of the data in x_t."""
        raise NotImplementedError

    def sigma(self, t: Time) -> Tensor:
        """sigma(t), the standard deviation of the noise in x_t."""
        raise NotImplementedError

    def d_alpha(self, t: Time) -> Tensor:
        """alpha'(t), the derivative in t."""
        raise NotImplementedError

    def d_sigma(self, t: Time) -> Tensor:
        """sigma'(t), the derivative in t."""
        raise NotImplementedError

    def time_from_log_snr(self, log_snr: Time) -> Tensor:
        """The time t at which log(alpha^2 / sigma^2) has this value: the inverse of `log_snr`."""
        raise NotImplementedError

    def log_snr(self, t: Time) -> Tensor:
        """log(alpha^2 / sigma^2), the log signal-to-noise ratio. It falls with t, and is +inf where sigma is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def drift(self, t: Time) -> Tensor:
        """f(t) = alpha'/alpha of the forward SDE dx = f(t) x dt + g(t) dw (Score SDE, arXiv 2011.13456, eq. 5)."""
        return self.d_alpha(t) / self.alpha(t)

    def diffusion(self, t: Time) -> Tensor:
        """g(t) of the forward SDE, g^2 = 2 sigma sigma' - 2 f sigma^2."""
        sigma = self.sigma(t)
        return (2 * sigma * self.d_sigma(t) - 2 * self.drift(t) * sigma**2).clamp_min(0).sqrt()

    def start_std(self, t: Time) -> Tensor:
        """Standard deviation of the Gaussian from which sampling starts at time t.

        It is prior_std from t_max on. Below t_max it shrinks in proportion to the standard deviation of x_t for data of unit
        variance, sqrt(alpha^2 + sigma^2): it is 1 where variance is preserved, and close to sigma where alpha is 1.
        """
        t = f64(t).clamp(max=self.t_max)
        spread = torch.hypot(self.alpha(t), self.sigma(t))
        return self.prior_std * (spread / torch.hypot(self.alpha(self.t_max), self.sigma(self.t_max)))

    def prior_sample(self, shape: Sequence[int], generator: Generators = None) -> Tensor:
        """Draws from the prior N(0, prior_std^2 I), float32 of the given shape [B, ...]: x at t_max.

        generator: one, a list of B, or None; see `latentdiff.utils.random.randn`.
        """
        return self.prior_std * randn(shape, generator)

    def prior_log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, prior_std^2 I) in nats, float64 [B], for x [B, ...] at t_max."""
        x = x.reshape(x.shape[0], -1).double()  # [B, D]
        constant = 0.5 * x.shape[1] * math.log(2 * math.pi * self.prior_std**2)
        return -0.5 * (x / self.prior_std).square().sum(1) - constant

    def input_scale(self, t: Time) -> Tensor:
        """The factor on x before the U-Net: 1, unless the scale of x changes by orders of magnitude over t."""
        return torch.ones_like(f64(t))

    def timestep(self, t: Time) -> Tensor:
        """What the U-Net is given for time t: num_steps t, unless a child overrides it."""
        return self.num_steps * f64(t)

    def time_from_timestep(self, timestep: Time) -> Tensor:
        """The time t of a timestep: the inverse of `timestep`."""
        return f64(timestep) / self.num_steps

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        """A diffusers scheduler with this noise schedule.

        Args:
            name: class name in diffusers, one of `latentdiff.schedules.SCHEDULERS`; None for default_scheduler.
            prediction: what the network predicts; see `latentdiff.prediction`.
            config: further entries of the scheduler's config.

        Raises:
            UserError: diffusers has no such scheduler for this schedule and prediction, or refuses the config.
        """
        raise UserError(
            f"schedule: {type(self).__name__} has no equal among diffusers' schedulers; "
            "sample with latentdiff's own (in a config: sample.scheduler=null)"
        )

    @staticmethod
    def from_scheduler(scheduler: Any) -> "NoiseSchedule":
        """The noise schedule of a diffusers scheduler, read from its config.

        Schedulers made of betas (DDPM, DDIM, DPMSolverMultistep, EulerDiscrete, HeunDiscrete, also with zero terminal SNR) give
        `DiscreteVP`. EDMEuler gives `EDM`. FlowMatchEulerDiscrete, and schedulers that run on flow sigmas, give
        `RectifiedFlow`; a time shift changes the sampling grid, not the path. UserError for any other.
        """
        for read in _READERS:
            if (schedule := read(scheduler)) is not None:
                return schedule
        raise UserError(f"scheduler: {type(scheduler).__name__} is none of {', '.join(SCHEDULERS)}")


class VariancePreserving(NoiseSchedule):
    """A schedule with alpha^2 + sigma^2 = 1.

    The U-Net is given N t - 1 with N = num_steps, so that timestep k of diffusers is t = (k + 1) / N.
    """

    default_scheduler: str | None = "DPMSolverMultistepScheduler"

    def timestep(self, t: Time) -> Tensor:
        """num_steps t - 1: timesteps k = 0 ... N - 1 of diffusers at t = 1/N ... 1."""
        return f64(t) * self.num_steps - 1

    def time_from_timestep(self, timestep: Time) -> Tensor:
        """(timestep + 1) / num_steps: the inverse of `timestep`."""
        return (f64(timestep) + 1) / self.num_steps

    def betas(self) -> dict[str, Any]:
        """The entries of a diffusers config that give this schedule at t = 1/N ... 1.

        They are exact at these times, except that beta is at most 0.999, as in diffusers.
        """
        t = torch.arange(1, self.num_steps + 1, dtype=torch.float64) / self.num_steps
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha(t) ** 2])
        betas = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        return {"trained_betas": betas.tolist()}

    def to_scheduler(self, name: str | None = None, prediction: str = "epsilon", **config: Any) -> Any:
        """A scheduler made of betas, one of `VP_SCHEDULERS`; see `NoiseSchedule.to_scheduler`."""
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
            settings.setdefault("steps_offset", 1)  # has no effect here, but Stable Diffusion's pipelines warn of 0
        scheduler = make_scheduler(name, settings, others=UNCLIPPED)
        if name in TWO_STAGE and not any(settings.get(key) for key in SIGMA_OPTIONS):
            alpha_bar = float(torch.cumprod(1 - scheduler.betas.double(), 0)[-1])
            if alpha_bar < LEAST_ALPHA_BAR:
                raise UserError(
                    f"scheduler: {name} cannot start at alpha^2 = {alpha_bar:.1e}, where {type(self).__name__} ends: its first "
                    f"step is too long; set use_karras_sigmas=true in its config, or take {self.default_scheduler}"
                )
        return scheduler


# Functions scheduler -> schedule, or None for a scheduler of another schedule: see `NoiseSchedule.from_scheduler`
_Reader = Callable[[Any], NoiseSchedule | None]
_READERS: list[_Reader] = []


def reads_scheduler(read: _Reader) -> _Reader:
    """A decorator that lets `NoiseSchedule.from_scheduler` use `read`. At most one reader may take a scheduler.

    So this module need not import the schedules that are built on it.
    """
    _READERS.append(read)
    return read


def f64(t: Time) -> Tensor:
    """t as a float64 tensor of the same shape, on its device."""
    return torch.as_tensor(t, dtype=torch.float64)


def make_scheduler(name: str, settings: dict[str, Any], others: dict[str, Any] | None = None) -> Any:
    """A diffusers scheduler by the name of its class. UserError, with diffusers' reason, where it refuses its settings.

    settings: entries of the class's config. others: entries for other classes, which may be made from this config by
    from_config; this class takes those of them that it knows.
    """
    import diffusers

    cls = getattr(diffusers, name)
    others = others or {}
    valid = inspect.signature(cls).parameters
    own = {key: value for key, value in others.items() if key in valid}
    try:
        scheduler = cls(**{**own, **settings})
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"scheduler: {name} refuses its config: {' '.join(str(error).split())}") from None
    scheduler.register_to_config(**{key: value for key, value in others.items() if key not in valid})
    return scheduler
