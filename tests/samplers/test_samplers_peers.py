"""Samplers against diffusers on the same network, grid and noise, and against the papers' algorithms in their own notation."""

import inspect

import pytest
import torch
from exact import mixture
from torch import nn

from latentdiff import samplers
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.samplers import grids, sample
from latentdiff.schedules import NoiseSchedule, make_schedule


def exact(schedule, m):
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


def noise(n, shape, seed=0, dtype=torch.float64):
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)


# diffusers ----------------------------------------------------------------------------------------------------------


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
    accepted = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"eta": 1.0, "generator": generator}.items() if generator and k in accepted}
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
        ("HeunDiscreteScheduler", "heun"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m"),
        ("DPMSolverMultistepScheduler", "dpmpp_2m_sde"),
    ],
)
def test_same_as_diffusers_on_the_trailing_grid(name, kind, scheduler, sampler):
    if scheduler == "HeunDiscreteScheduler" and kind == "sample":
        pytest.skip("diffusers has no such Heun")
    s, net, x = make_schedule(name), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    draws = sampler in ("ancestral", "dpmpp_2m_sde")
    seeded = [torch.Generator().manual_seed(5) if draws else None for _ in range(2)]
    options = {"variable": "ratio"} if sampler == "heun" else {}
    ours = sample(Denoiser(unet_model(net, s), s, kind), x, sampler, 20, seeded[0], grid="trailing", **options)
    peer = s.to_scheduler(scheduler, kind, **({"algorithm_type": "sde-dpmsolver++"} if sampler == "dpmpp_2m_sde" else {}))
    # Euler and Heun of diffusers hold x_t / alpha(t).
    start = x / float(s.alpha(1.0)) if scheduler in ("EulerDiscreteScheduler", "HeunDiscreteScheduler") else x
    theirs = diffusers_run(peer, net, start, 20, seeded[1])
    # x0 is had by a division by alpha(1), 0.006 for linear betas: float32 leaves this much.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_the_large_variance_is_diffusers_fixed_large():
    """At all 1000 steps: with fewer diffusers adds noise even to the step that ends on data."""
    s, net, x = make_schedule("ddpm-linear"), SmallNet(), noise(1, (4, 4, 4), dtype=torch.float32)
    peer = s.to_scheduler("DDPMScheduler", "v_prediction", variance_type="fixed_large")
    theirs = diffusers_run(peer, net, x, 1000, torch.Generator().manual_seed(5))
    denoiser = Denoiser(unet_model(net, s), s, "v_prediction")
    for variance, same in (("large", True), ("small", False)):
        ours = sample(denoiser, x, "ancestral", 1000, torch.Generator().manual_seed(5), grid="trailing", variance=variance)
        # Each of 1000 steps rounds to float32, eps 1.2e-7: at random that adds up to some 4e-6 of the largest entries
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())) is same


@pytest.mark.parametrize(
    "scheduler, spacing",
    # Not DDIM with linspace: diffusers' step goes N // n back from each timestep, and not to the next.
    [("DDIMScheduler", "leading"), ("EulerDiscreteScheduler", "leading"), ("EulerDiscreteScheduler", "linspace")],
)
def test_same_as_diffusers_on_other_spacings(scheduler, spacing):
    s, net, x = make_schedule("ddpm-scaled-linear"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    ours = sample(Denoiser(unet_model(net, s), s), x, "euler", 28, grid=spacing)  # 28: linspace(0, 999, 28) is whole
    peer = s.to_scheduler(scheduler, timestep_spacing=spacing)
    peer.set_timesteps(28)
    start = 1.0 if scheduler == "DDIMScheduler" else 1 / float(s.alpha(grids.make_grid(spacing, s, 28)[0]))
    torch.testing.assert_close(ours, diffusers_run(peer, net, x * start, 28), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "dpmpp_2m_sde"])
