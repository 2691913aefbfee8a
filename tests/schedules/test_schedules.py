"""Schedules against the formulas of their papers, against differentiation, and through diffusers and back."""

import math

import pytest
import torch
from diffusers import ScoreSdeVeScheduler
from exact import mixture

from latentdiff import samplers
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.samplers.grids import make_grid
from latentdiff.schedules import (
    EDM,
    VE,
    VP,
    Cosine,
    DiscreteVP,
    NoiseSchedule,
    RectifiedFlow,
    SubVP,
    make_schedule,
    names,
)

T = torch.linspace(0.01, 0.99, 97, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_prior_std_is_the_spread_at_the_end():
    assert [make_schedule(name).prior_std for name in ("vp", "subvp", "ve", "flow", "edm")] == [1, 1, 50, 1, 80]


def test_prior_log_prob_is_per_sample():
    x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    whole = VE().prior_log_prob(x)
    assert whole.shape == (4,) and whole.dtype == torch.float64
    assert torch.equal(whole[2:3], VE().prior_log_prob(x[2:3]))
    normal = torch.distributions.MultivariateNormal(torch.zeros(48).double(), 2500 * torch.eye(48).double())
    close(whole, normal.log_prob(x.double().flatten(1)))


def test_only_exploding_schedules_scale_what_the_network_sees():
    for name in names():
        s = make_schedule(name)
        t = torch.linspace(s.t_min, s.t_max, 9, dtype=torch.float64)
        spread = (s.alpha(t) ** 2 + s.sigma(t) ** 2).sqrt()  # of x_t, for data of unit variance
        close(s.input_scale(t), 1 / spread if name in ("ve", "edm") else torch.ones_like(t))


@pytest.mark.parametrize("name", names())
def test_derivatives_and_inverse(name):
    s = make_schedule(name)
    # Off the knots of the discrete schedules, and below their t_min too.
    t = torch.cat([torch.tensor([1.3e-4]), torch.linspace(s.t_min + 3e-4, s.t_max - 3e-4, 50)]).double()
    h = 1e-7
    close((s.alpha(t + h) - s.alpha(t - h)) / (2 * h), s.d_alpha(t), 2e-6)
    close((s.sigma(t + h) - s.sigma(t - h)) / (2 * h), s.d_sigma(t), 2e-6)
    close(s.time_from_log_snr(s.log_snr(t)), t, 1e-9)
    close(s.log_snr(t), 2 * (s.alpha(t) / s.sigma(t)).log(), 1e-9)
    assert (s.log_snr(t).diff() < 0).all()
    close(s.time_from_timestep(s.timestep(t)), t)
    assert s.alpha(0.3).dtype == torch.float64 and s.alpha(0.3).shape == ()
    assert math.isfinite(s.diffusion(s.t_max)) and math.isfinite(1 / s.sigma(max(s.t_min, 1e-9)))


@pytest.mark.parametrize("name", [name for name in names() if name != "ve"])
def test_data_is_at_zero(name):
    s = make_schedule(name)
    assert s.sigma(0.0) == 0 and s.alpha(0.0) == 1 and s.log_snr(0.0) == math.inf


def test_discrete_is_the_chain_at_its_knots():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    s = DiscreteVP(betas)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(s.alpha(t) ** 2, torch.cumprod(1 - betas, 0))
    close(s.alpha(t) ** 2 + s.sigma(t) ** 2, torch.ones_like(t))
    close(s.timestep(t), torch.arange(1000, dtype=torch.float64), 1e-9)
    assert s.t_min == 1 / 1000


@pytest.mark.parametrize("name", ["ddpm-linear", "ddpm-scaled-linear", "ddpm-cosine"])
@pytest.mark.parametrize(
    "scheduler",
    [
        "DDPMScheduler",
        "DDIMScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
    ],
)
def test_discrete_through_diffusers_and_back(name, scheduler):
    s = make_schedule(name)
    if (scheduler, name) == ("HeunDiscreteScheduler", "ddpm-cosine"):  # nothing of the data is left at its start
        with pytest.raises(UserError, match="^scheduler: HeunDiscreteScheduler cannot start at alpha.2 = 2.4e-09"):
            s.to_scheduler(scheduler, prediction="v_prediction")
        peer = s.to_scheduler(scheduler, prediction="v_prediction", use_karras_sigmas=True)
    else:
        peer = s.to_scheduler(scheduler, prediction="v_prediction")
    assert type(peer).__name__ == scheduler and peer.config["prediction_type"] == "v_prediction"
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    torch.testing.assert_close(s.alpha(t).float() ** 2, peer.alphas_cumprod, rtol=2e-3, atol=1e-7)
    back = NoiseSchedule.from_scheduler(type(peer).from_config(peer.config))
    assert torch.equal(back.log_snr(t), s.log_snr(t))


def test_continuous_vp_through_diffusers():
    for s in (VP(), Cosine()):
        peer = s.to_scheduler("DDIMScheduler")
        k = torch.arange(0, 999)
        torch.testing.assert_close(peer.alphas_cumprod[k].double(), s.alpha(s.time_from_timestep(k)) ** 2, rtol=1e-3, atol=1e-6)


def test_flow_through_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = RectifiedFlow().to_scheduler("FlowMatchEulerDiscreteScheduler")
    assert isinstance(peer, FlowMatchEulerDiscreteScheduler)
    assert torch.equal(RectifiedFlow().timestep(peer.sigmas), (peer.sigmas.double() * 1000))
    others = [RectifiedFlow().to_scheduler(f"{name}MultistepScheduler") for name in ("DPMSolver", "UniPC")]
    for other in (peer, *others):
        assert isinstance(NoiseSchedule.from_scheduler(type(other).from_config(other.config)), RectifiedFlow)
    assert NoiseSchedule.from_scheduler(FlowMatchEulerDiscreteScheduler(250)).num_steps == 250


@pytest.mark.parametrize("n", [1, 2, 20])
def test_what_a_flow_run_publishes_starts_where_it_was_trained_and_has_n_even_steps(n):
    s = RectifiedFlow()
    peer, other = s.to_scheduler(), s.to_scheduler("FlowMatchEulerDiscreteScheduler")
    even = s.t_max * (1 - torch.arange(n + 1, dtype=torch.float64) / n)
    for scheduler, right in ((peer, True), (other, False)):
        scheduler.set_timesteps(n)
        assert len(scheduler.timesteps) == n
        assert torch.allclose(scheduler.sigmas.double(), even, rtol=0, atol=1e-6) is right
    # As its docstring has it: from 1 to 1/N in n - 1 steps, then to 0
    ramp = torch.linspace(1, 1 / s.num_steps, n, dtype=torch.float64)
    torch.testing.assert_close(other.sigmas.double(), torch.cat([ramp, torch.zeros(1).double()]), rtol=0, atol=1e-6)
    x = run(s.to_scheduler(), exact_flow().output, noise(), n)
    assert bool(torch.isfinite(x).all())


def run(scheduler, model, x, n):
    """diffusers' loop; model(x, sigma) is asked at the exact noise level, not at the timestep."""
    scheduler.set_timesteps(n)
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[: len(scheduler.timesteps)].tolist(), strict=True):
        x = scheduler.step(model(x, sigma).to(x.dtype), timestep, x, return_dict=False)[0]
    return x


