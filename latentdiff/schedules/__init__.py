"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1]; t = 0 is data and t = 1 is noise.

A schedule gives alpha, sigma, their derivatives in t and the inverse of its log-SNR. The forward SDE follows for all of them
(Score SDE, arXiv 2011.13456; the identity is checked in tests/schedules/test_schedules.py):
    dx = f(t) x dt + g(t) dw,    f = alpha'/alpha,    g^2 = 2 sigma sigma' - 2 f sigma^2.
Methods take a float or a tensor of times and return a float64 tensor of the same shape, on the same device.
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
# name: (function that makes it, parameters with their defaults)
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
    """The names that `make_schedule` takes."""
    return list(_NAMED)


def make_schedule(name: str, **params: float) -> NoiseSchedule:
    """A noise schedule by name.

    Args:
        name: one of these, with its parameters and their defaults:
            "vp": `VP`, beta_min=0.1, beta_max=20.
            "subvp": `SubVP`, beta_min=0.1, beta_max=20.
            "ve": `VE`, sigma_min=0.01, sigma_max=50.
            "cosine": `Cosine`.
            "flow": `RectifiedFlow`.
            "edm": `EDM`, sigma_min=0.002, sigma_max=80.
            "ddpm-linear": `DiscreteVP`, beta_start=1e-4, beta_end=0.02, num_steps=1000, zero_terminal_snr=False.
            "ddpm-scaled-linear": `DiscreteVP`, beta_start=0.00085, beta_end=0.012, num_steps=1000, zero_terminal_snr=False.
            "ddpm-cosine": `DiscreteVP`, num_steps=1000, zero_terminal_snr=False.
        params: the schedule's parameters, by keyword.

    Returns:
        A `NoiseSchedule`.

    Raises:
        UserError: an unknown name or parameter, or a value out of range; it lists what is valid.
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
