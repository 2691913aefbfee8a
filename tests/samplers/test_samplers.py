"""What every sampler keeps to: its evaluations, its callback, its generators, the ends of a schedule, its options."""

from functools import partial

import pytest
import torch
from exact import Mixture, deviations, gaussian_flow, mixture
from planted import planted
from torch import nn

from latentdiff import samplers
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.samplers import sample
from latentdiff.schedules import RectifiedFlow, make_schedule, names
from latentdiff.utils.random import generators, randn

# Options that make a sampler draw, or do more than by default
BUSY = {
    "ddim": {"eta": 0.7},
    "heun": {"s_churn": 3.0},
    "predictor_corrector": {"corrector_steps": 2, "norms": "measured"},
    "dpmpp_2m_sde": {"eta": 0.5},
}
SHAPE = (3, 3, 3)  # with a batch of 3, every axis is as long as the batch


def exact(schedule, m):
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


def noise(n, shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("name", names())
def test_default_grid_needs_few_steps(name):
    s, m = make_schedule(name), mixture((2,))
    denoiser, x = exact(s, m), noise(100, (2,))
    truth = sample(denoiser, x, "heun", 200, grid="karras")
    # Measured: 0.035 at most.  DPM-Solver++ must also beat the first order clearly at the same cost.
    error = {k: float((sample(denoiser, x, k, 20) - truth).square().mean().sqrt()) for k in ("euler", "dpmpp_2m")}
    assert error["dpmpp_2m"] < 0.06 and error["dpmpp_2m"] < error["euler"]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_step_is_the_posterior_with_the_stated_variance(eta):
    # Data at one point: x_s given x_t is Gaussian, with the mean of 2010.02502 eq. 7 and the variance of eq. 16.
    s, point = make_schedule("vp"), torch.full((1,), 0.7, dtype=torch.float64)
    denoiser = Denoiser(lambda x, t: point.expand(x.shape), s, "sample")
    x = torch.full((40000, 1), -0.4, dtype=torch.float64)
    grid = torch.tensor([0.5, 0.3], dtype=torch.float64)
    y = samplers.ddim(denoiser, x, grid, torch.Generator().manual_seed(0), eta=eta)
    a_t, a_s = s.alpha(0.5) ** 2, s.alpha(0.3) ** 2
    variance = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    mean = a_s.sqrt() * 0.7 + (1 - a_s - variance).sqrt() * (-0.4 - a_t.sqrt() * 0.7) / (1 - a_t).sqrt()
    assert float(y.mean()) == pytest.approx(float(mean), abs=4 * float(variance.sqrt()) / 200 + 1e-9)
    assert float(y.var()) == pytest.approx(float(variance), rel=0.03, abs=1e-12)
    if eta == 1:
        same = samplers.ancestral(denoiser, x, grid, torch.Generator().manual_seed(0))
        assert torch.equal(same, y)


@pytest.mark.parametrize("sampler", samplers.names())
def test_image_does_not_depend_on_its_batch(sampler):
    s, m = make_schedule("vp"), mixture(SHAPE)
    for options in ({}, BUSY[sampler]) if sampler in BUSY else ({},):
        batch = sample(exact(s, m), noise(3), sampler, 6, generators(9, range(3)), **options)
        for i in range(3):
            alone = sample(exact(s, m), noise(3)[i : i + 1], sampler, 6, generators(9, [i]), **options)
            torch.testing.assert_close(alone[0], batch[i], rtol=1e-10, atol=1e-10)


class WideNet(nn.Module):
    """A U-Net's place in float32: a fixed convolution over [B, 3, 3, 3]."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn((3, 3, 3, 3), generator=torch.Generator().manual_seed(0)) / 5)

    def forward(self, sample, timestep):
        t = timestep.reshape(-1, 1, 1, 1) / 1000
        y = torch.tanh(nn.functional.conv2d(sample, self.weight, padding=1) + torch.sin(3 * t))
        return type("Output", (), {"sample": 0.5 * sample + 0.5 * y})


@pytest.mark.parametrize("sampler", samplers.names())
def test_seeds_belong_to_images_with_a_network_too(sampler):
    s = make_schedule("flow")
    denoiser = Denoiser(unet_model(WideNet(), s), s, "flow")
    batch = sample(denoiser, (3, *SHAPE), sampler, 6, generators(4, range(3)), **BUSY.get(sampler, {}))
    other = sample(denoiser, (2, *SHAPE), sampler, 6, generators(4, [2, 7]), **BUSY.get(sampler, {}))
    assert batch.dtype == torch.float32
    torch.testing.assert_close(other[0], batch[2], rtol=1e-4, atol=1e-4)
    assert (other[1] - batch[2]).abs().max() > 0.1


@pytest.mark.parametrize("sampler", samplers.names())
def test_one_generator_gives_the_same_again_and_another_seed_another(sampler):
    s, m = make_schedule("ve"), mixture(SHAPE)
    a, b, c = (
        sample(exact(s, m), noise(2), sampler, 4, torch.Generator().manual_seed(k), **BUSY.get(sampler, {})) for k in (0, 0, 1)
    )
    draws = sampler in BUSY or sampler not in ("euler", "dopri5", "dpmpp_2m", "dpmpp_3m")
    assert torch.equal(a, b) and torch.equal(a, c) != draws


@pytest.mark.parametrize("sampler, options", [("ddim", {}), ("heun", {}), ("dpmpp_2m_sde", {"eta": 0.0})])
def test_nothing_is_drawn_without_need(sampler, options):
    s, m, g = make_schedule("vp"), mixture(SHAPE), torch.Generator().manual_seed(0)
    before = g.get_state()
    x = sample(exact(s, m), noise(2), sampler, 4, g, **options)
    assert torch.equal(g.get_state(), before)
    same = {"ddim": "euler", "dpmpp_2m_sde": "dpmpp_2m", "heun": "heun"}[sampler]
    torch.testing.assert_close(x, sample(exact(s, m), noise(2), same, 4), rtol=1e-12, atol=1e-12)


def test_shape_draws_its_own_noise():
    s, m = make_schedule("ve"), mixture(SHAPE)
    drawn = sample(exact(s, m), (3, *SHAPE), "euler", 4, generators(2, range(3)))
    given = sample(exact(s, m), randn((3, *SHAPE), generators(2, range(3))), "euler", 4)
    assert drawn.dtype == torch.float32 and torch.equal(drawn, given)


@pytest.mark.parametrize("sampler", samplers.names())
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_evaluations_and_callback(sampler, name):
    s, m, looked, told = make_schedule(name), mixture(SHAPE), [], []
    counted = Denoiser.from_score(lambda x, t: (looked.append(float(t[0])), m.score(x, s, t))[1], s)
    end = sample(counted, noise(2), sampler, 5, callback=lambda i, t, x, x0: told.append((i, t, x, x0)))
    clean = name == "vp"
    assert [i for i, *_ in told] == ([0] if sampler == "dopri5" else list(range(5)))
    assert (told[0][1] == s.t_max) == (sampler != "annealed_langevin")  # which reports where it has arrived
    # On data the last step is its own x0 estimate, with nothing ahead to look at or to correct; VE ends above sigma = 0
    # and is denoised.
    if sampler in ("heun", "predictor_corrector"):
        assert len(looked) == (9 if clean else 11)
    elif sampler == "annealed_langevin":
        assert len(looked) == (51 if clean else 61)  # ten at each level, VE's last included
    elif sampler != "dopri5":
        assert len(looked) == (5 if clean else 6)
    if name == "vp":
        assert torch.equal(end, told[-1][2]) and torch.equal(end, told[-1][3])


def test_callback_may_replace_the_state():
    s, m = make_schedule("flow"), mixture(SHAPE)
    for sampler in samplers.names():
        stopped = sample(exact(s, m), noise(2), sampler, 4, callback=lambda i, t, x, x0: torch.full_like(x, i))
        assert torch.equal(stopped, torch.full_like(stopped, 0 if sampler == "dopri5" else 3))


# Ends of a schedule -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler", samplers.names())
def test_no_step_blows_the_state_up(sampler, name):
    """20 steps of the default grid: the state is never over 1.6 times as wide as p_t, and within 15 % of it at the end.

    Where sigma itself falls from 50 or 80 (VE, EDM), reverse_diffusion and annealed_langevin, which leave a level's noise
    for the next to remove, may be 8 times as wide on the way.
    """
    s, m, widths = make_schedule(name), mixture((2,)), []
    grid = samplers.make_grid("angle", s, 20)

    def watch(i, t, x, x0):
        there = 0.0 if sampler == "dopri5" else float(grid[i + 1])
        truth = s.alpha(there) ** 2 * m.variance().mean() + s.sigma(there) ** 2
        widths.append(float((x.var(0).mean() / truth).sqrt()))

    sample(exact(s, m), noise(500, (2,)), sampler, 20, torch.Generator().manual_seed(1), watch)
    assert 0.85 < min(widths) and max(widths) < (8 if s.prior_std > 1 else 1.6) and widths[-1] < 1.15


@pytest.mark.parametrize("name", ["flow", "cosine"])
@pytest.mark.parametrize("sampler", samplers.names())
def test_pure_noise_is_a_place_to_start_from(sampler, name):
    """At t = 1, alpha = 0 and f and g are infinite; a prediction of x0 is finite there."""
    s, m = make_schedule(name), mixture((2,))

    def mean(x, t):  # E[x0 | x_t]
        log_p, alpha, variance = m.components(x, s, t)
        gain = alpha * m.stds**2 / variance  # [B, K]
        each = m.means + gain[..., None] * (x[:, None] - alpha[..., None] * m.means)
        return (torch.softmax(log_p, 1)[..., None] * each).sum(1)

    grid = samplers.make_grid("angle", s, 60)
    grid[0] = 1.0
    options = {"inner_steps": 20} if sampler == "annealed_langevin" else BUSY.get(sampler, {}).copy()
    options.pop("norms", None)
    g = torch.Generator().manual_seed(1)
    x = sample(Denoiser(mean, s, "sample"), noise(1000, (2,)), sampler, generator=g, grid=grid, **options)
    assert float(deviations(m, x, RectifiedFlow(), 0.0).abs().max()) < 4.4


@pytest.mark.parametrize("sampler", samplers.names())
@pytest.mark.parametrize("name", names())
def test_one_and_two_steps_are_finite(sampler, name):
    s, m = make_schedule(name), mixture((2,))
    for steps in (1, 2):
        x = sample(exact(s, m), noise(20, (2,)), sampler, steps, torch.Generator().manual_seed(0))
        assert bool(torch.isfinite(x).all()) and float(x.abs().max()) < 10 * s.prior_std


# Options ------------------------------------------------------------------------------------------------------------


def test_eta_changes_the_result():
    s, m = make_schedule("vp"), mixture(SHAPE)
    drawn = [sample(exact(s, m), noise(2), "ddim", 5, torch.Generator().manual_seed(0), eta=eta) for eta in (0, 0.5, 1)]
    assert not torch.allclose(drawn[0], drawn[1]) and not torch.allclose(drawn[1], drawn[2])


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sampler": "plms"}, "ancestral, ddim, euler_maruyama, .*dpmpp_2m_sde"),
        ({"sampler": "ddim", "churn": 1}, "valid: eta"),
        ({"eta": 1.0}, "dpmpp_2m has no option 'eta'"),
        ({"grid": "linear"}, "angle, uniform, karras"),
        ({"grid": torch.tensor([0.1, 0.5])}, "descending"),
        ({"grid": torch.tensor([1.5, 0.5])}, "within"),
        ({"grid": [0.5]}, "1-d"),
        ({"grid": None}, "neither one of angle, .* nor a list of times"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 1001, "grid": "trailing"}, "at most 1000"),
        ({"sampler": "predictor_corrector", "predictor": "dpmpp_2m"}, "valid: ancestral, .*dopri5"),
        ({"sampler": "predictor_corrector", "norms": "batch"}, "valid: expected, measured"),
        ({"sampler": "predictor_corrector", "snr": 0.0}, "snr above 0"),
        ({"sampler": "predictor_corrector", "corrector_steps": -1}, "corrector_steps: at least 0"),
        ({"sampler": "annealed_langevin", "inner_steps": 0}, "inner_steps: at least 1"),
        ({"sampler": "annealed_langevin", "step_size": 4.0}, "below 4"),
        ({"sampler": "heun", "s_churn": -1.0}, "s_churn"),
        ({"sampler": "heun", "variable": "sigma"}, "valid: path, ratio"),
        ({"sampler": "heun", "variable": "ratio", "grid": [1.0, 0.5]}, "alpha is 0"),
        ({"sampler": "heun", "s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin <= s_tmax"),
        ({"sampler": "dpmpp_2m_sde", "eta": -0.1}, "eta: at least 0"),
        ({"sampler": "ddim", "eta": 1.5}, "eta: between 0 and 1"),
        ({"sampler": "dopri5", "rtol": 0.0}, "rtol: must be above 0"),
        ({"sampler": "dopri5", "max_steps": 0}, "max_steps: must be above 0"),
        ({"steps": 5.0}, "steps: an integer of at least 1"),
        ({"grid": "karras", "grid_options": {"shift": 2.0}}, "valid: rho"),
        ({"grid": [1.0, 0.5, 0.0]}, "sampler dpmpp_2m: the samples are not finite; the grid starts at t = 1, where alpha"),
    ],
)
def test_mistakes_are_named(change, said):
    s = make_schedule("flow")
    with pytest.raises(UserError, match=said):
        sample(Denoiser(lambda x, t: x, s), (1, 2), **change)


def test_a_network_that_has_diverged_is_said():
    with pytest.raises(UserError, match="sampler heun: the samples are not finite; the network"):
        sample(Denoiser(lambda x, t: x * torch.nan, make_schedule("vp")), (1, 2), "heun", 3)


def test_noise_is_at_least_float32_and_goes_to_its_device():
    s, m = make_schedule("vp"), mixture(SHAPE)
    half = noise(2).bfloat16()
    assert torch.equal(sample(exact(s, m), half, "euler", 4), sample(exact(s, m), half.float(), "euler", 4))
    seen = []

    def model(x, t):
        seen.append(x.device.type)
        return torch.zeros_like(x)

    # There is no second device here but meta, whose samples have no values to be looked at in the end
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        sample(Denoiser(model, s), (2, 3), "euler", 2, generators(2, range(2)), device="meta")
    assert set(seen) == {"meta"}


def test_many_steps_of_timesteps():
    """Timesteps 1000 and 999 are both t_max on the straight path: once they made a step of length 0."""
    s, m = make_schedule("flow"), mixture((2,))
    for sampler in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde"):
        assert bool(sample(exact(s, m), noise(2, (2,)), sampler, 1000, grid="trailing").isfinite().all())


# Where sampling starts


def of_variance(schedule, variance: float, mean: float = 0.0):
    """The exact denoiser of N(mean, variance) in one dimension."""
    m = Mixture(torch.ones(1).double(), torch.full((1, 1), mean).double(), torch.tensor([variance**0.5]).double())
    return exact(schedule, m)


@pytest.mark.parametrize("name", names())
def test_the_start_has_the_spread_of_x_at_the_grid_s_first_time(name):
    """On N(0, 1) the ODE is linear: from the right spread at any t it ends on 1, up to the grid's last step and the prior."""
    s = make_schedule(name)
    for first in (s.t_max, 0.8 * s.t_max, 0.5 * s.t_max):
        grid = torch.linspace(first, s.t_min + 1e-3, 60, dtype=torch.float64)
        z = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
        end = sample(of_variance(s, 1.0), z, "dopri5", grid=grid, rtol=1e-7, atol=1e-7)
        spread = (s.alpha(grid[-1]) ** 2 + s.sigma(grid[-1]) ** 2).sqrt()
        # prior_std leaves out the data's own variance where alpha is 1: sigma / sqrt(1 + sigma^2)
        kept = s.prior_std / float(torch.hypot(s.alpha(s.t_max), s.sigma(s.t_max)))
        assert abs(kept - 1) < 2e-3
        # The result is the x0 estimate at the grid's end, alpha x / (alpha^2 + sigma^2)
        torch.testing.assert_close(end, kept * s.alpha(grid[-1]) / spread * z, rtol=1e-5, atol=1e-6)
    assert float(s.start_std(s.t_max)) == s.prior_std


def check_leading(run):
    """VE on N(0, 0.25) from the "leading" grid, which starts at sigma 33 of 50: std 0.5, where sigma_max gives 0.76."""
    s, z = make_schedule("ve"), torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    x = run(of_variance(s, 0.25), z, "dopri5", 20, grid="leading")
    assert float(x.abs().max()) == pytest.approx(0.5, rel=0.01)


def test_ve_from_the_leading_grid_has_the_spread_of_the_data():
    check_leading(sample)
    with pytest.raises(AssertionError):
        check_leading(planted(sample, ("schedule.start_std(times[0])", "schedule.prior_std")))


@pytest.mark.parametrize("name", ["vp", "ve", "flow", "edm"])
def test_a_state_is_taken_as_it_is(name):
    """x_t on the way goes where the ODE of N(0.3, 0.25) takes it; the same tensor as noise is scaled first."""
    s, x = make_schedule(name), torch.tensor([[0.4], [-1.2]], dtype=torch.float64)
    grid = torch.linspace(0.6, s.t_min + 1e-3, 40, dtype=torch.float64)
    mean, std = torch.full((1,), 0.3, dtype=torch.float64), 0.5
    seen = []
    options = {"grid": grid, "callback": lambda _, __, x, ___: seen.append(x), "rtol": 1e-8, "atol": 1e-8}
    sample(of_variance(s, std**2, 0.3), x, "dopri5", start="state", **options)
    torch.testing.assert_close(seen[0], gaussian_flow(mean, std, x, s, 0.6, float(grid[-1])), rtol=1e-5, atol=1e-6)
    sample(of_variance(s, std**2, 0.3), x / float(s.start_std(0.6)), "dopri5", **options)
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_encoding_up_to_any_time_is_undone_from_there(name):
    s, x0 = make_schedule(name), torch.tensor([[0.4], [-1.2]], dtype=torch.float64)
    denoiser, grid = of_variance(s, 0.25), [0.7, *torch.linspace(0.65, s.t_min + 1e-3, 30).tolist()]
    noise = samplers.encode(denoiser, x0, "dopri5", grid=grid, rtol=1e-7, atol=1e-7)
    back = sample(denoiser, noise, "dopri5", grid=grid, rtol=1e-7, atol=1e-7)
    # What is encoded is taken for the state at the grid's end, and decoding ends on the x0 estimate there
    torch.testing.assert_close(back, denoiser(x0, grid[-1]).x0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("start", "given"), [("x", torch.zeros(1, 2)), ("state", (1, 2))])
def test_a_start_that_cannot_be_is_refused(start, given):
    with pytest.raises(UserError, match=r'start: .*; valid: "noise", or "state" with a tensor x_t'):
        sample(of_variance(make_schedule("vp"), 1.0), given, start=start)


# DDPM's two variances


def check_large(run, name):
    """On N(0, 1) the large variance is that of x_s given x_t: every step has the spread of p_s, however long it is.

    The step is x_s = c x_t + sqrt(v) z with the exact c, so with the two moments measured on 200,000 draws a variance is
    within 5 standard errors, 5 sqrt(2 / n), of its own.
    """
    s, n = make_schedule(name), 200_000
    generator, seen = torch.Generator().manual_seed(0), []
    grid = torch.tensor([0.95, 0.6, 0.3, 0.1], dtype=torch.float64)
    spread = [float(torch.hypot(s.alpha(t), s.sigma(t))) for t in grid]
    x = spread[0] * torch.randn((n, 1), generator=generator, dtype=torch.float64)
    run(of_variance(s, 1.0), x, grid, generator, lambda _, __, x, ___: seen.append(x))
    for state, expected in zip(seen, spread[1:], strict=True):
        assert float(state.var()) == pytest.approx(expected**2, rel=5 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "ddpm-linear"])