def exact_flow():
    """The mixture's velocity, computed in float64: a network that predicts it has no cancellation at t_max either."""
    s, m = RectifiedFlow(), mixture((2,))
    truth = Denoiser.from_score(lambda x, t: m.score(x, s, t), s)
    return Denoiser(lambda x, t: truth(x.double(), t.double().clamp(max=s.t_max)).velocity, s, "flow")


def noise(n=256, dtype=torch.float32):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("n", [1, 2, 10, 20, 50])
def test_flow_dpm_solver_is_our_dpmpp_2m_on_the_uniform_grid(n):
    s = RectifiedFlow()
    truth = exact_flow()
    peer = s.to_scheduler("DPMSolverMultistepScheduler")
    theirs = run(peer, truth.output, noise(), n)
    torch.testing.assert_close(peer.sigmas.double(), make_grid("uniform", s, n), rtol=0, atol=1e-7)
    ours = samplers.sample(truth, noise(), "dpmpp_2m", n, grid="uniform")
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


def test_flow_dpm_solver_converges_on_the_mixture():
    s = RectifiedFlow()
    truth = exact_flow()
    limit = samplers.sample(truth, noise(dtype=torch.float64), "heun", 1000, grid="uniform")
    errors = []
    for n in (10, 20, 40, 80):
        peer = s.to_scheduler("DPMSolverMultistepScheduler")
        found = run(peer, truth.output, noise(), n)
        errors.append(float((found - limit).square().mean().sqrt()))
    assert errors[0] < 0.03 and errors[-1] < 1.2e-3, errors
    # A solver of order 1 halves its error each time; one that ends on a wrong sigma keeps it
    assert all(b < 0.5 * a for a, b in zip(errors, errors[1:], strict=False)), errors
    peer = s.to_scheduler("DPMSolverMultistepScheduler", final_sigmas_type="sigma_min")
    wrong = run(peer, truth.output, noise(), 80)
    assert float((wrong - limit).square().mean().sqrt()) > 4 * errors[-1]


