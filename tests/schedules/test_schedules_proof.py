"""Schedules held to differentiation, to their inverses and to score_sde's formulas, and wrong twins that must fail."""

import math
from functools import partial

import pytest
import torch

from latentdiff.schedules import EDM, VE, VP, Cosine, NoiseSchedule, RectifiedFlow, SubVP, make_schedule, names

T = (torch.arange(1, 1000, 7, dtype=torch.float64) + 0.5) / 1000  # midway between the knots of discrete schedules
H = 2e-5  # five points this far apart stay between two knots; the formula errs by a multiple of H^4
WITHIN = dict(rtol=1e-6, atol=0)


def derivative(fn, t):
    return (8 * (fn(t + H) - fn(t - H)) - (fn(t + 2 * H) - fn(t - 2 * H))) / (12 * H)


def inside(s: NoiseSchedule) -> torch.Tensor:
    return T[(s.t_min + 2 * H < T) & (s.t_max - 2 * H > T)]


def check_sde(s: NoiseSchedule) -> None:
    """f and g^2 are those of the SDE whose marginals are N(alpha x0, sigma^2 I), by its moment equations.

    d mean/dt = f mean and d var/dt = 2 f var + g^2, with mean = alpha and var = sigma^2, each to 1e-6 of its value.
    """
    t = inside(s)
    torch.testing.assert_close(s.drift(t), derivative(lambda t: s.alpha(t).log(), t), rtol=1e-6, atol=1e-12)
    f = derivative(lambda t: s.alpha(t).log(), t)
    g2 = derivative(lambda t: s.sigma(t) ** 2, t) - 2 * f * s.sigma(t) ** 2
    torch.testing.assert_close(s.diffusion(t) ** 2, g2, **WITHIN)
    torch.testing.assert_close(s.d_alpha(t), derivative(s.alpha, t), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(s.d_sigma(t), derivative(s.sigma, t), **WITHIN)


def check_inverse(s: NoiseSchedule) -> None:
    """t -> log-SNR -> t and log-SNR -> t -> log-SNR, and log-SNR = ln(alpha^2/sigma^2), falling."""
    t = inside(s)
    log_snr = s.log_snr(t)
    torch.testing.assert_close(log_snr, torch.log(s.alpha(t) ** 2 / s.sigma(t) ** 2), rtol=1e-9, atol=1e-9)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(s.time_from_log_snr(log_snr), t, rtol=1e-9, atol=0)
    levels = torch.linspace(float(log_snr[0]), float(log_snr[-1]), 50, dtype=torch.float64)
    torch.testing.assert_close(s.log_snr(s.time_from_log_snr(levels)), levels, rtol=1e-9, atol=1e-9)


def check_formulas(s: NoiseSchedule, alpha, sigma, f, g, prior_std: float) -> None:
    """The schedule against a paper's formulas, functions of t."""
    t = inside(s)
    for ours, theirs in ((s.alpha, alpha), (s.sigma, sigma), (s.drift, f), (s.diffusion, g)):
        torch.testing.assert_close(ours(t), theirs(t), rtol=1e-11, atol=1e-13)
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros_like(z), prior_std)
    torch.testing.assert_close(s.prior_log_prob(z), normal.log_prob(z).sum((1, 2, 3)), rtol=1e-12, atol=0)


# score_sde's VPSDE, subVPSDE and VESDE: marginal_prob, sde and prior_logp, with their parameters
B0, B1 = 0.1, 20.0
LOW, HIGH = 0.01, 50.0


def beta(t):
    return B0 + t * (B1 - B0)


def log_mean(t):
    return -0.25 * t**2 * (B1 - B0) - 0.5 * t * B0


SCORE_SDE = {
    VP: (
        lambda t: log_mean(t).exp(),
        lambda t: (1 - torch.exp(2 * log_mean(t))).sqrt(),
        lambda t: -0.5 * beta(t),
        lambda t: beta(t).sqrt(),
        1.0,
    ),
    SubVP: (
        lambda t: log_mean(t).exp(),
        lambda t: 1 - torch.exp(2 * log_mean(t)),
        lambda t: -0.5 * beta(t),
        lambda t: (beta(t) * (1 - torch.exp(-2 * B0 * t - (B1 - B0) * t**2))).sqrt(),
        1.0,
    ),
    VE: (
        torch.ones_like,
        lambda t: LOW * (HIGH / LOW) ** t,
        torch.zeros_like,
        lambda t: LOW * (HIGH / LOW) ** t * math.sqrt(2 * (math.log(HIGH) - math.log(LOW))),
        HIGH,
    ),
    Cosine: (
        lambda t: torch.cos(math.pi * t / 2),
        lambda t: torch.sin(math.pi * t / 2),
        lambda t: -math.pi / 2 * torch.tan(math.pi * t / 2),
        lambda t: (math.pi * torch.tan(math.pi * t / 2)).sqrt(),
        1.0,
    ),
    RectifiedFlow: (lambda t: 1 - t, lambda t: t, lambda t: -1 / (1 - t), lambda t: (2 * t / (1 - t)).sqrt(), 1.0),
    EDM: (torch.ones_like, lambda t: 80 * t, torch.zeros_like, lambda t: 80 * (2 * t).sqrt(), 80.0),
}


