"""Samplers against exact flows, the moments of a Gaussian mixture, their orders, and diffusers on the same network."""

import math

import pytest
import torch
from exact import Mixture, gaussian_flow, mixture
from torch import nn

from latentdiff import grids, samplers
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.rng import generators, randn
from latentdiff.samplers import sample
from latentdiff.schedules import NoiseSchedule, make_schedule, names

ODE = ("euler", "ddim", "heun", "dpmpp_2m")
SHAPE = (3, 3, 3)  # with a batch of 3, every axis is as long as the batch


def exact(schedule, m):
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


def noise(n, shape=SHAPE, seed=0, dtype=torch.float64):
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


# Exactness ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "ddpm-linear"])
@pytest.mark.parametrize("sampler", samplers.names())
def test_reaches_the_moments_of_a_mixture(name, sampler):
    s, m = make_schedule(name), mixture((2,))
    x = sample(exact(s, m), noise(6000, (2,)), sampler, 60, torch.Generator().manual_seed(1))
    share = m.posterior(x, s, max(s.t_min, 1e-3)).mean(0)
    # Standard errors at n = 6000 are 0.013 (mean), 0.02 (variance), 0.0065 (shares); what remains is the step size.
    torch.testing.assert_close(x.mean(0), m.mean(), rtol=0, atol=0.06)
    torch.testing.assert_close(x.var(0), m.variance(), rtol=0.08, atol=0)
    torch.testing.assert_close(share, m.weights, rtol=0, atol=0.03)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler, order", [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_against_the_exact_flow(name, sampler, order):
    s = make_schedule(name)
    mean, std = torch.full(SHAPE, 0.5, dtype=torch.float64), 0.5
    denoiser = exact(s, Mixture(torch.ones(1).double(), mean[None], torch.tensor([std]).double()))
    # Between log-SNR -4 and 4: the order is a statement about a fixed interval on which the ODE is smooth.
    high, low = s.time_from_log_snr(torch.tensor([-4.0, 4.0]))
    x = noise(8)
    truth = gaussian_flow(mean, std, x, s, float(high), float(low))
    errors = []
    for n in (24, 48):
        grid = s.time_from_log_snr(torch.linspace(-4, 4, n + 1, dtype=torch.float64))
        reached = getattr(samplers, sampler)(denoiser, x, grid)
        errors.append(float((reached - truth).square().mean().sqrt()))
    assert order - 0.25 < math.log2(errors[0] / errors[1]) < order + 0.5


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


# Peers --------------------------------------------------------------------------------------------------------------


