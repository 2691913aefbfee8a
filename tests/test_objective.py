"""The loss per sample, its weightings, and which times are trained."""

import pytest
import torch

from latentdiff import prediction
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.noise_levels import make_noise_levels
from latentdiff.objective import add_noise, diffusion_loss, loss_weight
from latentdiff.schedules import make_schedule


def draw(shape=(4, 3, 4, 4)):
    g = torch.Generator().manual_seed(1)
    return (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(3))


def believing(x0_hat, schedule, kind, x_t, t):
    """A denoiser that answers x0_hat, whatever its parameterization."""
    eps = (x_t - schedule.alpha(t).reshape(-1, 1, 1, 1) * x0_hat) / schedule.sigma(t).reshape(-1, 1, 1, 1)
    return Denoiser(lambda x, t_model: prediction.target(kind, schedule, x0_hat, eps, t), schedule, kind)


@pytest.mark.parametrize("name", ["vp", "ve", "flow", "ddpm-linear"])
@pytest.mark.parametrize("kind", prediction.names())
def test_min_snr_is_one_loss_in_every_parameterization(name, kind):
    s = make_schedule(name)
    x0, noise, wrong = draw()
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    x_t = add_noise(s, x0, noise, t)
    loss = diffusion_loss(believing(x0 + wrong, s, kind, x_t, t), x0, t, noise, "min_snr", gamma=5.0)
    snr = (s.alpha(t) / s.sigma(t)) ** 2
    expected = snr.clamp(max=5.0) * (wrong**2).mean((1, 2, 3))  # 2303.09556 eq. 6
    torch.testing.assert_close(loss, expected.float(), rtol=2e-3, atol=1e-5)


def test_min_snr_is_the_papers_for_epsilon_and_v():
    s, t = make_schedule("vp"), torch.linspace(0.01, 1, 30, dtype=torch.float64)
    snr = s.log_snr(t).exp()
    torch.testing.assert_close(loss_weight("min_snr", "epsilon", s, t), snr.clamp(max=5) / snr)
    torch.testing.assert_close(loss_weight("min_snr", "v_prediction", s, t), snr.clamp(max=5) / (snr + 1))
    assert not torch.equal(loss_weight("min_snr", "epsilon", s, t, 5.0), loss_weight("min_snr", "epsilon", s, t, 2.0))
    assert torch.equal(loss_weight("none", "epsilon", s, t), torch.ones_like(t))


@pytest.mark.parametrize("kind", prediction.names())
def test_unweighted_loss_is_the_error_of_the_prediction(kind):
    s = make_schedule("vp")
    x0, noise, wrong = draw()
    t = torch.tensor([0.2, 0.4, 0.6, 0.9], dtype=torch.float64)
    y = prediction.target(kind, s, x0, noise, t)
    loss = diffusion_loss(Denoiser(lambda x, t: y + wrong, s, kind), x0, t, noise)
    assert loss.shape == (4,) and loss.dtype == torch.float32
    torch.testing.assert_close(loss, (wrong**2).mean((1, 2, 3)).float(), rtol=1e-4, atol=1e-5)


def test_model_sees_the_noised_sample_and_gets_the_gradient():
    s = make_schedule("flow")
    x0, noise, _ = (z.float() for z in draw())
    gain = torch.tensor(0.5, requires_grad=True)

    def model(x, t, class_labels):
        torch.testing.assert_close(x, 0.75 * x0 + 0.25 * noise)
        assert class_labels == "given"
        return gain * x

    diffusion_loss(Denoiser(model, s, "flow"), x0, 0.25, noise, class_labels="given").mean().backward()
    x = 0.75 * x0 + 0.25 * noise
    torch.testing.assert_close(gain.grad, (2 * (0.5 * x - (noise - x0)) * x).mean())


def test_unknown_weighting_is_named():
    with pytest.raises(UserError, match="none, min_snr"):
        loss_weight("snr", "epsilon", make_schedule("vp"), 0.5)


@pytest.mark.parametrize("name", ["uniform", "logit_normal"])
@pytest.mark.parametrize("schedule", ["ddpm-linear", "flow", "ve"])
def test_noise_levels_are_their_distribution(name, schedule):
    s = make_schedule(schedule)
    levels = make_noise_levels(name, s)
    t = levels.sample(4000, torch.Generator().manual_seed(0))
    assert t.shape == (4000,) and t.min() >= s.t_min and t.max() <= s.t_max
    u = (t - s.t_min) / (s.t_max - s.t_min)
    if name == "logit_normal":
        u = torch.special.ndtr(torch.logit(u))
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) is the 1 % point.
    assert (u.sort().values - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.63 / 4000**0.5


def test_logit_normal_moves_with_its_parameters():
    s = make_schedule("flow")
    t = make_noise_levels("logit_normal", s, mean=1.0, std=0.3).sample(4000, torch.Generator().manual_seed(0))
    logits = torch.logit((t - s.t_min) / (s.t_max - s.t_min))
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.03) and float(logits.std()) == pytest.approx(0.3, abs=0.02)


def test_strata_are_midpoints_and_repeatable():
    levels = make_noise_levels("uniform", make_schedule("flow"))
    expected = 0.001 + 0.998 * torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64)
    torch.testing.assert_close(levels.stratified(4), expected)
    levels = make_noise_levels("logit_normal", make_schedule("flow"))
    assert torch.equal(levels.stratified(7), levels.stratified(7))
    assert float(levels.stratified(7)[3]) == pytest.approx(0.5)


def test_level_belongs_to_the_sample():
    levels = make_noise_levels("logit_normal", make_schedule("flow"))
    pair = levels.sample(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    assert torch.equal(pair[1:], levels.sample(1, [torch.Generator().manual_seed(4)]))


def test_noise_level_mistakes_are_named():
    s = make_schedule("flow")
    with pytest.raises(UserError, match="uniform, logit_normal"):
        make_noise_levels("normal", s)
    with pytest.raises(UserError, match="valid: mean, std"):
        make_noise_levels("logit_normal", s, sigma=1)
    with pytest.raises(UserError, match="std must be above 0"):
        make_noise_levels("logit_normal", s, std=0)
