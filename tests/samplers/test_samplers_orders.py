"""How fast each sampler's error falls with the number of steps, measured without sampling error.

For Gaussian data every sampler is linear, so that the law it ends on is known exactly: ODE solvers against the exact
flow, SDE samplers by the mean and variance that their linear map makes of the start and of each draw.
"""

import math

import pytest
import torch
from exact import Mixture, gaussian_flow
from planted import planted

from latentdiff import samplers
from latentdiff.denoiser import Denoiser
from latentdiff.samplers import multistep
from latentdiff.schedules import make_schedule, names

MEAN, STD = 0.5, 0.5
ODE = [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2), ("dpmpp_3m", 3)]
SDE = [
    ("ancestral", 1, {}),
    ("ddim", 1, {"eta": 0.5}),
    ("euler_maruyama", 1, {}),
    ("reverse_diffusion", 1, {}),
    ("dpmpp_2m_sde", 2, {}),
]


def gaussian(s) -> Denoiser:
    m = Mixture(torch.ones(1).double(), torch.full((1, 1), MEAN).double(), torch.tensor([STD]).double())
    return Denoiser.from_score(lambda x, t: m.score(x, s, t), s)


def snr_grid(s, n: int, start: float = -4) -> torch.Tensor:
    """From log SNR -4 to 4, away from both ends: the order is a statement about an interval on which the ODE is smooth."""
    return s.time_from_log_snr(torch.linspace(start, 4, n + 1, dtype=torch.float64))


def ode_error(s, run, n: int, start: float = -4) -> float:
    grid = snr_grid(s, n, start)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    mean = torch.full((1,), MEAN, dtype=torch.float64)
    truth = gaussian_flow(mean, STD, x, s, float(grid[0]), float(grid[-1]))
    return float((run(gaussian(s), x, grid) - truth).square().mean().sqrt())


