"""Log-densities against Gaussian mixtures, exact in nats; each planted bug must fail the check that stands for it."""

import math
import weakref

import pytest
import torch
from exact import Mixture, drawn, exact, gaussian, gaussian_flow, mixture
from tiny_models import tiny_unet

from latentdiff import likelihood
from latentdiff.denoiser import Denoiser, unet_model
from latentdiff.errors import UserError
from latentdiff.guidance import Classifier, ClassifierFree
from latentdiff.likelihood import log_prob, variational_bound
from latentdiff.schedules import make_schedule, names
from latentdiff.utils.random import generators, rand


def truth(m, schedule, x0, latent):
    """What the ODE of the exact score gives x0: log p(x0) at t_min, less log p of where it ends, plus the prior there.

    p at t_max is close to the prior, not equal to it: on VE in 16 dimensions the two differ by 0.1 nats.
    """
    ends = m.log_prob(x0, schedule, schedule.t_min) - m.log_prob(latent, schedule, schedule.t_max)
    return ends + schedule.prior_log_prob(latent)


# The probability-flow ODE ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2,), (16,), (3, 3, 3)], ids=str)
@pytest.mark.parametrize("name", names())
def test_exact_trace_is_within_a_thousandth_of_a_nat(name, shape):
    s, m = make_schedule(name), mixture(shape)
    x0 = drawn(m, 3 if len(shape) == 3 else 24)  # of shape [3, 3, 3, 3], every axis is as long as the batch
    found = log_prob(exact(s, m), x0, "exact")
    # Measured over 64 points: 2e-4 in 2 dimensions, 4.2e-4 in 16, at the default tolerance and 92 to 110 evaluations.
    assert float((found.log_prob - truth(m, s, x0, found.latent)).abs().max()) < 1e-3
    assert found.stderr.eq(0).all() and found.latent.shape == x0.shape and int(found.nfe.max()) < 150


def test_without_any_correction_where_the_prior_is_met():
    # This schedule ends at alpha = 4e-5: p at t_max is the prior, and log_prob is log p at t_min itself.
    s, m = make_schedule("ddpm-cosine"), mixture((16,))
    x0 = drawn(m, 24)
    assert float((log_prob(exact(s, m), x0, "exact").log_prob - m.log_prob(x0, s, s.t_min)).abs().max()) < 1e-3


@pytest.mark.parametrize("name", names())
def test_a_gaussian_has_the_density_and_the_latent_of_its_linear_flow(name):
    s, mean, std, x0 = make_schedule(name), torch.full((2, 2), 0.4).double(), 0.3, drawn(mixture((2, 2)), 5)
    found = log_prob(exact(s, Mixture(torch.ones(1).double(), mean[None], torch.tensor([std]).double())), x0, "exact")
    latent = gaussian_flow(mean, std, x0, s, s.t_min, s.t_max)
    widths = [float((s.alpha(t) ** 2 * std**2 + s.sigma(t) ** 2).sqrt()) for t in (s.t_min, s.t_max)]
    density = s.prior_log_prob(latent) + 4 * math.log(widths[1] / widths[0])
    torch.testing.assert_close(found.latent, latent, rtol=2e-4, atol=2e-4 * s.prior_std)
    torch.testing.assert_close(found.log_prob, density, rtol=0, atol=1e-3)


