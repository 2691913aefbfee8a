"""Every sampler on every schedule draws from the mixture it is told of: at the end, and at three times on the way.

Statistic: `exact.deviations`, one z-score for the weight, each mean and each entry of the covariance of each component,
Q = K (1 + D + D (D + 1)/2) of them.  The largest of Q standard normals is about sqrt(2 ln Q); 2 above that is the bound
(4.4 for K = 3, D = 2).  N is 4000 (1000 for annealed Langevin, whose step size leaves a bias of its own), so that a mean
is held to about 0.1 of a component's standard deviation, a variance to about 0.15 of itself and a weight to 0.03; the
seeds are fixed.  The steps of each sampler are as few as leave its own error below this (`STEPS`), so that a method of
high order is held to it.  Planted bugs go through the same function.
"""

import math

import pytest
import torch
from exact import Mixture, deviations, mixture
from planted import Lying, planted

from latentdiff import samplers
from latentdiff.denoiser import Denoiser
from latentdiff.samplers import grids
from latentdiff.samplers.langevin import PREDICTORS
from latentdiff.schedules import RectifiedFlow, make_schedule, names

CLEAN = RectifiedFlow(), 0.0  # alpha 1, sigma 0
STEPS = {
    "ancestral": 100,
    "ddim": 100,
    "euler": 100,
    "euler_maruyama": 100,
    "reverse_diffusion": 200,
    "predictor_corrector": 80,
    "annealed_langevin": 40,
    "heun": 30,
    "dopri5": 20,
    "dpmpp_2m": 40,
    "dpmpp_3m": 40,
    "dpmpp_2m_sde": 80,
}
OPTIONS = {"annealed_langevin": {"inner_steps": 20}}


def exact(schedule, m: Mixture) -> Denoiser:
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