@pytest.mark.parametrize("name", names())
def test_the_sde_is_that_of_the_marginals(name):
    check_sde(make_schedule(name))


@pytest.mark.parametrize("name", names())
def test_log_snr_inverts(name):
    check_inverse(make_schedule(name))


@pytest.mark.parametrize("cls", SCORE_SDE)
def test_a_schedule_is_its_papers(cls):
    check_formulas(cls(), *SCORE_SDE[cls])


def test_zero_terminal_snr_is_a_schedule_too():
    s = make_schedule("ddpm-linear", zero_terminal_snr=True)
    check_sde(s)
    check_inverse(s)


# --- planted bugs: each makes a wrong twin of a schedule, which its check must refuse ---------------------------------


def twin(name: str, **wrong):
    """A schedule some of whose methods are wrong(schedule, right method, t)."""
    s = make_schedule(name)
    for method, fn in wrong.items():
        setattr(s, method, partial(fn, s, getattr(s, method)))
    return s


SDE_BUGS = {
    "halved drift": {"drift": lambda s, f, t: 0.5 * f(t)},
    "drift without its sign": {"drift": lambda s, f, t: -f(t)},
    "g without the factor 2": {"diffusion": lambda s, g, t: g(t) / math.sqrt(2)},
    "g squared": {"diffusion": lambda s, g, t: g(t) ** 2},
    "g without the drift's part": {"diffusion": lambda s, g, t: (2 * s.sigma(t) * s.d_sigma(t)).sqrt()},
    "sigma' halved": {"d_sigma": lambda s, d, t: 0.5 * d(t)},
    "alpha' of alpha squared": {"d_alpha": lambda s, d, t: 2 * s.alpha(t) * d(t)},
    "sigma off by 1e-5 of itself": {"sigma": lambda s, sigma, t: sigma(t) * (1 + 1e-5 * t)},
}
NO_DRIFT = ("halved drift", "drift without its sign", "g without the drift's part", "alpha' of alpha squared")


@pytest.mark.parametrize("bug", SDE_BUGS)
@pytest.mark.parametrize("name", names())
def test_a_wrong_sde_is_seen(name, bug):
    if name in ("ve", "edm") and bug in NO_DRIFT:
        return  # there f is 0, and the bug is none
    with pytest.raises(AssertionError):
        check_sde(twin(name, **SDE_BUGS[bug]))


INVERSE_BUGS = {
    "the SNR of amplitudes": {"log_snr": lambda s, fn, t: 0.5 * fn(t)},
    "an inverse of the wrong sign": {"time_from_log_snr": lambda s, fn, value: fn(-value)},
    "an inverse off by 1e-8": {"time_from_log_snr": lambda s, fn, value: fn(value) * (1 + 1e-8)},
    "rising": {"log_snr": lambda s, fn, t: -fn(t)},
}


@pytest.mark.parametrize("bug", INVERSE_BUGS)
@pytest.mark.parametrize("name", names())
def test_a_wrong_inverse_is_seen(name, bug):
    with pytest.raises(AssertionError):
        check_inverse(twin(name, **INVERSE_BUGS[bug]))


class HalvedBeta(VP):
    def _log_alpha(self, t):
        return 0.5 * super()._log_alpha(t)

    def _beta(self, t):
        return 0.5 * super()._beta(t)


class SubVPWithVPsSigma(SubVP):
    sigma, d_sigma = VP.sigma, VP.d_sigma


class VEWithoutFactor2(VE):
    def diffusion(self, t):
        return super().diffusion(t) / math.sqrt(2)


class VEWithUnitPrior(VE):
    def __init__(self):
        super().__init__()
        self.prior_std = 1.0


class FlowBackwards(RectifiedFlow):
    alpha, sigma = RectifiedFlow.sigma, RectifiedFlow.alpha


@pytest.mark.parametrize("wrong", [HalvedBeta, SubVPWithVPsSigma, VEWithoutFactor2, VEWithUnitPrior, FlowBackwards])
def test_a_wrong_formula_is_seen(wrong):
    with pytest.raises(AssertionError):
        check_formulas(wrong(), *SCORE_SDE[wrong.__base__])


def test_a_halved_beta_is_consistent_and_only_the_papers_formulas_see_it():
    check_sde(HalvedBeta())
