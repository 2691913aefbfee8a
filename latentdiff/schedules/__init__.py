"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, t in [0, 1], 0 is data and 1 is noise.

A schedule states alpha, sigma, their time derivatives and the inverse of its log-SNR.  The SDE follows for all of them
(2011.13456, with the identity checked in tests/schedules/test_schedules.py):
    dx = f(t) x dt + g(t) dw,    f = alpha'/alpha,    g^2 = 2 sigma sigma' - 2 f sigma^2.
All methods take a float or a tensor of times and return float64 tensors of the same shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

from latentdiff.errors import UserError
from latentdiff.schedules.base import SCHEDULERS, NoiseSchedule
from latentdiff.schedules.continuous import EDM, VE, VP, Cosine, RectifiedFlow, SubVP
from latentdiff.schedules.discrete import BETAS, DiscreteVP

__all__ = [
    "BETAS",
    "EDM",
    "SCHEDULERS",
    "VE",
    "VP",
    "Cosine",
    "DiscreteVP",
    "NoiseSchedule",
    "RectifiedFlow",
    "SubVP",
    "make_schedule",
    "names",
]

_DISCRETE: Mapping[str, Any] = {"num_steps": 1000, "zero_terminal_snr": False}
# name: (builder, parameters with their defaults)
_NAMED: Mapping[str, tuple[Callable[..., NoiseSchedule], Mapping[str, Any]]] = {
    "vp": (VP, {"beta_min": 0.1, "beta_max": 20.0}),
    "subvp": (SubVP, {"beta_min": 0.1, "beta_max": 20.0}),
    "ve": (VE, {"sigma_min": 0.01, "sigma_max": 50.0}),
    "cosine": (Cosine, {}),
    "flow": (RectifiedFlow, {}),
    "edm": (EDM, {"sigma_min": 0.002, "sigma_max": 80.0}),
    "ddpm-linear": (
        lambda **p: DiscreteVP.named("linear", **p),
        {"beta_start": 1e-4, "beta_end": 0.02, **_DISCRETE},
    ),
    "ddpm-scaled-linear": (
        lambda **p: DiscreteVP.named("scaled_linear", **p),
        {"beta_start": 0.00085, "beta_end": 0.012, **_DISCRETE},
    ),
    "ddpm-cosine": (lambda **p: DiscreteVP.named("squaredcos_cap_v2", **p), _DISCRETE),
}


def names() -> list[str]:
    """The names `make_schedule` knows."""
    return list(_NAMED)


def make_schedule(name: str, **params: float) -> NoiseSchedule:
    """A schedule by name: vp, subvp, ve, cosine, flow, edm, ddpm-linear, ddpm-scaled-linear, ddpm-cosine.

    UserError for an unknown name or parameter, listing the valid ones.
    """
    if name not in _NAMED:
        raise UserError(f"schedule: {name!r} is unknown; valid: {', '.join(_NAMED)}")
    build, defaults = _NAMED[name]
    for key in params:
        if key not in defaults:
            raise UserError(f"schedule: {name} has no parameter {key!r}; valid: {', '.join(defaults) or 'none'}")
        if not isinstance(params[key], (int, float)):
            raise UserError(f"schedule: {name}'s {key} must be a number, not {params[key]!r}")
        if isinstance(defaults[key], int) and int(params[key]) != params[key]:
            raise UserError(f"schedule: {name}'s {key} must be a whole number, not {params[key]!r}")
    return build(**{**defaults, **params})