def test_flow_unipc_converges_on_the_mixture_and_is_nearer_than_dpm_solver():
    s, truth = RectifiedFlow(), exact_flow()
    limit = samplers.sample(truth, noise(dtype=torch.float64), "heun", 1000, grid="uniform")

    def error(name, n, **config):
        return float((run(s.to_scheduler(name, **config), truth.output, noise(), n) - limit).square().mean().sqrt())

    errors = [error("UniPCMultistepScheduler", n, solver_order=3) for n in (10, 20, 40)]
    assert errors[0] < 0.05 and all(b < 0.5 * a for a, b in zip(errors, errors[1:], strict=False)), errors
    assert errors[1] < 0.9 * error("DPMSolverMultistepScheduler", 20)
    peer = s.to_scheduler("UniPCMultistepScheduler")
    peer.set_timesteps(8)  # the grid that the docstring has
    torch.testing.assert_close(peer.sigmas[:-1].double(), 1 - 0.999 * torch.arange(8).double() / 8, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_shift_bends_the_grid_and_not_the_path(name, shift):
    s, truth = RectifiedFlow(), exact_flow()
    key, sampler = ("shift", "euler") if name.startswith("Flow") else ("flow_shift", "dpmpp_2m")
    peer = s.to_scheduler(name, **{key: shift})
    assert isinstance(NoiseSchedule.from_scheduler(peer), RectifiedFlow)
    theirs = run(peer, truth.output, noise(), 12)
    ours = samplers.sample(truth, noise(), sampler, grid=peer.sigmas.double(), start="state")  # what diffusers starts from
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4)


@pytest.mark.parametrize("std", [0.5, 1.0])
def test_edm_through_diffusers(std):
    from diffusers import EDMEulerScheduler

    s = EDM(0.002, 80.0, std)
    peer = s.to_scheduler()
    assert isinstance(peer, EDMEulerScheduler)
    back = NoiseSchedule.from_scheduler(type(peer).from_config(peer.config))
    assert isinstance(back, EDM) and vars(back) == vars(s)
    peer.set_timesteps(10)
    t = peer.sigmas[:-1].double() / 80
    close(s.timestep(t).float(), peer.timesteps, 1e-6)
    close(s.time_from_timestep(s.timestep(t)), t)
    torch.testing.assert_close(make_grid("karras", s, 10) * 80, peer.sigmas.double(), rtol=1e-6, atol=0)
    # Their loop and ours feed one network the same input and timestep, and take its word for the same
    fed = []

    def network(x, k):
        fed.append((x, k))
        return torch.tanh(x * k)

    x, ours_fed = noise() * 80, []
    for timestep in peer.timesteps:
        x = peer.step(network(peer.scale_model_input(x, timestep), timestep), timestep, x, return_dict=False)[0]

    class Net(torch.nn.Module):
        def forward(self, sample, timestep):
            ours_fed.append((sample, timestep[0]))
            return type("Output", (), {"sample": network(sample, timestep[0])})

    ours = samplers.sample(Denoiser(unet_model(Net(), s), s, "edm"), noise(), "euler", 10, grid="karras")
    for (theirs_x, theirs_k), (ours_x, ours_k) in zip(fed[:10], ours_fed, strict=True):
        torch.testing.assert_close(ours_k, theirs_k, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours_x, theirs_x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-4)


ZERO_SNR = ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]


@pytest.mark.parametrize("scheduler", ZERO_SNR)
def test_zero_terminal_snr_through_diffusers_and_back(scheduler):
    s = make_schedule("ddpm-linear", zero_terminal_snr=True)
    peer = s.to_scheduler(scheduler, "v_prediction")
    assert peer.config["rescale_betas_zero_snr"] and float(peer.alphas_cumprod[-1]) <= 2.0**-24
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    # diffusers' betas are rounded to float32, which shows where alpha is small
    torch.testing.assert_close(s.alpha(t).float(), peer.alphas_cumprod.sqrt(), rtol=1e-3, atol=3e-4)
    back = NoiseSchedule.from_scheduler(type(peer).from_config(peer.config))
    assert torch.equal(back.log_snr(t), s.log_snr(t)) and back.zero_terminal_snr
    alpha_bar = torch.cat([torch.ones(1), s.alpha(t[:-1]) ** 2, torch.zeros(1)])
    again = DiscreteVP(1 - alpha_bar[1:] / alpha_bar[:-1])
    assert again.zero_terminal_snr
    close(again.log_snr(t), s.log_snr(t), 1e-8)
    close(NoiseSchedule.from_scheduler(again.to_scheduler(scheduler, "v_prediction")).log_snr(t), s.log_snr(t), 1e-8)