def test_a_correlated_gaussian():
    s, g = make_schedule("vp"), gaussian(4)
    found = log_prob(exact(s, g), x0 := torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).double(), "exact")

    def density(x, t):
        spread = s.alpha(t) ** 2 * g.covariance + s.sigma(t) ** 2 * torch.eye(4).double()
        return torch.distributions.MultivariateNormal(s.alpha(t) * g.mean, spread).log_prob(x)

    expected = density(x0, s.t_min) - density(found.latent, s.t_max) + s.prior_log_prob(found.latent)
    torch.testing.assert_close(found.log_prob, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", ["vp", "ve", "flow"])
def test_hutchinson_is_unbiased(name, noise):
    s, m = make_schedule(name), mixture((16,))
    x0 = drawn(m, 3)
    # 256 solves of one probe each, in one batch
    one = log_prob(exact(s, m), x0.repeat(256, 1), noise=noise, generator=torch.Generator().manual_seed(1))
    found = one.log_prob.reshape(256, 3)
    error = found.mean(0) - truth(m, s, x0, one.latent[:3])
    stderr = found.std(0) / 16
    assert float((error / stderr).abs().max()) < 3
    assert 1e-3 < float(stderr.max()) < 0.7  # nats, of log-densities of about -10: no planted bug below hides in it


def test_the_standard_error_is_the_spread():
    s, m = make_schedule("vp"), mixture((16,))
    x0 = drawn(m, 96)
    found = log_prob(exact(s, m), x0, probes=16, generator=torch.Generator().manual_seed(0))
    error = found.log_prob - truth(m, s, x0, found.latent)
    # Not z-scores: v^T J v is skewed, and then a mean of 16 is far off where its own spread looks small.
    ratio = float((error.square().sum() / found.stderr.square().sum()).sqrt())
    assert 0.75 < ratio < 1.25  # 96 images: within 0.07 of 1 if errors were normal
    assert abs(float(error.sum())) < 3 * float(found.stderr.square().sum().sqrt())


def test_rademacher_is_exact_where_the_jacobian_is_diagonal_and_gaussian_is_not():
    s, m = make_schedule("flow"), mixture((6,)).only(0)
    x0 = drawn(m, 4)
    same, other = (log_prob(exact(s, m), x0, probes=4, noise=noise) for noise in ("rademacher", "gaussian"))
    assert float(same.stderr.max()) < 1e-9 < 0.05 < float(other.stderr.min())
    torch.testing.assert_close(same.log_prob, truth(m, s, x0, same.latent), rtol=0, atol=1e-3)


def test_one_probe_is_drawn_per_solve_and_has_no_standard_error():
    s, m, calls = make_schedule("vp"), mixture((2, 2)), []

    def counted(x, t):
        calls.append(len(x))
        return m.score(x, s, t)

    g = torch.Generator().manual_seed(3)
    found = log_prob(Denoiser.from_score(counted, s), drawn(m, 5), generator=g)
    # Drift and divergence share one forward; three calls before it all look at the derivative.
    assert len(calls) == int(found.nfe.max()) + 3 and set(calls) == {5}
    assert found.stderr.isnan().all()
    other = torch.Generator().manual_seed(3)
    rand((5, 2, 2), other, dtype=torch.float64)
    assert torch.equal(g.get_state(), other.get_state())


def test_a_row_is_the_same_alone_and_in_a_batch():
    s, m = make_schedule("subvp"), mixture((3,))
    x0 = drawn(m, 3)
    together = log_prob(exact(s, m), x0, probes=2, generator=generators(0, range(3)))
    for i in range(3):
        alone = log_prob(exact(s, m), x0[i : i + 1], probes=2, generator=generators(0, [i]))
        torch.testing.assert_close(alone.log_prob[0], together.log_prob[i], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.stderr[0], together.stderr[i], rtol=0, atol=1e-9)
        assert int(alone.nfe[0]) == int(together.nfe[i])


def test_under_guidance():
    s, m = make_schedule("vp"), mixture((2,))
    x0, labels = drawn(m, 6), torch.tensor([0, 1, 2, 0, 1, 2])

    def model(x, t, k):  # class 3 is none
        rows = [(m if int(i) == 3 else m.only(int(i))).score(x[j : j + 1], s, t[j : j + 1]) for j, i in enumerate(k)]
        return torch.cat(rows)

    base = Denoiser(model, s, "score")
    bound = ClassifierFree(base, {"k": labels}, {}, 1.0)
    found = log_prob(bound, x0, "exact")
    for j, k in enumerate(labels.tolist()):
        row = truth(m.only(k), s, x0[j : j + 1], found.latent[j : j + 1])
        torch.testing.assert_close(found.log_prob[j : j + 1], row, rtol=0, atol=1e-3)
    # Twice the conditional less the unconditional score, written as one score; and Bayes' rule by a classifier.
    tilted = Denoiser.from_score(lambda x, t: 2 * model(x, t, labels) - m.score(x, s, t), s)
    guided = ClassifierFree(base, {"k": labels}, {"k": torch.full((6,), 3)}, 2.0)
    torch.testing.assert_close(
        log_prob(guided, x0, "exact").log_prob, log_prob(tilted, x0, "exact").log_prob, rtol=0, atol=1e-6
    )
    classifier = Classifier(exact(s, m), lambda x, t: m.posterior(x, s, t).log()[torch.arange(6), labels], 1.0)
    torch.testing.assert_close(log_prob(classifier, x0, "exact").log_prob, found.log_prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", [False, True])
def test_on_a_network_in_float32(attention):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",), "attention_head_dim": 4}
    unet, s = tiny_unet(num_class_embeds=None, **(blocks if attention else {})), make_schedule("flow")
    denoiser = Denoiser(unet_model(unet, s), s, "flow")
    x0 = torch.randn((2, 4, 1, 2), generator=torch.Generator().manual_seed(0))
    found = log_prob(denoiser, x0, "exact", rtol=1e-2, atol=1e-2)
    estimate = log_prob(denoiser, x0, probes=16, rtol=1e-2, atol=1e-2, generator=torch.Generator().manual_seed(0))
    assert found.log_prob.dtype == torch.float64 and found.latent.dtype == torch.float32
    assert ((found.log_prob - estimate.log_prob).abs() < 3 * estimate.stderr + 0.05).all()
    assert not found.log_prob.requires_grad and not found.latent.requires_grad
    assert all(p.grad is None for p in unet.parameters())


def test_no_graph_outlives_an_evaluation():
    s, m, inputs, alive = make_schedule("vp"), mixture((2,)), [], []
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def model(x, t):  # the score's graph holds on to x: it must go with it
        alive.append(sum(ref() is not None for ref in inputs))
        inputs.append(weakref.ref(x))
        return weight * m.score(x, s, t) + 0 * x**2

    assert not log_prob(Denoiser(model, s, "score"), drawn(m, 2)).log_prob.requires_grad
    assert len(alive) > 20 and max(alive) == 0


# Planted bugs: each must fail the check of exactness, or of unbiasedness ----------------------------------------------


SIGNS = [[1.0, *(1.0 if i >> k & 1 else -1.0 for k in range(3))] for i in range(8)]  # all of [+-1]^4 up to a sign of v


@pytest.fixture
def all_signs(monkeypatch):
    """Eight probes are then every Rademacher vector of 4 dimensions: their mean is the trace, without chance."""
    order = iter(SIGNS * 100)
    monkeypatch.setattr(likelihood, "_probe", lambda x0, noise, generator: torch.tensor(next(order)).to(x0).expand(x0.shape))


def check(divergence):
    s, m = make_schedule("ve"), mixture((4,))
    x0 = drawn(m, 12)
    found = log_prob(exact(s, m), x0, divergence, probes=8 if divergence == "hutchinson" else 1, max_steps=60)
    assert float((found.log_prob - truth(m, s, x0, found.latent)).abs().max()) < 1e-3
    # Where the exact flow of a Gaussian ends is checked above; here only that it ends among the prior's numbers.
    assert float((found.latent / s.prior_std).square().mean()) < 2


def test_the_mean_over_every_rademacher_vector_is_the_trace(all_signs):
    check("hutchinson")


def halved(u, angle, drift, traces, vectors):
    return drift, 0.5 * traces


def turned(u, angle, drift, traces, vectors):
    return drift, -traces


def uneven(u, angle, drift, traces, vectors):
    return drift, traces * u.shape[1] / (u.shape[1] - 1)  # one dimension too few in a mean


def slow(u, angle, drift, traces, vectors):
    return 0.5 * drift, 0.5 * traces


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("bug", [halved, turned, uneven, slow])
def test_a_wrong_divergence_or_drift_is_caught(monkeypatch, all_signs, bug, divergence):
    right = likelihood.drift_and_divergence

    def wrong(denoiser, u, angle, vectors):
        return bug(u, angle, *right(denoiser, u, angle, vectors), vectors)

    check(divergence)
    monkeypatch.setattr(likelihood, "drift_and_divergence", wrong)
    with pytest.raises(AssertionError):
        check(divergence)


@pytest.mark.slow
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_a_missing_prior_is_caught(monkeypatch, all_signs, divergence):
    s = make_schedule("ve")
    right = type(s).prior_log_prob
    calls = []

    def absent(self, x):  # log_prob's own call, the first; the test's truth keeps its prior
        calls.append(1)
        return right(self, x) if len(calls) > 1 else torch.zeros(len(x), dtype=torch.float64)

    monkeypatch.setattr(type(s), "prior_log_prob", absent)
    with pytest.raises(AssertionError):
        check(divergence)


@pytest.mark.slow
def test_a_probe_redrawn_at_each_call_is_caught(monkeypatch):
    right = likelihood.drift_and_divergence

    def redrawn(denoiser, u, angle, vectors):
        return right(denoiser, u, angle, torch.randn_like(vectors).sign())

    monkeypatch.setattr(likelihood, "drift_and_divergence", redrawn)
    torch.manual_seed(0)
    with pytest.raises((AssertionError, UserError)):  # the integrand is then noise, and no step small enough for it
        check("hutchinson")


@pytest.mark.parametrize(
    "options, said",
    [
        ({"divergence": "trace"}, "divergence: 'trace' is unknown; valid: hutchinson, exact"),
        ({"noise": "uniform"}, "noise: 'uniform' is unknown"),
        ({"probes": 0}, "probes: at least 1"),
        ({"divergence": "exact", "probes": 4}, "probes: the exact divergence has none"),
        ({"max_steps": 2}, "max_steps: 2 steps from angle = "),
        ({"rtol": 0.0}, "rtol: must be above 0"),
    ],
)
def test_mistakes_are_said(options, said):
    s, m = make_schedule("vp"), mixture((2,))
    with pytest.raises(UserError, match=said):
        log_prob(exact(s, m), drawn(m, 2), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", ["hutchinson", "exact"])
@pytest.mark.parametrize("how", ["no_grad", "detach", "inference_mode"])
def test_a_network_without_derivative_is_refused(how, divergence, dtype):
    s, m, x0 = make_schedule("vp"), mixture((2, 2)), drawn(mixture((2, 2)), 3).to(dtype)

    def cut(x, t):
        with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "detach": torch.enable_grad}[how]():
            return m.score(x, s, t).detach()

    with pytest.raises(UserError, match="derivative in x is not that of its values"):
        log_prob(Denoiser.from_score(cut, s), x0, divergence)


@pytest.mark.parametrize("name", names())
def test_a_score_that_is_constant_is_none_without_derivative(name):
    """Nor is a guided one, nor one in low precision, nor a single-sample batch in float32."""
    s, m = make_schedule(name), mixture((2, 2))
    flat = Denoiser.from_score(lambda x, t: torch.full_like(x, 0.3), s)
    rough = Denoiser.from_score(lambda x, t: m.score(x, s, t).bfloat16(), s)
    for denoiser in (flat, rough, exact(s, m), Classifier(exact(s, m), lambda x, t: -x.square().sum((1, 2)), 0.2)):
        for x0 in (drawn(m, 3), drawn(m, 1).float()):
            likelihood._check_derivative(denoiser, x0)


def test_log_prob_in_inference_mode():
    s, m = make_schedule("vp"), mixture((2, 2))
    x0, guided = drawn(m, 2), Classifier(exact(s, m), lambda x, t: -x.square().sum((1, 2)), 0.2)
    for denoiser in (exact(s, m), guided):
        outside = log_prob(denoiser, x0, "exact").log_prob
        with torch.inference_mode():
            torch.testing.assert_close(log_prob(denoiser, x0.clone(), "exact").log_prob, outside)
            made = x0.clone()
        torch.testing.assert_close(log_prob(denoiser, made, "exact").log_prob, outside)
    with torch.inference_mode():
        weight = torch.ones(2, dtype=torch.float64)
        with pytest.raises(UserError, match="use torch.no_grad instead"):
            log_prob(Denoiser.from_score(lambda x, t: -x * weight, s), x0)


def test_an_empty_batch_and_half_precision():
    s, m = make_schedule("vp"), mixture((2, 2))
    empty = log_prob(exact(s, m), drawn(m, 3)[:0], "exact")
    assert empty.log_prob.shape == (0,) and empty.latent.shape == (0, 2, 2) and empty.nfe.shape == (0,)
    assert log_prob(exact(s, m), drawn(m, 3)[:0], probes=2, generator=[]).stderr.shape == (0,)
    half = drawn(m, 2).bfloat16()
    found = log_prob(exact(s, m), half, "exact")
    assert found.latent.dtype == torch.float32
    assert torch.equal(found.log_prob, log_prob(exact(s, m), half.float(), "exact").log_prob)
    bounds = [variational_bound(exact(s, m), x, 4, torch.Generator().manual_seed(0)) for x in (half, half.float())]
    assert torch.equal(*bounds)
