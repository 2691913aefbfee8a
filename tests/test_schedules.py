"""Schedules against the formulas of their papers, against differentiation, and through diffusers and back."""

import math

import pytest
import torch

from latentdiff.errors import UserError
from latentdiff.schedules import VE, VP, Cosine, DiscreteVP, NoiseSchedule, RectifiedFlow, SubVP, make_schedule, names

T = torch.linspace(0.01, 0.99, 97, dtype=torch.float64)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_vp_is_score_sdes():
    s, beta = VP(0.1, 20.0), 0.1 + 19.9 * T
    log_mean = -0.25 * T**2 * 19.9 - 0.5 * T * 0.1
    close(s.alpha(T), log_mean.exp())
    close(s.sigma(T), (1 - torch.exp(2 * log_mean)).sqrt())
    close(s.drift(T), -0.5 * beta)
    close(s.diffusion(T), beta.sqrt())
    assert s.prior_std == 1


def test_subvp_is_score_sdes():
    s, beta = SubVP(0.1, 20.0), 0.1 + 19.9 * T
    discount = 1 - torch.exp(-2 * 0.1 * T - 19.9 * T**2)
    close(s.sigma(T), 1 - torch.exp(-0.5 * T**2 * 19.9 - T * 0.1))
    close(s.drift(T), -0.5 * beta)
    close(s.diffusion(T), (beta * discount).sqrt())


def test_ve_is_score_sdes():
    s = VE(0.01, 50.0)
    sigma = 0.01 * (50 / 0.01) ** T
    close(s.sigma(T), sigma)
    close(s.drift(T), torch.zeros_like(T))
    close(s.diffusion(T), sigma * math.sqrt(2 * (math.log(50) - math.log(0.01))))
    assert s.prior_std == 50


def test_flow_and_cosine_are_their_formulas():
    close(RectifiedFlow().alpha(T), 1 - T)
    close(RectifiedFlow().sigma(T), T)
    close(Cosine().log_snr(T), -2 * torch.log(torch.tan(math.pi * T / 2)))  # 2301.11093 eq. 2


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
    "scheduler", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_discrete_through_diffusers_and_back(name, scheduler):
    s = make_schedule(name)
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
        torch.testing.assert_close(
            peer.alphas_cumprod[k].double(), s.alpha(s.time_from_timestep(k)) ** 2, rtol=1e-3, atol=1e-6
        )


def test_flow_through_diffusers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    peer = RectifiedFlow().to_scheduler()
    assert isinstance(peer, FlowMatchEulerDiscreteScheduler)
    assert isinstance(NoiseSchedule.from_scheduler(peer), RectifiedFlow)
    assert torch.equal(RectifiedFlow().timestep(peer.sigmas), (peer.sigmas.double() * 1000))


def test_zero_terminal_snr_stays_finite():
    from diffusers import DDIMScheduler

    s = NoiseSchedule.from_scheduler(DDIMScheduler(rescale_betas_zero_snr=True))
    assert float(s.alpha(1.0)) == pytest.approx(2.0**-12) and math.isfinite(s.log_snr(1.0))


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
        (lambda: DiscreteVP([0.1, 1.5]), "betas"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