@torch.no_grad()
def excess(sampler, name, shape=(2,), n=4000, run=None, steps=None, wrong=lambda denoiser: denoiser, **options):
    """How far the largest |z| is above what chance allows: at the end, and at the grid's times nearest log SNR 2, 0, -2.

    A right sampler is below 0 in all four.  On the way the state is held against the mixture's own p_t, so that ODE and
    SDE samplers must agree there too.
    sampler: a name; run: another function in its place; wrong: what is made of the denoiser.
    """
    s, m = make_schedule(name), mixture(shape)
    run = run or getattr(samplers, sampler)
    n = n // 4 if sampler == "annealed_langevin" else n
    grid = grids.angle(s, steps or STEPS[sampler])
    stations = [int((s.log_snr(grid) - snr).abs().argmin()) for snr in (2, 0, -2)]
    states = {}
    noise = torch.randn((n, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    arguments = wrong(exact(s, m)), noise * s.prior_std
    options = {**OPTIONS.get(sampler, {}), **options}
    x = run(*arguments, grid, torch.Generator().manual_seed(1), lambda i, t, x, x0: states.update({i: x}), **options)
    x = x if float(s.sigma(grid[-1])) == 0 else exact(s, m)(x, float(grid[-1])).x0
    found, held = [], [(x, CLEAN)]
    for i in stations:  # dopri5 does not stop there
        held.append((states[i - 1] if len(states) > 1 else run(*arguments, grid[: i + 1], **options), (s, float(grid[i]))))
    for state, at in held:
        z = deviations(m, state, *at)
        worst = float(z.abs().max())
        found.append((worst if math.isfinite(worst) else math.inf) - (2 * math.log(len(z))) ** 0.5 - 2)
    return tuple(found)


def test_the_statistic_is_standard_normal_on_exact_draws():
    m, s = mixture((2,)), make_schedule("vp")
    z = []
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        x0, _ = m.draw(4000, g)
        eps = torch.randn(x0.shape, generator=g, dtype=torch.float64)
        z.append(torch.stack([deviations(m, x0, *CLEAN), deviations(m, s.alpha(0.3) * x0 + s.sigma(0.3) * eps, s, 0.3)]))
    z = torch.stack(z)  # [40, 2, 18]
    assert float(z.mean().abs()) < 4 / z.numel() ** 0.5
    assert 0.75 < float(z[:, 0].std()) < 1.05 and float(z[:, 1].std()) < 1.05  # overlapping components: narrower


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler", samplers.names())
def test_reaches_the_mixture_on_every_schedule(sampler, name):
    """D = 2, N = 4000 (1000 for annealed Langevin): Q = 18 z-scores below 4.4 at the end and at three times on the way."""
    assert max(excess(sampler, name)) < 0


@pytest.mark.parametrize("name", ["ve", "flow"])
@pytest.mark.parametrize("sampler", samplers.names())
def test_reaches_the_mixture_in_one_and_sixteen_dimensions(sampler, name):
    """D = 1: Q = 9, bound 4.1, N = 4000.  D = 16: Q = 459, every covariance among them, bound 5.5, N = 2000."""
    assert max(excess(sampler, name, (1,))) < 0
    assert max(excess(sampler, name, (16,), n=2000)) < 0


@pytest.mark.parametrize("sampler", samplers.names())
def test_reaches_the_mixture_of_images_as_wide_as_the_batch(sampler):
    """[B, C, H, W] with B = W = 128, D = 128: Q = 25155, every covariance among them, bound 6.5."""
    n = 512 if sampler == "annealed_langevin" else 128
    assert max(excess(sampler, "flow", (1, 1, 128), n=n)) < 0


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_every_predictor_can_be_corrected(predictor):
    """D = 2, N = 2000 on the straight path: two corrector steps after each of 80 (heun and dopri5: 30)."""
    steps = 30 if predictor in ("heun", "dopri5") else 80
    options = {"predictor": predictor, "corrector_steps": 2}
    assert max(excess("predictor_corrector", "flow", n=2000, steps=steps, **options)) < 0


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_churn_keeps_the_mixture(name):
    for options in ({"s_churn": 20.0}, {"s_churn": 40.0, "s_tmin": 0.05, "s_tmax": 5.0}):
        assert max(excess("heun", name, steps=40, **options)) < 0


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_any_eta_keeps_the_mixture(name, eta):
    assert max(excess("dpmpp_2m_sde", name, steps=100, eta=eta)) < 0
    if eta < 1:
        assert max(excess("ddim", name, eta=eta)) < 0


# Planted bugs: each goes through `excess`, and must come out above -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("sampler", samplers.names())
def test_a_halved_score_is_seen(sampler):
    assert max(excess(sampler, "flow", wrong=lambda d: Lying(d, score=0.5))) > 5


@pytest.mark.slow
@pytest.mark.parametrize("sampler", samplers.names())
def test_an_x0_ten_per_cent_short_is_seen(sampler):
    assert max(excess(sampler, "vp", wrong=lambda d: Lying(d, x0=0.9))) > 1


BUGS = [
    # sampler, what is written there, what is planted, options
    ("ddim", "variance**0.5 * randn", "variance * randn", {"eta": 1.0}),
    ("ddim", "(then.sigma**2 - variance) ** 0.5 *", "then.sigma *", {"eta": 1.0}),
    ("ddim", "then.alpha * out.x0", "out.x0", {}),
    ("euler", "then.alpha * out.x0", "now.alpha * out.x0", {}),
    ("euler", "then.sigma * out.eps", "(then.sigma + now.sigma) / 2 * out.eps", {}),
    ("heun", "+ 0.5 * d_sigma", "- 0.5 * d_sigma", {"steps": 12}),
    ("heun", "(now.sigma / now.alpha) ** 2", "0", {"s_churn": 20.0, "steps": 40}),
    ("heun", "now = raised", "pass", {"s_churn": 20.0, "steps": 40}),
    ("euler_maruyama", "0.5 * c", "0.25 * c", {}),
    ("euler_maruyama", "c**0.5", "c", {}),
    ("reverse_diffusion", "g2 / now.sigma", "0.5 * g2 / now.sigma", {}),
    ("reverse_diffusion", "g2**0.5", "g2", {}),
    ("reverse_diffusion", "(2 - kept)", "1", {}),
    ("reverse_diffusion", "(kept * then.sigma)", "then.sigma", {}),
    ("predictor_corrector", "(2 * h) ** 0.5", "h ** 0.5", {}),
    ("predictor_corrector", "(2 * h) ** 0.5", "(2 * h)", {}),
    ("predictor_corrector", "h * out.score", "h * out.eps", {}),
    ("predictor_corrector", "h * out.score", "0.5 * h * out.score", {}),
    ("annealed_langevin", "0.5 * a / at.sigma", "a / at.sigma", {}),
    ("annealed_langevin", "a**0.5 *", "(2 * a)**0.5 *", {}),
    ("annealed_langevin", "(then.alpha - now.alpha) * x0", "0", {}),
    ("dopri5", "/ widen(turning", "/ widen(1.2 * turning", {}),
    ("dopri5", "alpha**2 + sigma**2", "1", {}),
    ("dopri5", "- sigma * schedule.d_alpha(t)", "", {}),
    ("dpmpp_2m", "then.alpha * math", "math", {}),
    ("dpmpp_2m", "d + (h", "d - (h", {"steps": 20}),
    ("dpmpp_3m", "then.alpha * move", "move", {}),
    ("dpmpp_2m_sde", "(-2 * eta_h)", "(-eta_h)", {}),
    ("dpmpp_2m_sde", "-h - eta_h", "-h", {}),
    ("dpmpp_2m_sde", "* kept * x", "* x", {}),
    ("dpmpp_2m_sde", "d + (h", "d - (h", {"steps": 40}),
]


@pytest.mark.slow
@pytest.mark.parametrize("sampler, right, wrong, options", BUGS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_planted_bug_is_seen(sampler, right, wrong, options):
    """On the straight path or VP the wrong twin is out of bounds; with the same options the sampler itself is not."""
    run = planted(getattr(samplers, sampler), (right, wrong))
    assert any(max(excess(sampler, name, run=run, **options)) > 0.5 for name in ("flow", "vp"))
    if options:  # without, the tests above have shown it
        assert max(max(excess(sampler, name, **options)) for name in ("vp", "flow")) < 0
