"""Parameterizations: what a network predicts is one row y = A(t) x0 + B(t) eps.

    epsilon (0, 1)   sample (1, 0)   v_prediction (-sigma, alpha), 2202.00512 appendix D
    score (0, -1/sigma)   flow (alpha', sigma')
    edm (sigma/s, -alpha s) / sqrt(sigma^2 + alpha^2 s^2), s the data's standard deviation: F of 2206.00364 table 1,
        x0 = c_skip x + c_out F, in the coordinates x/alpha and sigma/alpha; with s = 1 on a variance-preserving
        schedule it is -v_prediction
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.schedules import NoiseSchedule
from latentdiff.tensors import widen

_ROWS: Mapping[str, Callable[[NoiseSchedule, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": lambda s, t: (torch.zeros_like(t), torch.ones_like(t)),
    "sample": lambda s, t: (torch.ones_like(t), torch.zeros_like(t)),
    "v_prediction": lambda s, t: (-s.sigma(t), s.alpha(t)),
    "score": lambda s, t: (torch.zeros_like(t), -1 / s.sigma(t)),
    "flow": lambda s, t: (s.d_alpha(t), s.d_sigma(t)),
    "edm": lambda s, t: _edm(s.alpha(t) * s.sigma_data, s.sigma(t), s.sigma_data),
}


def _edm(signal: Tensor, sigma: Tensor, std: float) -> tuple[Tensor, Tensor]:
    """A = (1 - c_skip) / c_out and B = -c_skip sigma / c_out; signal is alpha std."""
    spread = torch.hypot(signal, sigma)
    return sigma / (std * spread), -signal / spread


def names() -> list[str]:
    """The predictions there are."""
    return list(_ROWS)


def row(prediction: str, schedule: NoiseSchedule, t: float | Tensor) -> tuple[Tensor, Tensor]:
    """A(t) and B(t), float64, of t's shape.  UserError for an unknown prediction."""
    if prediction not in _ROWS:
        raise UserError(f"prediction: {prediction!r} is unknown; valid: {', '.join(_ROWS)}")
    return _ROWS[prediction](schedule, torch.as_tensor(t, dtype=torch.float64))


def solve(
    prediction: str, schedule: NoiseSchedule, x_t: Tensor, t: float | Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """(x0, eps) from x_t = alpha x0 + sigma eps and y = A x0 + B eps, by the inverse of the 2x2 matrix.

    x_t, y: [B, ...]; t: float or [B].  Where the matrix is singular (epsilon or score at alpha = 0, sample at
    sigma = 0) the result is not finite.
    """
    a, b = row(prediction, schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    det = alpha * b - sigma * a
    x0 = widen(b / det, x_t) * x_t - widen(sigma / det, x_t) * y
    eps = widen(alpha / det, x_t) * y - widen(a / det, x_t) * x_t
    return x0, eps


def target(prediction: str, schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """y = A(t) x0 + B(t) eps [B, ...], what the network should say at x_t."""
    a, b = row(prediction, schedule, t)
    return widen(a, x0) * x0 + widen(b, x0) * eps


def from_scheduler(scheduler: Any) -> str:
    """The prediction that a diffusers scheduler's config stands for.  UserError for EDM's v_prediction."""
    kind = scheduler.config.get("prediction_type", "flow")
    if "sigma_data" in scheduler.config:
        if kind != "epsilon":
            raise UserError(f"scheduler: {type(scheduler).__name__} with prediction_type {kind}; valid: epsilon")
        return "edm"
    return "flow" if kind == "flow_prediction" else kind