class Impulses:
    """In the place of every draw: a batch in which draw k is 1 in sample k + 2 and 0 in all others."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, draw, shape, generator, device, dtype):
        z = torch.zeros(tuple(shape), dtype=dtype)
        if len(z) > self.drawn + 2:
            z[self.drawn + 2] = 1
        self.drawn += 1
        return z


def law(s, run, grid, monkeypatch, **options) -> tuple[float, float]:
    """Mean and variance of what `run` makes of p at grid[0], for data N(MEAN, STD^2): exact."""
    alpha, sigma = float(s.alpha(grid[0])), float(s.sigma(grid[0]))
    x = torch.full((2, 1), alpha * MEAN, dtype=torch.float64)
    x[1] += math.sqrt((alpha * STD) ** 2 + sigma**2)
    with monkeypatch.context() as patch:
        patch.setattr("latentdiff.utils.random._draw", count := Impulses())
        run(gaussian(s), x, grid, **options)
        patch.setattr("latentdiff.utils.random._draw", Impulses())
        out = run(gaussian(s), torch.cat([x, x[:1].expand(count.drawn, 1)]), grid, **options)
    return float(out[0]), float((out[1:] - out[0]).square().sum())


def law_error(s, run, n: int, monkeypatch, **options) -> float:
    grid = snr_grid(s, n)
    mean, variance = law(s, run, grid, monkeypatch, **options)
    alpha, sigma = float(s.alpha(grid[-1])), float(s.sigma(grid[-1]))
    return abs(mean - alpha * MEAN) + abs(variance - (alpha * STD) ** 2 - sigma**2)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler, order", ODE)
def test_order_of_the_ode_solvers(name, sampler, order):
    s = make_schedule(name)
    coarse, fine = (ode_error(s, getattr(samplers, sampler), n) for n in (24, 48))
    assert order - 0.25 < math.log2(coarse / fine) < order + 0.5


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler, order, options", SDE)
def test_weak_order_of_the_sde_samplers(name, sampler, order, options, monkeypatch):
    s = make_schedule(name)
    coarse, fine = (law_error(s, getattr(samplers, sampler), n, monkeypatch, **options) for n in (32, 64))
    assert order - 0.25 < math.log2(coarse / fine) < order + 0.5


# Planted bugs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler, order, change",
    [
        ("heun", 2, ("+ 0.5 * d_alpha", "+ d_alpha")),
        ("heun", 2, ("+ 0.5 * d_sigma", "- 0.5 * d_sigma")),
        ("dpmpp_2m", 2, ("d + (h", "d - (h")),
        ("dpmpp_2m", 2, ("(2 * h_previous)", "h_previous")),
        ("dpmpp_3m", 3, ("then.alpha * move", "0.999 * then.alpha * move")),
    ],
)
def test_a_lost_order_is_seen(sampler, order, change):
    wrong = planted(getattr(samplers, sampler), change)
    coarse, fine = (ode_error(make_schedule("vp"), wrong, n) for n in (24, 48))
    assert math.log2(coarse / fine) < order - 0.5


def test_the_first_step_of_3m_is_corrected():
    # From log SNR 0 on, where the data is seen in the first step and its error counts.
    for run, least in ((samplers.dpmpp_3m, 2.75), (planted(samplers.dpmpp_3m, ("if i == 1", "if i == -1")), None)):
        coarse, fine = (ode_error(make_schedule("vp"), run, n, start=0) for n in (24, 48))
        order = math.log2(coarse / fine)
        assert order > least if least else order < 2.4


@pytest.mark.parametrize("helper", ["_weights", "_derivatives"])
def test_the_parabola_of_3m_is_needed(helper):
    def line(values):  # the same method with a line in the parabola's place, or half its bend
        return lambda *a: (*values(*a)[:2], *(0.5 * v for v in values(*a)[2:]))

    wrong = planted(samplers.dpmpp_3m, **{helper: line(getattr(multistep, helper))})
    coarse, fine = (ode_error(make_schedule("vp"), wrong, n) for n in (24, 48))
    assert math.log2(coarse / fine) < 2.5


@pytest.mark.parametrize(
    "sampler, change",
    [
        ("ddim", ("variance**0.5 * randn", "0.95 * variance**0.5 * randn")),
        ("euler_maruyama", ("0.5 * c", "0.45 * c")),
        ("euler_maruyama", ("c**0.5", "0.95 * c**0.5")),
        ("reverse_diffusion", ("g2**0.5", "0.95 * g2**0.5")),
        ("reverse_diffusion", ("g2 / now.sigma", "0.95 * g2 / now.sigma")),
        ("dpmpp_2m_sde", ("d + (h", "d - (h")),
        ("dpmpp_2m_sde", ("(-2 * eta_h)", "(-1.9 * eta_h)")),
    ],
)
def test_a_lost_weak_order_is_seen(sampler, change, monkeypatch):
    order, options = {name: rest for name, *rest in SDE}[sampler]
    wrong = planted(getattr(samplers, sampler), change)
    errors = [law_error(make_schedule("vp"), wrong, n, monkeypatch, **options) for n in (48, 96)]
    assert not order - 0.25 < math.log2(errors[0] / errors[1]) < order + 0.5


# The equation itself ------------------------------------------------------------------------------------------------


def one_step(run, s, x, t: float, dt: float, z: float, monkeypatch) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr("latentdiff.utils.random._draw", lambda draw, shape, *_: torch.full(tuple(shape), z, dtype=torch.float64))
        return run(gaussian(s), x, torch.tensor([t, t - dt], dtype=torch.float64))


def off_the_sde(run, s, t: float, monkeypatch) -> float:
    """Relative error of drift and noise of a short step, against dx = [f x - g^2 score] dt + g dw (2011.13456 eq. 6)."""
    dt = 1e-6
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    still, kicked = (one_step(run, s, x, t, dt, z, monkeypatch) for z in (0.0, 1.0))
    f, g2, score = s.drift(t), s.diffusion(t) ** 2, gaussian(s)(x, t).score
    drift = (still - x) / dt + (f * x - g2 * score)
    noise = (kicked - still) ** 2 / dt - g2
    return max(float(drift.abs().max() / (g2 * score).abs().max()), float(noise.abs().max() / g2))


@pytest.mark.parametrize("t", [0.0503, 0.3004, 0.9507])  # between the knots of a discrete schedule
@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler", ["ancestral", "euler_maruyama", "reverse_diffusion", "dpmpp_2m_sde"])
def test_a_short_step_is_the_reverse_sde(sampler, name, t, monkeypatch):
    assert off_the_sde(getattr(samplers, sampler), make_schedule(name), t, monkeypatch) < 1e-3


def test_a_wrong_g_is_seen(monkeypatch):
    # g may be anything without harm to the marginals, so nothing but this test would know.
    wrong = planted(samplers.euler_maruyama, ("2 * (then.lam", "(then.lam"))
    assert off_the_sde(wrong, make_schedule("vp"), 0.3, monkeypatch) > 0.4
