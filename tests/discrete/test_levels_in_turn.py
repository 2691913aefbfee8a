"""Levels in turn: codes [B, L, ...] of which the first level is drawn before the second, against enumerated distributions."""

import pytest
import torch
from alphabet import Alphabet, chi_square, transition

from latentdiff.discrete import Absorbing, bound_terms, loss, make_process, sample
from latentdiff.discrete.processes import level_times, turns
from latentdiff.errors import UserError

# Of 7 equal parts of time the last level has 1, the middle one 2 and the first 4
PARTS = [(3 / 7, 4 / 7), (1 / 7, 2 / 7), (0.0, 1 / 7)]


def in_levels(truth, levels):
    """An exact network over codes [B, L, N / L]."""
    flat = truth.predict(Absorbing(truth.num_codes))

    def network(codes, t):
        return flat(codes.flatten(1), t).unflatten(1, codes.shape[1:])

    assert truth.positions % levels == 0
    return network


def alphas(process, t, levels=3):
    """alpha of each level at t, by the table above."""
    return [float(process.schedule.alpha(min(max((t - begin) / length, 0.0), 1.0))) for begin, length in PARTS[-levels:]]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_last_level_is_masked_first(name):
    process = Absorbing(4, name, "coarse_first")
    begins, lengths = turns(3)
    torch.testing.assert_close(torch.stack([begins, lengths], 1), torch.tensor(PARTS, dtype=torch.float64))
    codes = torch.zeros(20000, 3, 2, dtype=torch.int64)
    for t in (0.0, 0.05, 1 / 7, 0.3, 0.5, 0.9, 1.0):
        exact = torch.tensor(alphas(process, t), dtype=torch.float64)
        share = (process.corrupt(codes, t, torch.Generator().manual_seed(0)) == 0).double().mean((0, 2))
        torch.testing.assert_close(share, exact, rtol=0, atol=0.012)
        torch.testing.assert_close(process.marginal(codes[:1], t)[0, :, :, 0], exact[:, None].expand(3, 2))
        assert bool((share[exact == 0] == 0).all()) and bool((share[exact == 1] == 1).all())


def test_the_posterior_is_that_of_bayes():
    process = Absorbing(3, "cosine", "coarse_first")
    for t, s in ((1.0, 0.6), (0.5, 0.2), (0.3, 0.1), (0.2, 0.0), (1.0, 0.0)):
        for level, (alpha_t, alpha_s) in enumerate(zip(alphas(process, t), alphas(process, s), strict=True)):
            for x_t in (1, 3):  # the code itself, and the mask
                forward = transition(process, alpha_s)[1] * transition(process, alpha_t / alpha_s if alpha_s else 0.0)[:, x_t]
                if float(forward.sum()) == 0:
                    continue
                codes, codes_t = torch.ones(1, 3, 1).long(), torch.full((1, 3, 1), x_t)
                found = process.posterior(codes_t, codes, t, s)[0, level, 0]
                torch.testing.assert_close(found, forward / forward.sum(), rtol=1e-9, atol=1e-9)


def test_one_position_a_level_needs_no_more_steps_than_turns():
    """Nothing is drawn together with anything, so a step for each level draws the joint exactly. All together do not."""
    truth = Alphabet(4, 2, seed=1, sharpness=2.0)

    def drawn(levels):
        codes = sample(in_levels(truth, 2), (8000, 2, 1), Absorbing(4, "linear", levels), 3, torch.Generator().manual_seed(0))
        return truth.histogram(codes.flatten(1))

    assert abs(chi_square(drawn("coarse_first"), truth.joint)) < 3.5
    assert chi_square(drawn("together"), truth.joint) > 10


@pytest.mark.parametrize("order", ["random", "confidence"])
def test_many_steps_draw_the_joint(order):
    truth = Alphabet(2, 4, seed=1, sharpness=2.0)
    process = Absorbing(2, "linear", "coarse_first")
    options = {"order": order, "confidence_noise": 1e6} if order == "confidence" else {}  # noise alone decides the order
    codes = sample(in_levels(truth, 2), (6000, 2, 2), process, 96, torch.Generator().manual_seed(0), **options)
    assert abs(chi_square(truth.histogram(codes.flatten(1)), truth.joint)) < 3.5


