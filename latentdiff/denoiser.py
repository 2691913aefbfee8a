"""A network with its noise schedule and parameterization: the denoiser that training and sampling share."""

import contextlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from latentdiff import prediction as predictions
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule, make_schedule
from latentdiff.utils.tensors import per_sample, widen


@dataclass(frozen=True)
class Denoised:
    """The denoiser's estimates at x_t [B, ...]: x0 = E[x0 given x_t] and the noise eps, with x_t = alpha x0 + sigma eps.

    Attributes:
        x0, eps: the estimates, [B, ...].
        schedule: gives alpha and sigma.
        t: the times [B], float64.
    """

    x0: Tensor
    eps: Tensor
    schedule: NoiseSchedule
    t: Tensor

    @property
    def score(self) -> Tensor:
        """The score grad log p_t(x_t) = -eps / sigma, [B, ...]."""
        return -self.eps / widen(self.schedule.sigma(self.t), self.eps)

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE (Score SDE, arXiv 2011.13456, eq. 13): alpha' x0 + sigma' eps, [B, ...].

        Equal to f x - g^2 score / 2, without the 0/0 of that form where alpha is 0.
        """
        d_alpha, d_sigma = self.schedule.d_alpha(self.t), self.schedule.d_sigma(self.t)
        return widen(d_alpha, self.x0) * self.x0 + widen(d_sigma, self.eps) * self.eps


class DenoiserLike(Protocol):
    """A `Denoiser`, or guidance around one: anything with a schedule that maps (x_t, t) to `Denoised`."""

    schedule: NoiseSchedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised: ...


class Denoiser:
    """A network as a denoiser: denoiser(x, t, **conditioning) -> `Denoised`.

    Whatever the network's precision, the arithmetic around it is in the dtype of x, and in float32 at least.

    Args:
        model: a network or any function model(x, t, **conditioning) -> y [B, ...], with t [B] in the dtype of x.
        schedule: the noise schedule.
        prediction: what y is; one of `latentdiff.prediction.names()`. UserError for another name.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: NoiseSchedule, prediction: str = "epsilon"):
        predictions.row(prediction, schedule, schedule.t_min)  # refuses an unknown name now, not at the first call
        self.model, self.schedule, self.prediction = model, schedule, prediction

    @classmethod
    def from_score(cls, fn: Callable[..., Tensor], schedule: NoiseSchedule) -> "Denoiser":
        """A denoiser from a score function fn(x, t) -> grad log p_t(x) [B, ...], for closed forms."""
        return cls(fn, schedule, "score")

    @classmethod
    def from_pipeline(cls, pipe: Any, **conditioning: Any) -> "Denoiser":
        """The denoiser of a diffusers pipeline with a U-Net, over normalised latents [B, c, h, w].

        Normalised latents are what the U-Net is given: in Stable Diffusion the autoencoder's latents times scaling_factor.
        Schedule and prediction are read from the pipeline's config where it has them (`LatentDiffusionPipeline`), else from its
        scheduler's config. The U-Net runs in its own dtype.

        Args:
            pipe: a diffusers pipeline, of any class.
            conditioning: given to the U-Net in every call, such as encoder_hidden_states [B, n, d] of the B samples. Keyword
                arguments of a call take precedence.

        Raises:
            UserError: the pipeline has no U-Net, or nothing gives the schedule.

        Warns where the prediction hardly determines x0 at t_max (`latentdiff.prediction.error_gain`): samples that start there
        are wrong, whatever the network.
        """
        unet, scheduler = getattr(pipe, "unet", None), getattr(pipe, "scheduler", None)
        if unet is None:
            raise UserError(f"pipeline: {type(pipe).__name__} has no unet; from_pipeline needs one over latents")
        if pipe.config.get("process") is not None:
            raise UserError(
                "MODEL: draws codes, not latents, so it has no denoiser; valid for it are generate, edit and evaluate"
            )
        schedule_config, prediction = pipe.config.get("schedule"), pipe.config.get("prediction")
        if scheduler is None and not (schedule_config and prediction):
            raise UserError("pipeline: without a scheduler its config must state a schedule and a prediction")
        schedule = make_schedule(**schedule_config) if schedule_config else NoiseSchedule.from_scheduler(scheduler)
        model = partial(unet_model(unet, schedule), **conditioning)
        prediction = prediction or predictions.from_scheduler(scheduler)
        gain = predictions.error_gain(prediction, schedule)
        if gain > predictions.LARGEST_GAIN:
            warnings.warn(
                f"{type(pipe).__name__}: at t = {schedule.t_max:g} an error of its {prediction} prediction is {gain:,.0f} "
                "times as large in x0; start sampling at a smaller t, with grid= a list of times",
                stacklevel=2,
            )
        return cls(model, schedule, prediction)

    def output(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Tensor:
        """The model's own output y [B, ...] at x [B, ...] and t (a float or [B]), in the dtype of x, float32 at least."""
        x = _at_least_float32(x)
        return self.model(x, per_sample(t, x).to(x.dtype), **conditioning).to(x.dtype)

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        """The estimates of x0 and eps at x_t, as `Denoised`.

        Args:
            x: x_t [B, ...].
            t: a float or [B], in [0, 1].
            conditioning: keyword arguments of the model.

        Raises:
            UserError: t is outside [0, 1]. Checked on the CPU only.
        """
        x, times = _at_least_float32(x), per_sample(t, x)
        # On the CPU this check is free. An adaptive solver may round to slightly beyond the ends
        if times.device.type == "cpu" and not bool(((times > -1e-6) & (times < 1 + 1e-6)).all()):
            span = f"{float(times.min()):g} to {float(times.max()):g}"
            raise UserError(f"t: {span} is not within [0, 1], 0 data and 1 noise; diffusers' timesteps are about 1000 t")
        y = self.output(x, times, **conditioning)
        x0, eps = predictions.solve(self.prediction, self.schedule, x, times, y)
        return Denoised(x0, eps, self.schedule, times)


def unet_model(unet: Any, schedule: NoiseSchedule, autocast: torch.dtype | None = None) -> Callable[..., Tensor]:
    """A function model(x, t, **conditioning) for `Denoiser`, around a diffusers U-Net, which is given schedule.timestep(t).

    image_condition [B, e, h, w] in conditioning is what lies beside x as further channels, for a U-Net with a second image; it
    is not scaled. UserError where the two together are not as many channels as the U-Net takes.

    Args:
        unet: a diffusers U-Net; it may be wrapped (DDP, torch.compile). One with cross-attention gets
            encoder_hidden_states=None unless conditioning has it.
        schedule: gives timesteps and the scale of the input.
        autocast: the dtype of an autocast context around the network alone. None: no context, and x is cast to the dtype of the
            weights.
    """
    inner = unet
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    defaults: dict[str, Any] = {}
    if "encoder_hidden_states" in inspect.signature(inner.forward).parameters:
        defaults["encoder_hidden_states"] = None

    inner_config: Any = getattr(inner, "config", None)
    channels = inner_config.get("in_channels") if hasattr(inner_config, "get") else None

    def model(x: Tensor, t: Tensor, image_condition: Tensor | None = None, **conditioning: Any) -> Tensor:
        weight = next(iter(inner.parameters()), x)
        k = schedule.timestep(t)
        if schedule.counts_steps:
            # t may be float32: 499.99994 stands for timestep 500, as in training and in diffusers
            k = torch.where((k - k.round()).abs() < 1e-3, k.round(), k)
        k, x = k.float(), x * widen(schedule.input_scale(t), x)
        if image_condition is not None:
            x = torch.cat([x, image_condition.to(x)], dim=1)  # [B, c + e, h, w]
        if channels is not None and x.ndim == 4 and x.shape[1] < channels:
            raise UserError(
                f"denoiser: its U-Net takes {channels} channels and is given {x.shape[1]}; one with a second image needs "
                "image_condition= in each call"
            )
        cast = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with cast:
            return unet(x if autocast else x.to(weight.dtype), k, **{**defaults, **conditioning}).sample

    return model


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
