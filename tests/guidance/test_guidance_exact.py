"""Guidance against closed forms: class posteriors of a mixture, Kalman's update of a Gaussian; and planted bugs.

Each `check_*` is run as it stands, and again with a bug planted by monkeypatch, where it must fail.
"""

import pytest
import torch
from exact import Gaussian, gaussian, mixture

from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import Autoguidance, Classifier, ClassifierFree, Reconstruction, common, gradient, rules
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule

SHAPE = (3, 2, 3)  # with a batch of 3, B == C == W
LABELS = torch.tensor([0, 1, 2])
SCHEDULES = ["vp", "subvp", "ve", "cosine", "flow", "ddpm-linear"]
Y = torch.tensor([0.8, -0.6]).double()
NOISE_STD = 0.3


def states(n=3, shape=SHAPE, seed=0):
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def times(s, n=3):
    return torch.linspace(s.t_min + 0.05, s.t_max - 0.05, n, dtype=torch.float64)


def exact(m, s):
    return Denoiser.from_score(lambda x, t: m.score(x, s, t), s)


def posterior(m, s, labels):
    """log p(label | x_t, t), exactly: what a perfect classifier would say."""

    def log_prob(x, t):
        return m.components(x, s, t)[0].log_softmax(1).gather(1, labels[:, None])[:, 0]

    return log_prob


