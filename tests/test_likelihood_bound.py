"""The bound of the reverse SDE, tight for exact scores, and bits per dimension; each planted bug must fail its check."""

import math

import pytest
import torch
from exact import drawn, exact, mixture

from latentdiff import likelihood
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.likelihood import bits_per_dim, bound_terms, variational_bound
from latentdiff.schedules import make_schedule, names
from latentdiff.utils.random import generators


def misfit(m, s, x0, n=4000):
    """E log prior(x_T) - log p_T(x_T) over q(x_T | x0), [B]: what the prior alone costs an exact denoiser."""
    noise = torch.randn((n, *x0.shape), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = (s.alpha(s.t_max) * x0 + s.sigma(s.t_max) * noise).reshape(-1, *x0.shape[1:])
    return (s.prior_log_prob(x) - m.log_prob(x, s, s.t_max)).reshape(n, -1).mean(0)


def bound_errors(name, samples=64, n=48, shape=(2, 2)):
    """z-scores of the bound against log p(x0) itself, as an exact score makes it tight, and its terms."""
    s, m = make_schedule(name), mixture(shape)
    x0 = drawn(m, n)
    found = bound_terms(exact(s, m), x0, samples, torch.Generator().manual_seed(0))
    clean = make_schedule("flow")  # alpha 1 and sigma 0 at t = 0: the mixture itself
    return (found.bound - m.log_prob(x0, clean, 0.0) - misfit(m, s, x0)) / found.stderr, found


@pytest.mark.parametrize("name", names())
def test_the_bound_is_tight_for_an_exact_score(name):
    z, found = bound_errors(name)
    # 48 images: the mean of z has a standard error of 0.15, its root mean square is 1 within 0.2 or so.
    assert abs(float(z.mean())) < 0.5 and 0.7 < float(z.square().mean().sqrt()) < 1.5
    assert float(found.stderr.mean()) < 1.5  # nats; without strata and control variate it would be above 3
    torch.testing.assert_close(found.bound, found.prior + found.reconstruction + found.diffusion)


@pytest.mark.slow
@pytest.mark.parametrize("bug", ["half the integral", "no reconstruction error", "noise doubled"])
def test_a_wrong_bound_is_caught(monkeypatch, bug):
    right, calls = likelihood._noise_error, []

    def wrong(denoiser, x0, t, generator):
        calls.append(1)
        first = len(calls) <= 2
        value = right(denoiser, x0, t, generator)
        if bug == "half the integral":
            return value if first else 0.5 * value
        return 0 * value if first and bug == "no reconstruction error" else (1 if first else 2) * value

    monkeypatch.setattr(likelihood, "_noise_error", wrong)
    assert abs(float(bound_errors("vp")[0].mean())) > 0.75


def test_a_wrong_score_lowers_the_bound():
    # In the mean over data no model beats the data's own density (Gibbs): 0.8 of the score must lose, and by much.
    s, m = make_schedule("vp"), mixture((2,))
    x0 = drawn(m, 200)
    wrong = Denoiser.from_score(lambda x, t: 0.8 * m.score(x, s, t), s)
    right, lower = (variational_bound(d, x0, 32, torch.Generator().manual_seed(0)) for d in (exact(s, m), wrong))
    assert float((right - lower).mean()) > 0.1


def test_the_bound_per_sample_and_its_generators():
    s, m = make_schedule("flow"), mixture((3,))
    x0 = drawn(m, 3)
    together = variational_bound(exact(s, m), x0, 8, generators(0, range(3)))
    alone = variational_bound(exact(s, m), x0[1:2], 8, generators(0, [1]))
    torch.testing.assert_close(alone[0], together[1], rtol=0, atol=1e-9)
    for samples in (0, 3):
        with pytest.raises(UserError, match="samples: must be even"):
            variational_bound(exact(s, m), x0, samples)


# Bits -----------------------------------------------------------------------------------------------------------------


def test_bits_of_uniform_data_are_the_bit_depth():
    dims = 12
    for levels, bits in ((256, 8), (2, 1), (2**16, 16)):
        assert float(bits_per_dim(torch.tensor(-dims * math.log(2.0)), dims, levels)) == pytest.approx(bits)  # over [-1, 1]
        assert float(bits_per_dim(torch.tensor(0.0), dims, levels, (0, 1))) == pytest.approx(bits)
        assert float(bits_per_dim(torch.tensor(-dims * math.log(levels)), dims, levels, (0, levels))) == pytest.approx(bits)
    assert bits_per_dim(torch.zeros(3), 2).shape == (3,)


def test_bits_do_not_depend_on_the_range_the_data_are_scaled_to():
    x = torch.rand((4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    normal = torch.distributions.Normal(0.5, 0.2)
    unit = normal.log_prob(x).sum(1)
    scaled = torch.distributions.Normal(0.0, 0.4).log_prob(2 * x - 1).sum(1)  # the same density over [-1, 1]
    torch.testing.assert_close(bits_per_dim(unit, 5, data_range=(0, 1)), bits_per_dim(scaled, 5))
    for options in ({"dims": 0}, {"dims": 3, "levels": 0}, {"dims": 3, "data_range": (1.0, 1.0)}):
        with pytest.raises(UserError, match="bits_per_dim"):
            bits_per_dim(unit, **options)