def test_the_first_level_is_drawn_before_the_second():
    process, counts = Absorbing(5, "cosine", "coarse_first"), []

    def watch(step, t, codes, x0):
        counts.append([int(count) for count in codes.eq(5).flatten(2).sum(2)[0]])

    for order in ("random", "confidence"):
        counts.clear()
        sample(lambda codes, t: torch.zeros(*codes.shape, 5), (2, 2, 4, 4), process, 12, order=order, callback=watch)
        first, second = zip(*counts, strict=True)
        assert first[7] == 0 and set(second[:7]) == {16} and second[-1] == 0
        assert all(a >= b for a, b in zip(first, first[1:], strict=False))
    # By confidence each level follows the schedule of its own turn: 8 steps, then 4
    assert list(first[:8]) == [int(16 * (1 - float(process.schedule.alpha(1 - k / 8))) + 1e-9) for k in range(1, 9)]
    assert list(second[8:]) == [int(16 * (1 - float(process.schedule.alpha(1 - k / 4))) + 1e-9) for k in range(1, 5)]


def test_the_bound_is_log_p_within_its_standard_error():
    truth = Alphabet(3, 4, seed=2)
    codes = truth.states.repeat(6, 1).unflatten(1, (2, 2))
    log_p = truth.log_prob(codes.flatten(1))
    for name in ("linear", "cosine"):
        process = Absorbing(3, name, "coarse_first")
        found = bound_terms(in_levels(truth, 2), codes, process, 32, torch.Generator().manual_seed(0))
        error = found.bound - log_p
        assert abs(float(error.mean())) < 4 * float(error.std()) / len(error) ** 0.5
        assert 0.85 < float(error.square().mean().sqrt() / found.stderr.square().mean().sqrt()) < 1.15


def test_a_number_of_steps_has_a_bound_that_nears_log_p():
    truth = Alphabet(3, 4, seed=2)
    codes, process = truth.draw(500).unflatten(1, (2, 2)), Absorbing(3, "linear", "coarse_first")
    gaps = []
    for steps in (3, 12, 48):
        found = bound_terms(in_levels(truth, 2), codes, process, 64, torch.Generator().manual_seed(0), steps)
        gaps.append(float((truth.log_prob(codes.flatten(1)) - found.bound).mean()))
    assert gaps[0] > gaps[1] > gaps[2] > -0.02 and gaps[2] < 0.1


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_loss_has_the_bound_for_its_mean(name):
    truth = Alphabet(3, 4, seed=2)
    process = Absorbing(3, name, "coarse_first")
    codes = truth.draw(60000).unflatten(1, (2, 2))
    t = 1 - torch.rand(len(codes), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = loss(in_levels(truth, 2), codes, process, t, torch.Generator().manual_seed(0))
    losses, exact = losses.clamp(max=200), -truth.log_prob(codes.flatten(1)).mean() / 4
    assert float((losses.mean() - exact).abs()) < 4 * float(losses.std()) / len(codes) ** 0.5


def test_the_plain_loss_is_of_the_level_whose_turn_it_is():
    process = Absorbing(4, "linear", "coarse_first")
    codes = torch.zeros(64, 2, 8, dtype=torch.int64)

    def network(codes_t, t):
        """Costs 1 nat in the first level and log(1 + 3 e^2) in the second, wherever asked."""
        logits = torch.zeros(*codes_t.shape, 4)
        logits[:, 0, :, 0] = torch.tensor(3.0).log() - torch.expm1(torch.tensor(1.0)).log()
        logits[:, 1, :, 1:] = 2.0
        return logits

    late = loss(network, codes, process, 0.9, torch.Generator().manual_seed(0), weighting="none")
    early = loss(network, codes, process, 0.2, torch.Generator().manual_seed(0), weighting="none")
    torch.testing.assert_close(late, torch.ones(64))
    torch.testing.assert_close(early, torch.full((64,), float(torch.log1p(3 * torch.tensor(2.0).exp()))))


def test_each_sample_has_its_own_time():
    times = torch.tensor([0.0, 0.2, 0.5, 1.0], dtype=torch.float64)
    exact = torch.tensor([[0, 0], [0, 0.6], [0.25, 1], [1, 1]], dtype=torch.float64)
    torch.testing.assert_close(level_times(times, 2), exact)
    codes = torch.zeros(4, 2, 500, dtype=torch.int64)
    share = (
        (Absorbing(4, "linear", "coarse_first").corrupt(codes, times, torch.Generator().manual_seed(0)) == 4).double().mean(2)
    )
    torch.testing.assert_close(share, level_times(times, 2), rtol=0, atol=0.08)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Absorbing(4, levels="fine_first"), "levels: 'fine_first' is unknown; valid: together, coarse_first"),
        (lambda: make_process("uniform", 4, levels="coarse_first"), "valid for uniform: together"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()