class SmallNet(nn.Module):
    """A fixed random network in a U-Net's place, smooth in its input and timestep."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn((4, 4, 3, 3), generator=g) / 6)

    def forward(self, sample, timestep):
        t = torch.as_tensor(timestep, dtype=torch.float32).reshape(-1, 1, 1, 1) / 1000
        y = torch.tanh(nn.functional.conv2d(sample, self.weight, padding=1) + torch.sin(3 * t))
        return type("Output", (), {"sample": 0.5 * sample + 0.5 * y})


@torch.no_grad()
def diffusers_run(scheduler, net, x, steps, generator=None):
    scheduler.set_timesteps(steps)
    extra = {"eta": 1.0, "generator": generator} if generator else {}
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps:
        x = scheduler.step(net(scale(x, t), t).sample, t, x, **extra).prev_sample
    return x


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddpm-linear", "ddpm-scaled-linear"])
@pytest.mark.parametrize(
    "scheduler, sampler",
    [
        ("DDIMScheduler", "ddim"),
        ("DDIMScheduler", "euler"),
        ("DDIMScheduler", "ancestral"),
        ("EulerDiscreteScheduler", "euler"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
    ],
)
def test_same_as_diffusers_on_the_trailing_grid(name, kind, scheduler, sampler):
    s, net, x = make_schedule(name), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    seeded = [torch.Generator().manual_seed(5) if sampler == "ancestral" else None for _ in range(2)]
    ours = sample(Denoiser(unet_model(net, s), s, kind), x, sampler, 20, seeded[0], grid="trailing")
    peer = s.to_scheduler(scheduler, kind)
    # Euler of diffusers holds x_t / alpha(t).
    start = x / float(s.alpha(1.0)) if scheduler == "EulerDiscreteScheduler" else x
    theirs = diffusers_run(peer, net, start, 20, seeded[1])
    # x0 is had by a division by alpha(1), 0.006 for linear betas: float32 leaves this much.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_same_as_diffusers_on_the_leading_grid():
    s, net, x = make_schedule("ddpm-scaled-linear"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    ours = sample(Denoiser(unet_model(net, s), s), x, "ddim", 16, grid="leading")
    theirs = diffusers_run(s.to_scheduler("DDIMScheduler", timestep_spacing="leading"), net, x, 16)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_same_as_diffusers_on_flow(sampler, shift):
    from diffusers import FlowMatchHeunDiscreteScheduler

    s, net, x = make_schedule("flow"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    peer = s.to_scheduler(shift=shift) if sampler == "euler" else FlowMatchHeunDiscreteScheduler(shift=shift)
    theirs = diffusers_run(peer, net, x, 12)
    grid = torch.unique(peer.sigmas).flip(0)  # Heun's are listed twice
    ours = sample(Denoiser(unet_model(net, s), s, "flow"), x, sampler, grid=grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Contracts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", samplers.names())
def test_image_does_not_depend_on_its_batch(sampler):
    s, m = make_schedule("vp"), mixture(SHAPE)
    options = {"eta": 0.7} if sampler == "ddim" else {}
    batch = sample(exact(s, m), noise(3), sampler, 6, generators(9, range(3)), **options)
    for i in range(3):
        alone = sample(exact(s, m), noise(3)[i : i + 1], sampler, 6, generators(9, [i]), **options)
        torch.testing.assert_close(alone[0], batch[i], rtol=1e-11, atol=1e-11)


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
    per_step = 2 if sampler == "heun" else 1
    # On data the last step is its own x0 estimate and Heun has nothing ahead to look at; VE ends above sigma = 0.
    assert len(looked) == 5 * per_step + (1 if name == "ve" else 1 - per_step)
    assert [i for i, *_ in told] == list(range(5)) and told[0][1] == s.t_max
    if name == "vp":
        assert torch.equal(end, told[-1][2]) and torch.equal(end, told[-1][3])


def test_callback_may_replace_the_state():
    s, m = make_schedule("flow"), mixture(SHAPE)
    for sampler in samplers.names():
        stopped = sample(exact(s, m), noise(2), sampler, 4, callback=lambda i, t, x, x0: torch.full_like(x, i))
        assert torch.equal(stopped, torch.full_like(stopped, 3))


def test_eta_changes_the_result():
    s, m = make_schedule("vp"), mixture(SHAPE)
    drawn = [
        sample(exact(s, m), noise(2), "ddim", 5, torch.Generator().manual_seed(0), eta=eta) for eta in (0, 0.5, 1)
    ]
    assert not torch.allclose(drawn[0], drawn[1]) and not torch.allclose(drawn[1], drawn[2])


# Grids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("grid", grids.names())
@pytest.mark.parametrize("n", [1, 2, 20])
def test_grid_covers_the_schedule(name, grid, n):
    s = make_schedule(name)
    t = grids.make_grid(grid, s, n)
    assert t.shape == (n + 1,) and t.dtype == torch.float64 and (t.diff() < 0).all()
    assert float(t[-1]) == (s.t_min if name == "ve" else 0)
    assert s.t_min <= float(t[-2]) and float(t[0]) <= s.t_max
    if grid != "leading":
        assert float(t[0]) == pytest.approx(s.t_max, abs=1e-12)


def test_grids_are_even_in_what_they_say():
    s = make_schedule("vp")
    angle = torch.atan(s.sigma(grids.angle(s, 10)) / s.alpha(grids.angle(s, 10)))
    torch.testing.assert_close(angle.diff(), angle.diff()[:1].expand(10), rtol=1e-6, atol=0)
    snr = s.log_snr(grids.log_snr(s, 10))[:-1]
    torch.testing.assert_close(snr.diff(), snr.diff()[:1].expand(9), rtol=1e-6, atol=0)
    for rho in (7.0, 3.0):
        ratio = torch.exp(-0.5 * s.log_snr(grids.karras(s, 10, rho))[:-1]) ** (1 / rho)
        torch.testing.assert_close(ratio.diff(), ratio.diff()[:1].expand(9), rtol=1e-6, atol=0)


def test_karras_is_diffusers():
    s = make_schedule("ddpm-linear")
    peer = s.to_scheduler("EulerDiscreteScheduler", use_karras_sigmas=True)
    peer.set_timesteps(12)
    ratio = torch.exp(-0.5 * s.log_snr(grids.karras(s, 12)))
    torch.testing.assert_close(ratio[:1].float(), peer.sigmas[:1], rtol=1e-3, atol=0)
    # diffusers' trailing sigmas end above sigma_min; ours reach it, so only the rule is compared.
    low, high = float(ratio[-2]) ** (1 / 7), float(ratio[0]) ** (1 / 7)
    torch.testing.assert_close(ratio[:-1], (high + torch.linspace(0, 1, 12, dtype=torch.float64) * (low - high)) ** 7)


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize("n", [7, 20, 33])
def test_spacings_are_diffusers(spacing, n):
    s = make_schedule("ddpm-linear")
    peer = s.to_scheduler("DDIMScheduler", timestep_spacing=spacing)
    peer.set_timesteps(n)
    ours = s.timestep(grids.make_grid(spacing, s, n)[:-1]).round().long()
    assert ours.tolist() == peer.timesteps.tolist()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"sampler": "plms"}, "ancestral, ddim, euler, heun, dpmpp_2m"),
        ({"sampler": "ddim", "churn": 1}, "valid: eta"),
        ({"eta": 1.0}, "dpmpp_2m has no option 'eta'"),
        ({"grid": "linear"}, "angle, uniform, karras"),
        ({"grid": torch.tensor([0.1, 0.5])}, "descending"),
        ({"grid": torch.tensor([1.5, 0.5])}, "within"),
        ({"steps": 0}, "at least 1"),
        ({"steps": 1001, "grid": "trailing"}, "at most 1000"),
    ],
)
def test_mistakes_are_named(change, said):
    s = make_schedule("vp")
    with pytest.raises(UserError, match=said):
        sample(Denoiser(lambda x, t: x, s), (1, 2), **change)


def test_a_new_schedule_needs_nothing_but_its_formulas():
    class Half(NoiseSchedule):
        """alpha = 1, sigma = t: the path of 2206.00364."""

        t_min, t_max, prior_std = 0.002, 1.0, 1.0
        alpha = staticmethod(lambda t: torch.ones_like(torch.as_tensor(t, dtype=torch.float64)))
        sigma = staticmethod(lambda t: torch.as_tensor(t, dtype=torch.float64))
        d_alpha = staticmethod(lambda t: torch.zeros_like(torch.as_tensor(t, dtype=torch.float64)))
        d_sigma = staticmethod(lambda t: torch.ones_like(torch.as_tensor(t, dtype=torch.float64)))
        time_from_log_snr = staticmethod(lambda value: torch.exp(-0.5 * torch.as_tensor(value, dtype=torch.float64)))

    s, m = Half(), mixture((2,))
    x = noise(50, (2,))
    grid = grids.karras(s, 12)
    ours = samplers.heun(exact(s, m), x, grid)
    # 2206.00364 algorithm 1 without churn, in its own notation.
    y = x
    for now, then in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        d = -now * m.score(y, s, now)
        ahead = y + (then - now) * d
        y = ahead if then == 0 else y + (then - now) * 0.5 * (d - then * m.score(ahead, s, then))
    torch.testing.assert_close(ours, y, rtol=1e-10, atol=1e-10)
