"""Replacement against Gaussians: known entries end where they are known, and what that does to the others."""

import pytest
import torch
from exact import Gaussian

from latentdiff import samplers
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import KnownLatents
from latentdiff.schedules import make_schedule

COUNT = 2000
KNOWN = 1.3


def completed(sampler, correlation, name="vp", steps=60, seed=0):
    """The free one of two entries whose other one is KNOWN, for data N(0, [[1, correlation], [correlation, 1]])."""
    schedule = make_schedule(name)
    data = Gaussian(torch.zeros(2).double(), torch.tensor([[1.0, correlation], [correlation, 1.0]]).double())
    denoiser = Denoiser.from_score(lambda x, t: data.score(x, schedule, t), schedule)
    known = torch.tensor([KNOWN, 99.0]).double().expand(COUNT, 2)  # what stands in free entries is not read
    guided = KnownLatents(denoiser, known, torch.tensor([[False, True]]))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(COUNT, 2, generator=generator, dtype=torch.float64)
    times = samplers.make_grid("angle", schedule, steps)
    start, alpha, sigma = noise * schedule.start_std(times[0]), schedule.alpha(times[0]), schedule.sigma(times[0])
    start[:, 0] = alpha * KNOWN + sigma * noise[:, 0]
    out = samplers.sample(guided, start, sampler, grid=times, start="state", generator=generator)
    assert (out[:, 0] - KNOWN).abs().max() < (0.2 if sampler in ("predictor_corrector", "annealed_langevin") else 1e-6)
    return out[:, 1]


@pytest.mark.parametrize("sampler", samplers.names())
def test_entries_that_do_not_depend_on_the_known_ones_keep_their_law(sampler):
    free = completed(sampler, 0.0)
    wide = 0.1 if sampler in ("annealed_langevin", "euler_maruyama", "reverse_diffusion", "predictor_corrector") else 0.06
    assert abs(free.mean()) < 4 / COUNT**0.5 and abs(free.std() - 1) < wide


@pytest.mark.parametrize("name", ["vp", "flow", "cosine"])
def test_entries_that_do_are_drawn_to_the_posterior_but_not_all_the_way(name):
    """The posterior is N(0.8 KNOWN, 0.6^2). Replacement is known not to be exact: its mean is short of it, its spread above."""
    free = completed("heun", 0.8, name)
    assert 0.35 * 0.8 * KNOWN < free.mean() < 0.95 * 0.8 * KNOWN
    assert 0.6 < free.std() < 1


def test_the_estimates_are_the_known_ones_where_they_are_known():
    schedule = make_schedule("flow")
    denoiser = Denoiser.from_score(lambda x, t: -x, schedule)
    x, known = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    is_free = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    is_free[0, :, :2] = True
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    out, plain = KnownLatents(denoiser, known, is_free)(x, t), denoiser(x, t)
    wide = is_free.expand_as(x)
    assert torch.equal(out.x0[wide], plain.x0[wide]) and torch.equal(out.eps[wide], plain.eps[wide])
    assert torch.equal(out.x0[~wide], known[~wide])
    back = schedule.alpha(t).float()[:, None, None, None] * out.x0 + schedule.sigma(t).float()[:, None, None, None] * out.eps
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    alone = KnownLatents(denoiser, known[1:2], is_free[1:2])(x[1:2], t[1:2])
    assert torch.equal(alone.eps[0], out.eps[1])


def test_shapes_that_do_not_go_together_are_refused():
    denoiser = Denoiser.from_score(lambda x, t: -x, make_schedule("vp"))
    with pytest.raises(UserError, match=r"is_free \[2, 1, 3, 3\] does not broadcast to known \[2, 4, 4, 4\]"):
        KnownLatents(denoiser, torch.zeros(2, 4, 4, 4), torch.ones(2, 1, 3, 3, dtype=torch.bool))
    guided = KnownLatents(denoiser, torch.zeros(2, 4, 4, 4), torch.ones(2, 1, 4, 4, dtype=torch.bool))
    with pytest.raises(UserError, match="is not of the shape of known"):
        guided(torch.zeros(3, 4, 4, 4), 0.5)