def operator(dims=4):
    """A [2, dims] of full rank and the function that applies it to [B, dims]."""
    matrix = 1.5 / dims**0.5 * torch.randn((2, dims), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return matrix, lambda x0: x0 @ matrix.T


# Classes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize("name", SCHEDULES)
def test_classifier_free_is_the_gradient_of_the_tilted_density(name, scale):
    """p_t(x) p_t(k | x)^scale, up to a constant, whose gradient is had by differentiating the closed form."""
    s, m = make_schedule(name), mixture(SHAPE)
    x, t = states().requires_grad_(), times(s)

    def model(x, t, label):
        rows = [m if k < 0 else m.only(k) for k in label.tolist()]
        return torch.cat([row.score(x[i : i + 1], s, t[i : i + 1]) for i, row in enumerate(rows)])

    log_p = m.log_prob(x, s, t) + scale * posterior(m, s, LABELS)(x, t)
    (truth,) = torch.autograd.grad(log_p.sum(), x)
    guide = ClassifierFree(Denoiser.from_score(model, s), {"label": LABELS}, {"label": torch.full((3,), -1)}, scale)
    torch.testing.assert_close(guide(x.detach(), t).score, truth, rtol=1e-9, atol=1e-9)


def check_conditional_score(name):
    s, m = make_schedule(name), mixture(SHAPE)
    x, t = states(), times(s)
    out = Classifier(exact(m, s), posterior(m, s, LABELS), 1.0)(x, t)
    truth = torch.cat([exact(m.only(i), s)(x[i : i + 1], t[i]).score for i in range(3)])
    torch.testing.assert_close(out.score, truth, rtol=1e-9, atol=1e-9)
    x0 = torch.cat([exact(m.only(i), s)(x[i : i + 1], t[i]).x0 for i in range(3)])
    torch.testing.assert_close(out.x0, x0, rtol=1e-6, atol=1e-8)
    scaled = Classifier(exact(m, s), posterior(m, s, LABELS), 2.5)(x, t)
    plain = exact(m, s)(x, t).score
    torch.testing.assert_close(scaled.score, plain + 2.5 * (truth - plain), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_classifier_at_strength_one_is_the_conditional_score(name):
    check_conditional_score(name)


def check_conditional_moments(name, dims):
    """4000 samples of one class, in each dimension: mean and variance within 4 standard errors of the class's own."""
    s, m, n = make_schedule(name), mixture((dims,)), 4000
    k = 1
    guide = Classifier(exact(m, s), posterior(m, s, torch.full((n,), k)), 1.0)
    x = sample(guide, states(n, (dims,)), "heun", 30, grid="karras" if name == "ve" else "angle")
    std = float(m.stds[k])
    z_mean = (x.mean(0) - m.means[k]) / (std / n**0.5)
    z_var = (x.var(0) / std**2 - 1) / (2 / n) ** 0.5
    assert z_mean.abs().max() < 4 and z_var.abs().max() < 4  # measured: 3.5 at most


@pytest.mark.parametrize("dims", [2, 16])
@pytest.mark.parametrize("name", ["vp", "flow", "ve"])
def test_classifier_at_strength_one_draws_the_class(name, dims):
    check_conditional_moments(name, dims)


def wrong_sign(x, seen, shift, rows, rescale):
    return common.add_to_score(x, seen, -shift, rows, rescale)


def no_sigma(x, seen, shift, rows, rescale):
    sigma = seen.schedule.sigma(seen.t).reshape(-1, *(1,) * (x.ndim - 1))
    return common.add_to_score(x, seen, shift / sigma, rows, rescale)


def eps_alone(x, seen, shift, rows, rescale):
    out = common.add_to_score(x, seen, shift, rows, rescale)
    return common.replace_estimates(x, seen, seen.x0, out.eps, rows, rescale)


@pytest.mark.parametrize("check", [check_conditional_score, lambda name: check_conditional_moments(name, 2)])
@pytest.mark.parametrize("bug", [wrong_sign, no_sigma, eps_alone])
def test_planted_bugs_of_the_classifier_are_seen(monkeypatch, bug, check):
    monkeypatch.setattr(gradient, "add_to_score", bug)
    with pytest.raises(AssertionError):
        check("vp")


# Autoguidance -------------------------------------------------------------------------------------------------------


def check_autoguidance():
    """Two Gaussians: the guided score is linear in x, with the coefficients written out."""
    s, mean, strong, weak, scale = make_schedule("flow"), 0.4, 0.5, 0.9, 2.0
    x, t = states(), times(s)

    def gauss(std):
        g = Gaussian(torch.full((18,), mean).double(), std**2 * torch.eye(18).double())
        return Denoiser.from_score(lambda x, t: g.score(x.flatten(1), s, t).view_as(x), s)

    out = Autoguidance(gauss(strong), gauss(weak), scale)(x, t)
    alpha, sigma = s.alpha(t).reshape(3, 1, 1, 1), s.sigma(t).reshape(3, 1, 1, 1)
    slope = scale / (alpha**2 * strong**2 + sigma**2) - (scale - 1) / (alpha**2 * weak**2 + sigma**2)
    torch.testing.assert_close(out.score, slope * (alpha * mean - x))
    torch.testing.assert_close(alpha * out.x0 + sigma * out.eps, x)


def test_autoguidance_is_the_analytic_score():
    check_autoguidance()


def test_planted_bugs_of_autoguidance_are_seen(monkeypatch):
    lerp = torch.lerp
    monkeypatch.setattr(rules.torch, "lerp", lambda a, b, w: lerp(b, a, w))
    with pytest.raises(AssertionError):
        check_autoguidance()


def test_a_weak_model_of_another_prediction_and_of_another_schedule():
    s, m = make_schedule("flow"), mixture(SHAPE)
    x, t = states(), times(s)
    weak = exact(m.only(0), s)
    flow = Denoiser(lambda x, t: weak(x, t).velocity, s, "flow")
    one, other = (Autoguidance(exact(m, s), w, 3.0)(x, t) for w in (weak, flow))
    torch.testing.assert_close(one.score, other.score)
    with pytest.raises(UserError, match="weak denoiser has the noise schedule VP, .* of the denoiser .RectifiedFlow"):
        Autoguidance(exact(m, s), exact(m, make_schedule("vp")), 2.0)


# Observations -------------------------------------------------------------------------------------------------------


def observed(s, covariance, n, dims=4, **options):
    matrix, apply = operator(dims)
    prior = gaussian(dims)
    guide = Reconstruction(exact(prior, s), apply, Y.expand(n, 2), 1.0, noise_std=NOISE_STD, covariance=covariance, **options)
    return guide, prior.given(matrix, Y, NOISE_STD)


def check_kalman(name="vp", dims=4):
    s = make_schedule(name)
    guide, truth = observed(s, True, 3, dims)
    x, t = states(3, (dims,)), times(s)
    out = guide(x, t)
    torch.testing.assert_close(out.score, truth.score(x, s, t), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(out.x0, exact(truth, s)(x, t).x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dims", [4, 16])
@pytest.mark.parametrize("name", SCHEDULES)
def test_reconstruction_with_the_covariance_is_the_posterior_score(name, dims):
    check_kalman(name, dims)


def reached(name, covariance):
    """Distance of the samples' mean from the posterior mean, and relative Frobenius distance of their covariances.

    Guidance of a Gaussian is affine in x, and so is the sampler: with the noises 0, e_1 ... e_D the moments of its samples are
    had without any sampling error.
    """
    s = make_schedule(name)
    guide, truth = observed(s, covariance, 5)
    noise = torch.cat([torch.zeros(1, 4), torch.eye(4)]).double()
    x = sample(guide, noise, "heun", 60, grid="karras" if name == "ve" else "angle")
    spread = (x[1:] - x[:1]).T @ (x[1:] - x[:1])
    return float((x[0] - truth.mean).norm()), float((spread - truth.covariance).norm() / truth.covariance.norm())


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "flow"])
def test_reconstruction_lands_on_the_posterior_mean(name):
    """Measured, with |posterior mean - prior mean| = 0.50: covariance 0.003 at most, plain gradient 0.33."""
    mean, spread = reached(name, covariance=True)
    assert mean < 0.005 and spread < 0.02
    mean, spread = reached(name, covariance=False)
    # The plain gradient takes x0_hat for certain: its bias is a hundred times that, which no finer grid mends.
    assert 0.25 < mean < 0.4 and spread > 0.2


@pytest.mark.parametrize("bug", ["wrong sign", "no sigma", "covariance without sigma^2 / alpha", "residual not updated"])
def test_planted_bugs_of_reconstruction_are_seen(monkeypatch, bug):
    if bug == "wrong sign":
        monkeypatch.setattr(gradient, "add_to_score", wrong_sign)
    elif bug == "no sigma":
        monkeypatch.setattr(gradient, "add_to_score", no_sigma)
    elif bug == "residual not updated":
        monkeypatch.setattr(gradient, "conjugate_gradient", lambda apply, b, steps: b)
    else:
        monkeypatch.setattr(gradient, "widen", lambda value, x: torch.ones_like(x))
    with pytest.raises(AssertionError):
        check_kalman()
    mean, _ = reached("vp", covariance=True)
    assert not mean < 0.005


def test_the_plain_gradient_is_the_one_of_its_formula():
    s = make_schedule("vp")
    guide, _ = observed(s, False, 3)
    matrix, apply = operator()
    x, t = states(3, (4,)).requires_grad_(), times(s)
    error = (apply(guide.denoiser(x, t).x0) - Y).square().sum(1)
    (slope,) = torch.autograd.grad(error.sum(), x)
    plain = guide.denoiser(x.detach(), t)
    torch.testing.assert_close(guide(x.detach(), t).score, plain.score - slope / (2 * NOISE_STD**2))


def test_an_operator_of_images_and_a_nonlinear_one():
    s, m = make_schedule("flow"), mixture((2, 4, 4))
    x, t = states(3, (2, 4, 4)), times(s)
    pool = torch.nn.functional.avg_pool2d
    y = torch.ones(3, 2, 2, 2).double()

    def miss(guide):
        return (pool(guide(x, t).x0, 2) - y).flatten(1).norm(dim=1)

    plain = (pool(exact(m, s)(x, t).x0, 2) - y).flatten(1).norm(dim=1)
    for covariance, strength in ((False, 0.05), (True, 1.0)):  # the plain gradient overshoots at strength 1
        guide = Reconstruction(exact(m, s), lambda v: pool(v, 2), y, strength, noise_std=0.5, covariance=covariance)
        assert (miss(guide) < plain).all()
    # Gauss-Newton: with a tangent in the operator's place the answer is the same
    steps = 2 * x[0].numel()  # conjugate gradients are done after 32 by theory, and with rounding soon after
    point = exact(m, s)(x, t).x0
    slope = 1 - point.tanh() ** 2
    one, tangent = (
        Reconstruction(exact(m, s), operator, 0.5 * torch.ones_like(x), 1.0, 0.5, covariance=True, solver_steps=steps)
        for operator in (torch.tanh, lambda v: point.tanh() + slope * (v - point))
    )
    # Broken off at 10 steps, as by default, both are still 2e-7 off, and by how much is a matter of each processor's rounding.
    # Solved to the end, each residual is below eps^(3/4) |b| = 1.8e-12 |b|, |b| < 6; its inverse is at most
    # 1 / noise_std^2 = 4, and what takes u to x0 is C A^T, |A| <= 1, |C| < 16 (a quarter of the squared distance between two
    # means, 13, and 0.36): 2 x 1.8e-12 x 6 x 4 x 16 = 1.4e-9.
    torch.testing.assert_close(one(x, t).x0, tangent(x, t).x0, rtol=0, atol=1.4e-9)


def test_an_observation_of_the_decoded_image_guides():
    """A linear decoder D: what is observed is D x0, and with the covariance the posterior is Kalman's."""
    from tiny_models import tiny_vae

    from latentdiff.models.codec import LatentCodec

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config = tiny_vae().config
            self.weight = torch.nn.Parameter(operator()[0].float())  # [2, 4]

        def decode(self, z):
            out = (z.flatten(1) @ self.weight.T).reshape(len(z), 1, 1, 2)
            return type("Out", (), {"sample": out})

    s, prior, y = make_schedule("vp"), gaussian(4), Y.reshape(1, 1, 1, 2).expand(3, -1, -1, -1)
    codec = LatentCodec(Linear())
    score = Denoiser.from_score(lambda x, t: prior.score(x.flatten(1), s, t).view_as(x), s)
    guide = Reconstruction(score, codec.decode, y, 1.0, noise_std=NOISE_STD, covariance=True)
    x, t = states(3, (4, 1, 1)), times(s)
    truth = prior.given(operator()[0], Y, NOISE_STD)
    with torch.no_grad():
        found = guide(x, t).score
    # decode works in float32, eps 1.2e-7; (noise_std^2 + A C A^T)^-1 magnifies that by at most |A C A^T| / noise_std^2, some 20
    torch.testing.assert_close(found.flatten(1), truth.score(x.flatten(1), s, t), rtol=1e-4, atol=1e-4)