def test_zero_terminal_snr_stays_finite_and_keeps_its_start():
    plain, s = make_schedule("ddpm-linear"), make_schedule("ddpm-linear", zero_terminal_snr=True)
    assert float(s.alpha(1.0)) == pytest.approx(2.0**-12) and math.isfinite(s.log_snr(1.0))
    assert float(s.alpha(1e-3)) == pytest.approx(float(plain.alpha(1e-3)), rel=1e-12)
    assert float(plain.alpha(1.0)) > 20 * float(s.alpha(1.0))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: make_schedule("vq"), "valid: vp, subvp"),
        (lambda: make_schedule("vp", beta=3), "beta_min, beta_max"),
        (lambda: make_schedule("flow", shift=3), "valid: none"),
        (lambda: VE().to_scheduler(), "VE has no equal"),
        (lambda: SubVP().to_scheduler(), "SubVP has no equal"),
        (lambda: VP().to_scheduler("LCMScheduler"), "DDIMScheduler"),
        (lambda: VP().to_scheduler(prediction="flow"), "v_prediction"),
        (lambda: RectifiedFlow().to_scheduler("DDIMScheduler"), "FlowMatchEuler"),
        (lambda: RectifiedFlow().to_scheduler(prediction="epsilon"), "with flow"),
        (lambda: EDM().to_scheduler("EulerDiscreteScheduler"), "valid: EDMEulerScheduler with edm"),
        (lambda: VP().to_scheduler("HeunDiscreteScheduler", "sample"), "Heun apart"),
        (lambda: VP().to_scheduler(spacing="trailing"), "DPMSolverMultistepScheduler refuses its config: .*spacing"),
        (lambda: make_schedule("ddpm-linear", zero_terminal_snr=True).to_scheduler(), "zero terminal SNR; valid: v_pred"),
        (lambda: NoiseSchedule.from_scheduler(ScoreSdeVeScheduler()), "ScoreSdeVeScheduler is none of"),
        (lambda: DiscreteVP([0.1, 1.5]), "betas"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()


@pytest.mark.parametrize(
    "name, params, said",
    [
        ("ve", {"sigma_min": 50.0, "sigma_max": 0.01}, "0 < sigma_min < sigma_max"),
        ("ve", {"sigma_min": 0}, "0 < sigma_min < sigma_max"),
        ("edm", {"sigma_min": 80.0, "sigma_max": 0.002}, "0 < sigma_min < sigma_max"),
        ("vp", {"beta_min": -5}, "0 <= beta_min <= beta_max"),
        ("subvp", {"beta_max": "abc"}, "subvp's beta_max must be a number, not 'abc'"),
        ("ddpm-linear", {"num_steps": 1.5}, "num_steps must be a whole number"),
    ],
)
def test_parameters_that_make_no_process_are_refused(name, params, said):
    with pytest.raises(UserError, match=said):
        make_schedule(name, **params)


def test_vp_diffusion_at_zero_is_the_root_of_beta_and_subvps_is_zero():
    for t in (0.0, torch.tensor([0.0])):
        assert float(make_schedule("vp").diffusion(t)) == pytest.approx(0.1**0.5)
        assert float(make_schedule("subvp").diffusion(t)) == 0.0
    torch.testing.assert_close(make_schedule("vp").diffusion(1e-9), make_schedule("vp").diffusion(0.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", names())
def test_prior_sample_has_the_spread_of_the_prior(name):
    s = make_schedule(name)
    x = s.prior_sample((4000, 3), torch.Generator().manual_seed(0))
    assert x.shape == (4000, 3) and float(x.std()) == pytest.approx(s.prior_std, rel=0.03)
    again = s.prior_sample((1, 3), [torch.Generator().manual_seed(5)])
    assert torch.equal(again, s.prior_sample((2, 3), [torch.Generator().manual_seed(k) for k in (5, 6)])[:1])