def test_same_as_diffusers_multistep_on_flow(sampler):
    s, net, x = make_schedule("flow"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    kind = "sde-dpmsolver++" if sampler == "dpmpp_2m_sde" else "dpmsolver++"
    peer = s.to_scheduler("DPMSolverMultistepScheduler", "flow", algorithm_type=kind)
    seeded = [torch.Generator().manual_seed(5) for _ in range(2)]
    theirs = diffusers_run(peer, net, x, 12, seeded[0])

    def model(x, t):  # fed as there: timesteps cut to integers
        return net(x, peer.timesteps[(peer.sigmas - t[0]).abs().argmin()]).sample

    ours = sample(Denoiser(model, s, "flow"), x, sampler, generator=seeded[1], grid=peer.sigmas)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n", [5, 20])
def test_same_as_diffusers_edm(n):
    from diffusers import EDMEulerScheduler

    s, net, x = make_schedule("edm"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    peer = EDMEulerScheduler(sigma_data=1.0)
    theirs = diffusers_run(peer, net, x * 80, n)
    # Its network sees x / sqrt(sigma^2 + 1) at ln(sigma) / 4, and its output is c_skip x + c_out y.
    ours = sample(Denoiser(unet_model(net, s), s, "edm"), x, "euler", n, grid="karras")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_same_as_diffusers_on_flow(sampler, shift):
    from diffusers import FlowMatchHeunDiscreteScheduler

    s, net, x = make_schedule("flow"), SmallNet(), noise(2, (4, 8, 8), dtype=torch.float32)
    euler = s.to_scheduler("FlowMatchEulerDiscreteScheduler", shift=shift)
    peer = euler if sampler == "euler" else FlowMatchHeunDiscreteScheduler(shift=shift)
    theirs = diffusers_run(peer, net, x, 12)
    grid = torch.unique(peer.sigmas).flip(0)  # Heun's are listed twice
    ours = sample(Denoiser(unet_model(net, s), s, "flow"), x, sampler, grid=grid)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Papers -------------------------------------------------------------------------------------------------------------


def test_reverse_diffusion_is_score_sdes_on_vp_and_ve():
    g = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    x, z = noise(5, (2,)), torch.randn((5, 2), generator=g(), dtype=torch.float64)
    # VP, algorithm 3: (2 - sqrt(1 - beta)) x + beta score + sqrt(beta) z
    s, m = make_schedule("ddpm-linear"), mixture((2,))
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[500]
    grid = torch.tensor([501, 500], dtype=torch.float64) / 1000
    expected = (2 - (1 - beta).sqrt()) * x + beta * m.score(x, s, float(grid[0])) + beta.sqrt() * z
    torch.testing.assert_close(samplers.reverse_diffusion(exact(s, m), x, grid, g()), expected, rtol=1e-9, atol=1e-9)
    # VE, algorithm 2: x + (sigma_t^2 - sigma_s^2) score + sqrt(sigma_t^2 - sigma_s^2) z
    s = make_schedule("ve")
    step = s.sigma(grid[0]) ** 2 - s.sigma(grid[1]) ** 2
    expected = x + step * m.score(x, s, float(grid[0])) + step.sqrt() * z
    torch.testing.assert_close(samplers.reverse_diffusion(exact(s, m), x, grid, g()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["ve", "ddpm-linear"])
@pytest.mark.parametrize("norms", ["measured", "expected"])
def test_corrector_is_algorithm_4_and_5(name, norms):
    s, m, r = make_schedule(name), mixture((6,)), 0.16
    grid = torch.tensor([501, 500, 499], dtype=torch.float64) / 1000
    x, g = noise(1, (6,)), torch.Generator().manual_seed(3)
    ours = samplers.predictor_corrector(
        exact(s, m), x, grid, torch.Generator().manual_seed(3), predictor="euler", corrector_steps=2, norms=norms
    )
    for i in range(2):
        x = samplers.euler(exact(s, m), x, grid[i : i + 2])
        alpha = 1.0 if name == "ve" else 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[500 - i]
        for _ in range(2):
            z, score = torch.randn((1, 6), generator=g, dtype=torch.float64), m.score(x, s, float(grid[i + 1]))
            length = score.norm() if norms == "measured" else 6**0.5 / s.sigma(grid[i + 1])
            step = 2 * alpha * (r * (z.norm() if norms == "measured" else 6**0.5) / length) ** 2
            x = x + step * score + (2 * step).sqrt() * z
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_measured_norms_widen_and_expected_ones_do_not():
    """The corrector alone at one level, for N(0, I) in D = 16: (1 + 2/D)^2 = 1.27 times the variance, or 1.

    Either way Langevin's own step adds a factor 1 / (1 - snr^2); N D = 32000 entries hold a variance to 0.8 %.
    """
    s, d, snr = make_schedule("vp"), 16, 0.16
    normal = Denoiser.from_score(lambda x, t: -x, s)
    grid = torch.linspace(1.0, 1 - 1e-5, 201, dtype=torch.float64)
    for norms, factor in (("expected", 1.0), ("measured", (1 + 2 / d) ** 2)):
        x = samplers.predictor_corrector(
            normal, noise(2000, (d,)), grid, torch.Generator().manual_seed(1), predictor="euler", norms=norms, snr=snr
        )
        assert float(x.var()) == pytest.approx(factor / (1 - snr**2), rel=0.03)


def test_annealed_langevin_is_algorithm_1():
    s, m = make_schedule("ve"), mixture((2,))
    grid = torch.tensor([0.6, 0.5, 0.4], dtype=torch.float64)
    x, g, epsilon = noise(4, (2,)), torch.Generator().manual_seed(3), 2e-5
    step_size = epsilon / float(s.sigma(0.4)) ** 2
    ours = samplers.annealed_langevin(
        exact(s, m), x, grid, torch.Generator().manual_seed(3), inner_steps=3, step_size=step_size
    )
    for t in grid.tolist():
        alpha_i = epsilon * s.sigma(t) ** 2 / s.sigma(0.4) ** 2
        for _ in range(3):
            z = torch.randn((4, 2), generator=g, dtype=torch.float64)
            x = x + alpha_i / 2 * m.score(x, s, t) + alpha_i.sqrt() * z
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", [{}, {"s_churn": 8.0, "s_noise": 1.007}, {"s_churn": 80.0, "s_tmin": 0.05, "s_tmax": 20.0}])
def test_heun_is_algorithm_2_of_karras(options):
    s, m = make_schedule("edm"), mixture((2,))
    x, g, grid = 80 * noise(50, (2,)), torch.Generator().manual_seed(3), grids.karras(s, 12)
    ours = samplers.heun(exact(s, m), x, grid, torch.Generator().manual_seed(3), **options)
    sigmas = (80 * grid).tolist()
    for now, then in zip(sigmas[:-1], sigmas[1:], strict=True):
        inside = options.get("s_tmin", 0) <= now <= options.get("s_tmax", float("inf"))
        gamma = min(options.get("s_churn", 0) / 12, 2**0.5 - 1) if inside else 0
        hat = min(now * (1 + gamma), 80.0)  # ours, not the paper's: no noise beyond what the network knows
        if hat > now:
            z = torch.randn((50, 2), generator=g, dtype=torch.float64)
            x = x + (hat**2 - now**2) ** 0.5 * options.get("s_noise", 1) * z
        d = -hat * m.score(x, s, hat / 80)
        ahead = x + (then - hat) * d
        x = ahead if then == 0 else x + (then - hat) * 0.5 * (d - then * m.score(ahead, s, then / 80))
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_2m_sde_is_its_formula_with_alpha_one(eta):
    """On VE with the steps written out: order 1, then order 2 (2211.01095 eq. 19; eta as k-diffusion has it)."""
    s, m = make_schedule("ve"), mixture((2,))
    x, g = noise(5, (2,)), torch.Generator().manual_seed(3)
    grid = torch.tensor([0.6, 0.5, 0.35], dtype=torch.float64)
    ours = samplers.dpmpp_2m_sde(exact(s, m), x, grid, torch.Generator().manual_seed(3), eta=eta)
    sigma, previous, last = s.sigma(grid), None, None
    for i in range(2):
        x0 = x + sigma[i] ** 2 * m.score(x, s, float(grid[i]))
        h = (sigma[i] / sigma[i + 1]).log()
        d = x0 if previous is None else x0 + h / last * (x0 - previous) / 2
        z = torch.randn((5, 2), generator=g, dtype=torch.float64)
        x = sigma[i + 1] / sigma[i] * torch.exp(-eta * h) * x + (1 - torch.exp(-(1 + eta) * h)) * d
        x, previous, last = x + sigma[i + 1] * (1 - torch.exp(-2 * eta * h)).sqrt() * z, x0, h
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


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
