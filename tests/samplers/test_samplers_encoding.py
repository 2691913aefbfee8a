"""Encoding: it is the exact flow backwards, its inverse to a measured error, and its noise is the prior's."""

import math

import pytest
import torch
from exact import Mixture, gaussian_flow, mixture
from planted import Lying

from latentdiff import samplers
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.samplers import encode, round_trip_error, sample, slerp
from latentdiff.schedules import make_schedule, names


def exact(schedule, m):
    return Denoiser.from_score(lambda x, t: m.score(x, schedule, t), schedule)


def draw(n, shape=(2,)):
    return mixture(shape).draw(n, torch.Generator().manual_seed(5))[0]


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("sampler, steps", [("heun", 60), ("dopri5", 1), ("euler", 1000)])
def test_encoding_is_the_exact_flow(name, sampler, steps):
    s = make_schedule(name)
    mean, std = torch.full((1,), 0.5, dtype=torch.float64), 0.5
    gaussian = Mixture(torch.ones(1).double(), mean[None], torch.tensor([std]).double())
    x0 = torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    # On VE x0 is taken for the state at t = 0, where sigma is 0.01.
    truth = gaussian_flow(mean, std, x0, s, 0.0, s.t_max) / s.prior_std
    noise = encode(exact(s, gaussian), x0, sampler, steps)
    torch.testing.assert_close(noise, truth, rtol=0, atol=0.015 if sampler == "euler" else 0.004)


@pytest.mark.parametrize("name", ["vp", "subvp", "flow", "ddpm-scaled-linear", "edm"])
@pytest.mark.parametrize("sampler", ["heun", "dopri5"])
def test_encoded_data_is_standard_normal(name, sampler):
    """N = 4000 in D = 2: means within 4 / sqrt(N), covariance within 4 sqrt(2 / N) of the identity."""
    z = encode(exact(make_schedule(name), mixture((2,))), draw(4000), sampler, 40)
    assert float(z.mean(0).abs().max()) < 4 / 4000**0.5
    assert float((z.T.cov() - torch.eye(2)).abs().max()) < 4 * (2 / 4000) ** 0.5


@pytest.mark.parametrize("name", names())
def test_the_round_trip_closes_as_steps_are_added(name):
    """Root mean square of decode(encode(x0)) - x0 over 50 draws of a mixture of about unit variance, D = 8."""
    denoiser, x0 = exact(make_schedule(name), mixture((2, 2, 2))), draw(50, (2, 2, 2))
    by_steps = [float(round_trip_error(denoiser, x0, "heun", n).square().mean().sqrt()) for n in (10, 20, 40, 80)]
    assert by_steps == sorted(by_steps, reverse=True) and by_steps[-1] < 0.006 and by_steps[0] > 8 * by_steps[-1]
    assert float(round_trip_error(denoiser, x0, "euler", 40).mean()) > 2 * by_steps[2]
    adaptive = round_trip_error(denoiser, x0, "dopri5", rtol=1e-6, atol=1e-6)
    assert adaptive.shape == (50,) and float(adaptive.max()) < 0.012  # the last step, from t_min, is the x0 estimate
    torch.testing.assert_close(
        round_trip_error(denoiser, x0[7:8], "dopri5", rtol=1e-6, atol=1e-6), adaptive[7:8], rtol=1e-4, atol=1e-7
    )


def test_a_decoder_that_is_not_the_inverse_is_measured():
    s, x0 = make_schedule("vp"), draw(20)
    good, lying = exact(s, mixture((2,))), Lying(exact(s, mixture((2,))), score=0.9)
    back = sample(lying, encode(good, x0, steps=40), "heun", 40)
    assert float((back - x0).square().mean().sqrt()) > 20 * float(round_trip_error(good, x0, steps=40).mean())


