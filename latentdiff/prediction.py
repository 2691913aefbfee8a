"""Parameterizations: what a network predicts is one row y = A(t) x0 + B(t) eps.

name            A                        B
epsilon         0                        1                       the noise
sample          1                        0                       x0
v_prediction    -sigma                   alpha                   Progressive Distillation (arXiv 2202.00512), appendix D
score           0                        -1/sigma                grad log p_t(x_t)
flow            alpha'                   sigma'                  dx_t/dt at fixed x0 and eps
edm             sigma / (s c)            -alpha s / c            c = sqrt(sigma^2 + alpha^2 s^2), s = schedule.sigma_data

edm is F of EDM (arXiv 2206.00364, table 1), x0 = c_skip x + c_out F, for x/alpha and sigma/alpha in the place of the paper's x
and sigma. With s = 1 on a variance-preserving schedule it is minus v_prediction.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.utils.tensors import widen

_ROWS: Mapping[str, Callable[[NoiseSchedule, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda s, t: (torch.zeros_like(t), torch.ones_like(t)),
    "sample": lambda s, t: (torch.ones_like(t), torch.zeros_like(t)),
    "v_prediction": lambda s, t: (-s.sigma(t), s.alpha(t)),
    "score": lambda s, t: (torch.zeros_like(t), -1 / s.sigma(t)),
    "flow": lambda s, t: (s.d_alpha(t), s.d_sigma(t)),
    "edm": lambda s, t: _edm(s.alpha(t) * s.sigma_data, s.sigma(t), s.sigma_data),
}


def _edm(signal: Tensor, sigma: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """A = (1 - c_skip) / c_out and B = -c_skip sigma / c_out of EDM. signal is alpha std; std is that of the data."""
    spread = torch.hypot(signal, sigma)
    return sigma / (std * spread), -signal / spread


def names() -> list[str]:
    """The names of the predictions."""
    return list(_ROWS)


def row(prediction: str, schedule: NoiseSchedule, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """(A(t), B(t)) of y = A x0 + B eps, each float64 of the shape of t.

    prediction: one of `names()`; UserError for another. schedule: gives alpha and sigma. t: a float or a tensor, in [0, 1].
    """
    if prediction not in _ROWS:
        raise UserError(f"prediction: {prediction!r} is unknown; valid: {', '.join(_ROWS)}")
    return _ROWS[prediction](schedule, torch.as_tensor(t, dtype=torch.float64))


def solve(prediction: str, schedule: NoiseSchedule, x_t: Tensor, t: float | Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps), each [B, ...], from x_t = alpha x0 + sigma eps and y = A x0 + B eps, by the inverse of the 2x2 matrix.

    Args:
        prediction: what y is; one of `names()`.
        schedule: gives alpha and sigma.
        x_t: noisy data [B, ...].
        t: a float or [B], in [0, 1].
        y: the network's output [B, ...].

    Where the matrix is singular (epsilon or score at alpha = 0, sample at sigma = 0), the result is not finite.
    """
    a, b = row(prediction, schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det = alpha * b - sigma * a
    x0 = widen(b / det, x_t) * x_t - widen(sigma / det, x_t) * y
    eps = widen(alpha / det, x_t) * y - widen(a / det, x_t) * x_t
    return x0, eps


def target(prediction: str, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """y = A(t) x0 + B(t) eps [B, ...]: what the network should predict at x_t.

    prediction: one of `names()`; UserError for another. schedule: gives alpha and sigma. x0: data [B, ...]. eps: the noise
    [B, ...]. t: a float or [B], in [0, 1].
    """
    a, b = row(prediction, schedule, t)
    return widen(a, x0) * x0 + widen(b, x0) * eps


# The largest allowed `error_gain`: 316, which for epsilon is an SNR of 1e-5. The schedules of DDPM end at 4e-5 and work. Below
# 4e-6 the rounding of an output to bfloat16, 2^-9, is as large in x0 as the data
LARGEST_GAIN = 10**2.5
# The largest allowed ratio of a target's sizes over the noise levels. A score with a ratio of 5,000 (VE) can be learnt, because
# its weights balance it; one of 40,000 (EDM) cannot, nor can flow of 5,000 (VE), which is smallest where most of the detail of
# the data is. The others have at most 100
LARGEST_SPAN = {"score": 1e4}
OTHER_SPAN = 1e3


def error_gain(prediction: str, schedule: NoiseSchedule, unweighted: bool = False) -> float:
    """By how much an error of the network's prediction is larger in x0, at t_max, where sampling starts; inf at alpha = 0.

    From x0 = (B x_t - sigma y) / (alpha B - sigma A), an error of y is multiplied by sigma / |alpha B - sigma A| in x0: by
    sigma / alpha for epsilon, by 1 for sample. The network's error is taken as a share of the target's size, sqrt(A^2 + B^2)
    for data of unit variance.

    unweighted: the loss has no weights. Then the size is the larger of that at t_max and its root mean square over t, because
    such a loss accepts the same absolute error at every t. A score has the size 1 / sigma, and is lost in that error at high
    noise.
    """
    t = torch.linspace(schedule.t_min, schedule.t_max, 1001, dtype=torch.float64)
    a, b = row(prediction, schedule, t)
    alpha, sigma = schedule.alpha(t[-1]), schedule.sigma(t[-1])
    square = a**2 + b**2
    size = torch.maximum(square[-1], square.mean()) if unweighted else square[-1]
    gain = float(size.sqrt() * sigma / (alpha * b[-1] - sigma * a[-1]).abs())
    return gain if math.isfinite(gain) else math.inf


def check_learnable(prediction: str, schedule: NoiseSchedule, weighting: str, name: str) -> None:
    """UserError unless a network can learn this prediction well enough to sample from; it says what would be valid.

    weighting: of the loss, one of `latentdiff.objective.WEIGHTINGS`. name: of the schedule, for the message.
    """
    fault = _fault(prediction, schedule, weighting == "none")
    if fault is None:
        return
    valid = [other for other in _ROWS if _fault(other, schedule, weighting == "none") is None]
    choices = [f"prediction: {', '.join(valid)}"] if valid else []
    if weighting == "none" and _fault(prediction, schedule, False) is None:
        choices.append("weighting: likelihood or uncertainty")
    raise UserError(
        f"prediction: {prediction} cannot be learnt well enough on the schedule {name}: {fault}; "
        f"valid: {', or '.join([*choices, 'a schedule that keeps more signal'])}"
    )


def _fault(prediction: str, schedule: NoiseSchedule, unweighted: bool) -> str | None:
    """Why no network learns this prediction well enough, or None. tests/training/test_training_pairs.py trains such pairs."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 1001, dtype=torch.float64)
    gain = error_gain(prediction, schedule, unweighted)
    if gain > LARGEST_GAIN:
        snr = float(schedule.log_snr(schedule.t_max).exp())
        return (
            f"at t = {schedule.t_max:g}, where sampling starts, the SNR is {snr:.1e}, and an error of the network is "
            f"{gain:,.0f} times as large in x0 (at most {LARGEST_GAIN:.0f})"
        )
    size = torch.hypot(*row(prediction, schedule, t))
    span, most = float(size.max() / size.min()), LARGEST_SPAN.get(prediction, OTHER_SPAN)
    if span > most:
        return f"its size changes by a factor of {span:,.0f} over the noise levels (at most {most:,.0f})"
    return None


def from_scheduler(scheduler: Any) -> str:
    """The prediction of a diffusers scheduler, read from its config: one of `names()`.

    UserError for an EDM scheduler with any prediction_type but epsilon.
    """
    kind = scheduler.config.get("prediction_type", "flow")
    if "sigma_data" in scheduler.config:
        if kind != "epsilon":
            raise UserError(f"scheduler: {type(scheduler).__name__} with prediction_type {kind}; valid: epsilon")
        return "edm"
    return "flow" if kind == "flow_prediction" else kind
