"""The loss per sample, its weightings, and which times are trained."""

import math

import numpy as np
import pytest
import torch

from latentdiff import prediction
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.noise_levels import make_noise_levels
from latentdiff.noise_levels import names as noise_level_names
from latentdiff.objective import Uncertainty, add_noise, diffusion_loss, loss_weight
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


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow", "edm", "ddpm-linear"])
@pytest.mark.parametrize("kind", prediction.names())
def test_edm_and_likelihood_are_one_loss_in_every_parameterization(name, kind):
    s = make_schedule(name)
    x0, noise, wrong = draw()
    t = torch.tensor([0.1, 0.3, 0.6, 0.9], dtype=torch.float64)
    x_t = add_noise(s, x0, noise, t)
    squared = (wrong**2).mean((1, 2, 3))  # of x0's error
    ratio2 = (s.sigma(t) / s.alpha(t)) ** 2
    expected = {
        "edm": (ratio2 + 1) / ratio2 * squared,  # lambda of 2206.00364 table 1, sigma_data 1
        "likelihood": s.diffusion(t) ** 2 * (s.alpha(t) / s.sigma(t) ** 2) ** 2 * squared,  # g^2 on the score's error
    }
    for weighting, value in expected.items():
        error = believing(x0 + wrong, s, kind, x_t, t)
        weight = loss_weight(weighting, kind, s, t)
        y = prediction.target(kind, s, x0, noise, t)
        off = (error.model(x_t, t) - y).square().mean((1, 2, 3))
        torch.testing.assert_close(weight * off, value, rtol=1e-6, atol=0)
        loss = diffusion_loss(error, x0, t, noise, weighting)
        torch.testing.assert_close(loss, value.float(), rtol=5e-3, atol=1e-5)


def test_weights_are_the_papers():
    t = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    vp, ve = make_schedule("vp"), make_schedule("ve")
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(loss_weight("likelihood", "score", vp, t), beta)
    torch.testing.assert_close(loss_weight("likelihood", "epsilon", vp, t), beta / vp.sigma(t) ** 2)
    torch.testing.assert_close(loss_weight("likelihood", "epsilon", ve, t), torch.full_like(t, 2 * math.log(5000)))
    for name, kind in (("edm", "edm"), ("vp", "v_prediction"), ("cosine", "v_prediction")):
        torch.testing.assert_close(loss_weight("edm", kind, make_schedule(name), t), torch.ones_like(t))
    assert torch.equal(loss_weight("uncertainty", "epsilon", vp, t), torch.ones_like(t))


@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_uncertainty_learns_the_log_of_the_loss_at_each_level(name):
    s = make_schedule(name)
    weigh = Uncertainty(s)
    levels = make_noise_levels("stratified", s)
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def mean_loss(t):
        return torch.exp(2 * torch.sin(0.25 * s.log_snr(t))).float()

    t = levels.midpoints(200)
    assert torch.equal(weigh.log_variance(t), torch.zeros(200))
    assert torch.equal(weigh(mean_loss(t), t), mean_loss(t))
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 250)
        t = levels.sample(64, generator)
        noisy = mean_loss(t) * (0.5 + torch.rand(64, generator=generator))
        optimizer.zero_grad()
        weigh(noisy, t).mean().backward()
        optimizer.step()
    t = levels.midpoints(200)
    off = weigh.log_variance(t).detach() - mean_loss(t).log()
    assert float(off[5:-5].abs().max()) < 0.25 and float(off.abs().mean()) < 0.05


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
    with pytest.raises(UserError, match="none, min_snr, edm, likelihood, uncertainty"):
        loss_weight("snr", "epsilon", make_schedule("vp"), 0.5)


def cumulative(name, s, t):
    """The share of draws below t, from each distribution's definition."""
    ends = torch.tensor([s.t_min, s.t_max], dtype=torch.float64)
    u = (t - s.t_min) / (s.t_max - s.t_min)
    if name == "logit_normal":
        return torch.special.ndtr(torch.logit(u))
    if name == "log_normal":  # of sigma/alpha, between the ends
        low, high, here = (torch.special.ndtr((torch.log(s.sigma(z) / s.alpha(z)) + 0.5) / 1.2) for z in (*ends, t))
        return (here - low) / (high - low)
    if name == "importance":  # the integral of g^2/sigma^2, by the trapezoid rule in t
        knots = torch.logspace(math.log10(max(s.t_min, 1e-3)), 0, 20001, dtype=torch.float64).clamp(max=s.t_max)
        knots = torch.cat([torch.linspace(s.t_min, float(knots[0]), 1000, dtype=torch.float64)[:-1], knots])
        rate = (s.diffusion(knots) / s.sigma(knots)) ** 2
        area = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(rate, knots)])
        return torch.from_numpy(np.interp(t, knots, area / area[-1]))
    return u