def test_the_large_variance_is_right_for_data_of_unit_variance(name):
    check_large(partial(samplers.ancestral, variance="large"), name)
    with pytest.raises(AssertionError):
        check_large(samplers.ancestral, name)  # the small one draws too little
    bug = ("added * (then.alpha**2 + then.sigma**2) / (now.alpha**2 + now.sigma**2)", "added * 0.9")
    with pytest.raises(AssertionError):
        check_large(partial(planted(samplers.ancestral, bug), variance="large"), name)


def test_the_large_variance_on_ddpm_is_beta():
    s = make_schedule("ddpm-linear")
    k = torch.tensor([500, 499])
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[k[0] - 1]
    x = torch.zeros(200_000, 1, dtype=torch.float64)
    y = samplers.ancestral(of_variance(s, 1.0), x, k / 1000, torch.Generator().manual_seed(0), variance="large")
    assert float(y.var()) == pytest.approx(float(beta), rel=5 * (2 / len(x)) ** 0.5)
    with pytest.raises(UserError, match="variance: 'huge' is unknown; valid: small, large"):
        sample(of_variance(s, 1.0), (2, 1), "ancestral", 3, variance="huge")
    assert bool(torch.isfinite(sample(of_variance(s, 1.0), (2, 1), "ancestral", 3, variance="large")).all())
