"""Corruption and the exact steps back, against transition matrices and Bayes' rule written out in alphabet.py."""

import pytest
import torch
from alphabet import bayes, chi_square, listed, transition

from latentdiff.discrete import SCHEDULES, Absorbing, Process, Uniform, make_process
from latentdiff.discrete.schedules import Schedule
from latentdiff.errors import UserError
from latentdiff.utils.random import generators

PROCESSES = [(kind, name) for kind in (Absorbing, Uniform) for name in SCHEDULES]
TIMES = [(1.0, 0.9), (0.7, 0.3), (0.5, 0.0), (1e-3, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_falls_from_1_to_0_and_has_its_inverse_and_derivative(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert float(alpha[0]) == 1 and float(alpha[-1]) == 0 and bool((alpha.diff() < 0).all())
    torch.testing.assert_close(schedule.time(alpha), t, rtol=0, atol=1e-7)
    h = 1e-6
    inner = t[1:-1]
    torch.testing.assert_close(
        schedule.d_alpha(inner), (schedule.alpha(inner + h) - schedule.alpha(inner - h)) / (2 * h), rtol=1e-6, atol=1e-8
    )
    assert float(schedule.alpha(1 - 1e-9)) > 0  # no digits lost near t = 1


@pytest.mark.parametrize("kind, name", PROCESSES)
def test_corrupt_draws_the_marginals_that_it_states(kind, name):
    process = kind(4, name)
    n = 20000
    for code, t in ((0, 0.3), (3, 0.8), (1, 1.0), (2, 0.0)):
        exact = transition(process, process.schedule.alpha(t))[code]
        codes = torch.full((n, 1), code)
        torch.testing.assert_close(process.marginal(codes[:1], t)[0, 0], exact)
        counts = torch.bincount(process.corrupt(codes, t, torch.Generator().manual_seed(1))[:, 0], minlength=len(exact))
        assert bool((counts[exact == 0] == 0).all())
        if int((exact > 0).sum()) > 1:
            assert abs(chi_square(counts[exact > 0].double(), exact[exact > 0])) < 3.5


@pytest.mark.parametrize("kind", [Absorbing, Uniform])
def test_times_belong_to_samples(kind):
    """t is [B] and every other axis is as long as the batch, so that a t along the wrong axis would be seen."""
    process = kind(5)
    codes = torch.zeros(4, 4, 4, dtype=torch.int64)
    t = torch.tensor([0.0, 0.25, 0.6, 1.0])
    drawn = torch.stack([process.corrupt(codes, t, torch.Generator().manual_seed(k)) for k in range(400)])
    clean = (1 - t.double()) + (0 if kind is Absorbing else t.double() / 5)
    share = (drawn == 0).double().mean((0, 2, 3))
    torch.testing.assert_close(share, clean, rtol=0, atol=0.02)
    together = process.corrupt(codes, t, generators(3, range(4)))
    for i in range(4):
        assert torch.equal(process.corrupt(codes[i : i + 1], t[i : i + 1], generators(3, [i]))[0], together[i])


@pytest.mark.parametrize("kind, name", PROCESSES)
def test_the_posterior_is_that_of_bayes(kind, name):
    process = kind(3, name)
    for t, s in TIMES:
        exact = bayes(process, t, s)
        pairs = listed(process.num_states, 2)  # (x0, x_t)
        pairs = pairs[pairs[:, 0] < process.num_codes]
        possible = exact[pairs[:, 0], pairs[:, 1]].sum(-1) > 0.5
        x0, x_t = pairs[possible].T[..., None]  # each [B, 1]
        torch.testing.assert_close(process.posterior(x_t, x0, t, s)[:, 0], exact[x0[:, 0], x_t[:, 0]], rtol=1e-9, atol=1e-10)
        probs = torch.rand(len(x0), 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        probs = probs * (exact[:, x_t[:, 0]].sum(-1) > 0.5).T[:, None]  # of the x0 that x_t can come from
        probs = probs / probs.sum(-1, keepdim=True)
        mean = torch.einsum("bk,kbs->bs", probs[:, 0], exact[:, x_t[:, 0]])
        torch.testing.assert_close(process.reverse(x_t, probs, t, s)[:, 0], mean, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", [Absorbing, Uniform])
def test_draws_of_the_posterior_have_its_probabilities(kind):
    process, n = kind(3, "cosine"), 6000
    for t, s in ((0.7, 0.3), (1.0, 0.6), (0.5, 0.0)):
        exact = bayes(process, t, s)
        for x0, x_t in listed(process.num_states, 2).tolist():
            chances = exact[x0, x_t] if x0 < 3 else torch.zeros(1)
            if float(chances.sum()) < 0.5:
                continue
            codes = [torch.full((n, 1), code) for code in (x_t, x0)]
            counts = torch.bincount(process.posterior_sample(*codes, t, s, torch.Generator().manual_seed(0))[:, 0])
            counts = torch.nn.functional.pad(counts, (0, process.num_states - len(counts))).double()
            assert bool((counts[chances == 0] == 0).all())
            if int((chances > 0).sum()) > 1:
                assert abs(chi_square(counts[chances > 0], chances[chances > 0])) < 4.5


class Late(Schedule):
    """Ends with a tenth of the codes clean."""

    def alpha(self, t):
        return 1 - 0.9 * torch.as_tensor(t, dtype=torch.float64)


def test_the_prior_term_is_the_divergence_at_the_end():
    codes = torch.zeros(2, 3, dtype=torch.int64)
    for kind in (Absorbing, Uniform):
        torch.testing.assert_close(kind(4).prior_divergence(codes), torch.zeros(2, dtype=torch.float64))
    end = torch.tensor([0.1 + 0.9 / 4] + [0.9 / 4] * 3, dtype=torch.float64)
    exact = 3 * (end * (4 * end).log()).sum()
    torch.testing.assert_close(Uniform(4, Late()).prior_divergence(codes), exact.expand(2))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Absorbing(1), "num_codes: 1 is below 2"),
        (lambda: Uniform(4, "log"), "schedule: 'log' is unknown for codes; valid: linear, cosine, cosine_squared"),
        (lambda: Absorbing(4, Late()), "alpha.1. must be 0 for Absorbing"),
        (lambda: make_process("masked", 4), "process: 'masked' is unknown; valid: absorbing, uniform"),
        (lambda: Uniform(4).corrupt(torch.full((1, 2), 4), 0.5), "corrupt: codes must be from 0 to 3, not 4 to 4"),
        (lambda: Uniform(4).corrupt(torch.zeros(1, 2), 0.5), "corrupt: codes must be int64, not float32"),
        (lambda: Uniform(4).posterior(*[torch.zeros(1, 2).long()] * 2, 0.5, 0.5), "s = 0.5 must be below t = 0.5"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_processes_are_found_by_name():
    assert isinstance(make_process("uniform", 4, "cosine"), Uniform)
    process: Process = make_process("absorbing", 4)
    assert (process.mask, process.num_codes, process.num_states) == (4, 4, 5)