@pytest.mark.parametrize("name", noise_level_names())
@pytest.mark.parametrize("schedule", ["ddpm-linear", "vp", "flow", "ve", "edm"])
def test_noise_levels_are_their_distribution(name, schedule):
    s = make_schedule(schedule)
    levels = make_noise_levels(name, s)
    t = levels.sample(4000, torch.Generator().manual_seed(0))
    assert t.shape == (4000,) and t.min() >= s.t_min and t.max() <= s.t_max
    u = cumulative(name, s, t)
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
    torch.testing.assert_close(levels.midpoints(4), expected)
    levels = make_noise_levels("logit_normal", make_schedule("flow"))
    assert torch.equal(levels.midpoints(7), levels.midpoints(7))
    assert float(levels.midpoints(7)[3]) == pytest.approx(0.5)


@pytest.mark.parametrize("name", noise_level_names())
def test_strata_have_one_draw_each_in_random_order(name):
    s = make_schedule("vp")
    levels = make_noise_levels(name, s, stratified=True)
    t = levels.sample(64, torch.Generator().manual_seed(0))
    edges = levels.quantile(torch.arange(65, dtype=torch.float64) / 64)
    place = torch.searchsorted(edges[1:-1].contiguous(), t)
    assert torch.equal(place.sort().values, torch.arange(64)) and not torch.equal(place, torch.arange(64))
    assert torch.equal(t, levels.sample(64, torch.Generator().manual_seed(0)))
    other = levels.sample(64, torch.Generator().manual_seed(1))
    assert not torch.equal(t, other)
    # each row's own distribution stays the whole one: over many batches its draws are as uniform as independent ones
    first = torch.stack([levels.sample(8, torch.Generator().manual_seed(k))[0] for k in range(2000)])
    u = torch.stack([levels.quantile(torch.tensor(q, dtype=torch.float64)) for q in (0.25, 0.5, 0.75)])
    assert (torch.stack([(first < q).double().mean() for q in u]) - torch.tensor([0.25, 0.5, 0.75])).abs().max() < 0.04


def test_strata_need_the_whole_batch():
    levels = make_noise_levels("stratified", make_schedule("vp"))
    with pytest.raises(ValueError, match="one generator, not one per sample"):
        levels.sample(2, [torch.Generator(), torch.Generator()])


@pytest.mark.parametrize("name", ["vp", "subvp", "flow", "edm", "ddpm-linear", "ve"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_importance_sampling_keeps_the_likelihood_loss_and_calms_it(name, kind):
    s = make_schedule(name)
    uniform, importance = make_noise_levels("uniform", s), make_noise_levels("importance", s)

    def weighted(levels, t):
        # the loss of the best network for normal data: eps is left with the share SNR/(1 + SNR) of its variance
        snr = s.log_snr(t).exp()
        a, b = prediction.row(kind, s, t)
        error = (a - b * snr.sqrt()) ** 2 / snr * snr / (1 + snr)
        return levels.correction(t) * loss_weight("likelihood", kind, s, t) * error

    plain, calm = (weighted(levels, levels.midpoints(100_000)) for levels in (uniform, importance))  # quadrature over each
    assert float(calm.mean()) == pytest.approx(float(plain.mean()), rel=2e-3)
    assert float(calm.std()) < (1.001 if name == "ve" else 0.5) * float(plain.std())
    assert torch.equal(uniform.correction(torch.rand(3)), torch.ones(3, dtype=torch.float64))
    # The planted bug: levels of this density without the correction
    biased = importance.quantile(torch.linspace(0, 1, 1000, dtype=torch.float64)[1:-1])
    without = (weighted(importance, biased) / importance.correction(biased)).mean()
    assert name == "ve" or abs(float(without / plain.mean()) - 1) > 0.3


def test_level_belongs_to_the_sample():
    levels = make_noise_levels("logit_normal", make_schedule("flow"))
    pair = levels.sample(2, [torch.Generator().manual_seed(seed) for seed in (3, 4)])
    assert torch.equal(pair[1:], levels.sample(1, [torch.Generator().manual_seed(4)]))


def test_noise_level_mistakes_are_named():
    s = make_schedule("flow")
    with pytest.raises(UserError, match="uniform, log_normal, logit_normal, importance, stratified"):
        make_noise_levels("normal", s)
    with pytest.raises(UserError, match="valid: std, mean, stratified"):
        make_noise_levels("logit_normal", s, sigma=1)
    with pytest.raises(UserError, match="std must be above 0"):
        make_noise_levels("logit_normal", s, std=0)