def test_encode_says_what_it_takes():
    denoiser, x0 = exact(make_schedule("vp"), mixture((2,))), draw(2)
    for change, said in (
        ({"sampler": "ancestral"}, "valid: heun, dopri5, euler"),
        ({"s_churn": 1.0}, "no option 's_churn'; valid: none"),
        ({"sampler": "dopri5", "eta": 1.0}, "valid: rtol, atol, max_steps"),
        ({"sampler": "dopri5", "max_steps": 2}, "max_steps: 2 steps from angle"),
        ({"grid": "linear"}, "angle, uniform"),
        ({"grid_options": {"rho": 5.0}}, "angle has no option 'rho'"),
    ):
        with pytest.raises(UserError, match=said):
            encode(denoiser, x0, **change)


def test_encode_reports_each_step_upwards():
    told = []
    encode(exact(make_schedule("flow"), mixture((2,))), draw(2), "heun", 5, callback=lambda i, t, x, x0: told.append(t))
    assert told == sorted(told) and told[0] == 0 and len(told) == 5


def test_slerp_is_per_sample_and_keeps_the_length():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn((4, 4, 4), generator=g, dtype=torch.float64) for _ in range(2))
    w = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    mixed = slerp(a, b, w)
    torch.testing.assert_close(mixed[0], a[0])
    torch.testing.assert_close(mixed[3], b[3])
    for i in range(4):
        torch.testing.assert_close(slerp(a[i : i + 1], b[i : i + 1], float(w[i]))[0], mixed[i])
        u, v = a[i].flatten(), b[i].flatten()
        angle = torch.acos(u @ v / u.norm() / v.norm())
        expected = (torch.sin((1 - w[i]) * angle) * u + torch.sin(w[i] * angle) * v) / torch.sin(angle)
        torch.testing.assert_close(mixed[i].flatten(), expected)
    unit = [x / x.flatten(1).norm(dim=1)[:, None, None] for x in (a, b)]
    torch.testing.assert_close(slerp(*unit, 0.3).flatten(1).norm(dim=1), torch.ones(4, dtype=torch.float64))
    lengths = slerp(a, b, 0.5).flatten(1).norm(dim=1) / (0.5 * (a + b)).flatten(1).norm(dim=1)
    assert float(lengths.min()) > 1.2  # sqrt(2) for orthogonal samples: the straight line falls short


def test_slerp_of_parallel_and_of_empty_samples_is_straight():
    a = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(slerp(a, 3 * a, 0.5), 2 * a)
    assert math.isclose(float(slerp(a, a + 1e-9, 0.5)[0, 0]), 1.0, abs_tol=1e-8)


def test_noise_between_two_encodings_decodes_to_data():
    s, m = make_schedule("flow"), mixture((2,))
    z = encode(exact(s, m), draw(200), steps=40)
    between = sample(exact(s, m), slerp(z[:100], z[100:], 0.5), "heun", 40)
    typical = m.log_prob(draw(100), s, 0.0)
    assert float(m.log_prob(between, s, 0.0).median()) > float(typical.quantile(0.05))


def test_conditioning_reaches_both_ways():
    s, m = make_schedule("vp"), mixture((2,))
    x0 = m.only(1).draw(30, torch.Generator().manual_seed(1))[0]
    z = encode(exact(s, m.only(1)), x0, steps=40)
    moved = samplers.sample(exact(s, m.only(2)), z, "heun", 40)
    # From one class's Gaussian to the other's, entry by entry.
    expected = m.means[2] + m.stds[2] / m.stds[1] * (x0 - m.means[1])
    torch.testing.assert_close(moved, expected, rtol=0, atol=0.03)


def test_half_precision_and_grid_options():
    denoiser, x0 = exact(make_schedule("vp"), mixture((2,))), draw(3).bfloat16()
    options = {"sampler": "heun", "steps": 4, "grid": "karras", "grid_options": {"rho": 3.0}}
    noise = encode(denoiser, x0, **options)
    assert noise.dtype == torch.float32 and torch.equal(noise, encode(denoiser, x0.float(), **options))
    assert not torch.equal(noise, encode(denoiser, x0, "heun", 4, "karras"))
    error = round_trip_error(denoiser, x0.float(), **options)
    assert not torch.equal(error, round_trip_error(denoiser, x0.float(), "heun", 4, "karras"))
