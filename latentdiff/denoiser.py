"""The joint of training and sampling: a network with its schedule and parameterization."""

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
    """What is believed of x_t [B, ...] at t: x0 = E[x0 | x_t] and eps, with x_t = alpha x0 + sigma eps."""

    x0: Tensor
    eps: Tensor
    schedule: NoiseSchedule
    t: Tensor  # [B], float64

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) = -eps / sigma, [B, ...]."""
        return -self.eps / widen(self.schedule.sigma(self.t), self.eps)

    @property
    def velocity(self) -> Tensor:
        """dx/dt of the probability-flow ODE (2011.13456 eq. 13): alpha' x0 + sigma' eps, [B, ...].

        Equal to f x - g^2 score / 2, without that form's 0/0 where alpha vanishes.
        """
        d_alpha, d_sigma = self.schedule.d_alpha(self.t), self.schedule.d_sigma(self.t)
        return widen(d_alpha, self.x0) * self.x0 + widen(d_sigma, self.eps) * self.eps


class DenoiserLike(Protocol):
    """A Denoiser, or guidance around one."""

    schedule: NoiseSchedule

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised: ...


class Denoiser:
    """denoiser(x, t, **conditioning) -> Denoised.

    model(x, t, **conditioning) -> y [B, ...], with t [B] in x's dtype (at least float32): a network, or any function.
    prediction: what y is; see latentdiff.prediction.  Whatever the network's precision, the mathematics is done in
    x's, in float32 at least.
    """

    def __init__(self, model: Callable[..., Tensor], schedule: NoiseSchedule, prediction: str = "epsilon"):
        predictions.row(prediction, schedule, schedule.t_min)  # an unknown name fails here, not in mid-run
        self.model, self.schedule, self.prediction = model, schedule, prediction

    @classmethod
    def from_score(cls, fn: Callable[..., Tensor], schedule: NoiseSchedule) -> "Denoiser":
        """A denoiser from fn(x, t) -> score [B, ...], for closed forms."""
        return cls(fn, schedule, "score")

    @classmethod
    def from_pipeline(cls, pipe: Any, **conditioning: Any) -> "Denoiser":
        """The denoiser inside a diffusers pipeline with a U-Net, whoever made it: over normalised latents [B, c, h, w].

        Those are what the U-Net sees: the autoencoder's, times its scaling_factor in Stable Diffusion.  Schedule and
        prediction are the pipeline's own where its config states them (LatentDiffusionPipeline), else those of its
        scheduler's config.  The U-Net runs in its own dtype.
        conditioning: given to the U-Net in every call, such as encoder_hidden_states [B, n, d] of the B samples to be
        drawn; what a call says itself comes first.  UserError where there is no U-Net, or nothing states the schedule.
        Warns where the prediction says next to nothing of x0 at t_max (`latentdiff.prediction.error_gain`): samples that
        start there come out wrong, whatever the network.
        """
        unet, scheduler = getattr(pipe, "unet", None), getattr(pipe, "scheduler", None)
        if unet is None:
            raise UserError(f"pipeline: {type(pipe).__name__} has no unet; from_pipeline needs one over latents")
        stated, prediction = pipe.config.get("schedule"), pipe.config.get("prediction")
        if scheduler is None and not (stated and prediction):
            raise UserError("pipeline: without a scheduler its config must state a schedule and a prediction")
        schedule = make_schedule(**stated) if stated else NoiseSchedule.from_scheduler(scheduler)
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
        """The model's own y at (x, t), in x's dtype (float32 at least).  x: [B, ...]; t: float or [B]."""
        x = _at_least_float32(x)
        return self.model(x, per_sample(t, x).to(x.dtype), **conditioning).to(x.dtype)

    def __call__(self, x: Tensor, t: float | Tensor, **conditioning: Any) -> Denoised:
        x, times = _at_least_float32(x), per_sample(t, x)
        # On the CPU the look is free; an adaptive solver may round a hair beyond the ends
        if times.device.type == "cpu" and not bool(((times > -1e-6) & (times < 1 + 1e-6)).all()):
            span = f"{float(times.min()):g} to {float(times.max()):g}"
            raise UserError(f"t: {span} is not within [0, 1], 0 data and 1 noise; diffusers' timesteps are about 1000 t")
        y = self.output(x, times, **conditioning)
        x0, eps = predictions.solve(self.prediction, self.schedule, x, times, y)
        return Denoised(x0, eps, self.schedule, times)


def unet_model(unet: Any, schedule: NoiseSchedule, autocast: torch.dtype | None = None) -> Callable[..., Tensor]:
    """model(x, t, **conditioning) that feeds a diffusers U-Net schedule.timestep(t) and returns its sample.

    The U-Net may be wrapped (DDP, compile).  autocast: the dtype of an autocast context that covers the network alone;
    None leaves the context as it is, with x cast to the weights' dtype.  A U-Net that cross-attends gets
    encoder_hidden_states=None unless conditioning has it.
    """
    inner = unet
    while hasattr(inner, "module") or hasattr(inner, "_orig_mod"):
        inner = inner.module if hasattr(inner, "module") else inner._orig_mod
    defaults: dict[str, Any] = {}
    if "encoder_hidden_states" in inspect.signature(inner.forward).parameters:
        defaults["encoder_hidden_states"] = None

    def model(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        weight = next(iter(inner.parameters()), x)
        k = schedule.timestep(t)
        if schedule.counts_steps:
            # t may come in float32: 499.99994 is meant to be timestep 500, as in training and in diffusers.
            k = torch.where((k - k.round()).abs() < 1e-3, k.round(), k)
        k, x = k.float(), x * widen(schedule.input_scale(t), x)
        cast = torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext()
        with cast:
            return unet(x if autocast else x.to(weight.dtype), k, **{**defaults, **conditioning}).sample

    return model


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
