"""The training loss, one number per sample."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff import prediction as predictions
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import flat_mean, widen

WEIGHTINGS = ("none", "min_snr", "edm", "likelihood", "uncertainty")


def add_noise(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Noisy data x_t = alpha(t) x0 + sigma(t) noise, [B, ...].

    schedule: gives alpha and sigma. x0: data [B, ...]. noise: unit-variance noise [B, ...]. t: a float or [B], in [0, 1].
    """
    return widen(schedule.alpha(t), x0) * x0 + widen(schedule.sigma(t), x0) * noise


def loss_weight(weighting: str, prediction: str, schedule: NoiseSchedule, t: float | Tensor, gamma: float = 5.0) -> Tensor:
    """The weight of the squared error of the prediction at t: float64 of the shape of t.

    All but "none" and "uncertainty" weigh the error of x0, which makes them the same loss in every parameterization: at a given
    x_t the error of y = A x0 + B eps is (A - B alpha/sigma) times that of x0, so the weight is divided by the square of this.

    Args:
        weighting: one of these.
            "none": 1.
            "min_snr": min(SNR, gamma) on x0 (Min-SNR, arXiv 2303.09556, eq. 6): min(SNR, gamma)/SNR for epsilon,
                min(SNR, gamma)/(SNR + 1) for v_prediction, min(SNR, gamma) sigma^2 for flow on the straight path.
            "edm": SNR + 1/sigma_data^2 on x0 (EDM, arXiv 2206.00364, table 1): 1 for the edm prediction, and for v_prediction
                where alpha^2 + sigma^2 = 1.
            "likelihood": g^2 alpha^2/sigma^4 on x0, which is g^2 on the error of the score (Maximum likelihood training, arXiv
                2101.09258, theorem 1). Half its integral over t bounds the divergence from the data.
            "uncertainty": 1; the learned weight is `Uncertainty`'s.
        prediction: one of `latentdiff.prediction.names()`.
        schedule: the noise schedule.
        t: a float or a tensor, in [0, 1].
        gamma: the largest weight of min_snr.

    Raises:
        UserError: an unknown weighting or prediction.
    """
    if weighting not in WEIGHTINGS:
        raise UserError(f"weighting: {weighting!r} is unknown; valid: {', '.join(WEIGHTINGS)}")
    a, b = predictions.row(prediction, schedule, t)
    if weighting in ("none", "uncertainty"):
        return torch.ones_like(a)
    slope = a - b * schedule.alpha(t) / schedule.sigma(t)
    snr = schedule.log_snr(t).exp()
    if weighting == "min_snr":
        return snr.clamp(max=gamma) / slope**2
    if weighting == "edm":
        return (snr + 1 / schedule.sigma_data**2) / slope**2
    return snr * (schedule.diffusion(t) / schedule.sigma(t) / slope) ** 2


class Uncertainty(nn.Module):
    """A learned log-variance u(t) of the loss, trained with the network: loss / e^u + u (EDM2, arXiv 2312.02696, eq. 21).

    At its optimum e^u is the mean loss at t. Then every noise level contributes the same, and any other weight cancels. u is a
    sum of cosines in the position of t's log-SNR between those of t_min and t_max, and starts at 0.
    """

    TERMS = 12
    GAIN = 4.0  # how much faster u changes than a weight of the network, with the same optimizer

    def __init__(self, schedule: NoiseSchedule):
        super().__init__()
        self.schedule = schedule
        ends = schedule.log_snr(torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
        self._high, self._low = ends.tolist()
        self.weight = nn.Parameter(torch.zeros(self.TERMS))

    def log_variance(self, t: Tensor) -> Tensor:
        """u(t), float32 [B], for t [B]."""
        place = (self._high - self.schedule.log_snr(t)) / (self._high - self._low)  # 0 at t_min, 1 at t_max
        order = torch.arange(self.TERMS, dtype=torch.float64, device=place.device)
        terms = torch.cos(math.pi * order * place[:, None]).float() * self.weight  # [B, TERMS]; no matmul: autocast
        return self.GAIN * terms.sum(1)

    def forward(self, loss: Tensor, t: Tensor) -> Tensor:
        """loss / e^u + u, [B], for a loss [B] at t [B]."""
        u = self.log_variance(t)
        return loss * torch.exp(-u) + u


def diffusion_loss(
    denoiser: Denoiser,
    x0: Tensor,
    t: float | Tensor,
    noise: Tensor,
    weighting: str = "none",
    gamma: float = 5.0,
    **conditioning: Any,
) -> Tensor:
    """The weighted squared error of the network's own prediction at x_t, averaged over all axes but the batch: float32 [B].

    Args:
        denoiser: the network with its schedule and prediction.
        x0: data [B, ...].
        t: a float or [B], in [0, 1].
        noise: unit-variance noise [B, ...].
        weighting, gamma: as in `loss_weight`.
        conditioning: keyword arguments of the network.

    Raises:
        UserError: an unknown weighting.
    """
    x0, noise = x0.float(), noise.float()
    output = denoiser.output(add_noise(denoiser.schedule, x0, noise, t), t, **conditioning)
    return weighted_error(denoiser, output, x0, noise, t, weighting, gamma)


def weighted_error(
    denoiser: Denoiser,
    output: Tensor,
    x0: Tensor,
    noise: Tensor,
    t: float | Tensor,
    weighting: str = "none",
    gamma: float = 5.0,
) -> Tensor:
    """The weighted squared error of a network's output at x_t, averaged over all axes but the batch: float32 [B].

    `diffusion_loss` is this with the network's output computed on the way.

    Args:
        denoiser: the network with its schedule and prediction. Only these two are used; the network is not called.
        output: what `denoiser.output` gave at x_t = alpha(t) x0 + sigma(t) noise, [B, ...].
        x0: data [B, ...].
        noise: unit-variance noise [B, ...].
        t: a float or [B], in [0, 1]; 0 is data and 1 is noise.
        weighting, gamma: as in `loss_weight`.

    Raises:
        UserError: an unknown weighting.
    """
    error = output - predictions.target(denoiser.prediction, denoiser.schedule, x0.float(), noise.float(), t)
    weight = loss_weight(weighting, denoiser.prediction, denoiser.schedule, t, gamma)
    return flat_mean(error**2) * weight.to(error)
