"""The training loss, one number per sample."""

from typing import Any

import torch
from torch import Tensor

from latentdiff import prediction as predictions
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.tensors import flat_mean, widen

WEIGHTINGS = ("none", "min_snr")


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """x_t = alpha(t) x0 + sigma(t) noise, [B, ...]; t: float or [B]."""
    return widen(schedule.alpha(t), x0) * x0 + widen(schedule.sigma(t), x0) * noise


def loss_weight(
    weighting: str, prediction: str, schedule: NoiseSchedule, t: float | Tensor, gamma: float = 5.0
) -> Tensor:
    """What the squared error of the prediction is multiplied by at t; float64, of t's shape.

    none: 1.  min_snr: min(SNR, gamma) on the error of x0 (2303.09556 eq. 6).  At a given x_t the error of
    y = A x0 + B eps is (A - B alpha/sigma) times that of x0, so its weight is min(SNR, gamma) / (A - B alpha/sigma)^2:
    min(SNR, gamma)/SNR for epsilon, min(SNR, gamma)/(SNR + 1) for v_prediction, min(SNR, gamma) sigma^2 for flow on
    the straight path.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: {weighting!r} is unknown; valid: {', '.join(WEIGHTINGS)}")
    a, b = predictions.row(prediction, schedule, t)
    if weighting == "none":
        return torch.ones_like(a)
    slope = a - b * schedule.alpha(t) / schedule.sigma(t)
    return schedule.log_snr(t).exp().clamp(max=gamma) / slope**2


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: float | Tensor,
    noise: Tensor,
    weighting: str = "none",
    gamma: float = 5.0,
    **conditioning: Any,
) -> Tensor:
    """The weighted squared error of the network's own prediction at x_t, averaged over all but the batch: [B], float32.

    x0, noise: [B, ...]; t: float or [B]; gamma: the cap of min_snr; conditioning: passed to the model.
    """
    x0, noise = x0.float(), noise.float()
    y = denoiser.output(add_noise(denoiser.schedule, x0, noise, t), t, **conditioning)
    error = y - predictions.target(denoiser.prediction, denoiser.schedule, x0, noise, t)
    weight = loss_weight(weighting, denoiser.prediction, denoiser.schedule, t, gamma)
    return flat_mean(error**2) * weight.to(error)
