"""The bound and the loss against sums over all states; an exact network reaches log p itself."""

import numpy as np
import pytest
import torch
from alphabet import Alphabet, bayes, listed, place, transition

from latentdiff.discrete import Absorbing, Uniform, add_evidence, bound, bound_terms, loss
from latentdiff.errors import NotFiniteError, UserError
from latentdiff.likelihood import bits_per_dim
from latentdiff.utils.random import generators

TRUTH = Alphabet()
BOTH = [Absorbing, Uniform]
CASES = [(Absorbing, "linear"), (Absorbing, "cosine"), (Uniform, "linear"), (Uniform, "cosine_squared")]


def corruptions(process, t):
    """All pairs (x0, x_t) as (x0 [P, N], x_t [P, N], q(x_t | x0) [P]); pairs of probability 0 left out."""
    states = listed(process.num_states, TRUTH.positions)
    x0 = TRUTH.states.repeat_interleave(len(states), 0)
    x_t = states.repeat(len(TRUTH.states), 1)
    chances = transition(process, process.schedule.alpha(t))[x0, x_t].prod(1)
    return x0[chances > 0], x_t[chances > 0], chances[chances > 0]


def per_state(x0, values):
    """The sum of values [P] over the pairs of each clean state, [S]."""
    return torch.zeros(len(TRUTH.states), dtype=torch.float64).index_add(0, place(x0, TRUTH.num_codes), values)


def chain_bound(process, steps, predict):
    """The bound of each state with so many steps, from Bayes' rule and sums over all states, [S]."""
    total = torch.zeros(len(TRUTH.states), dtype=torch.float64)
    for i in range(1, steps + 1):
        x0, x_t, chances = corruptions(process, i / steps)
        back = bayes(process, i / steps, (i - 1) / steps)  # [x0, x_t, x_s]
        beliefs = predict(x_t, torch.full((len(x_t),), i / steps, dtype=torch.float64)).exp()  # [P, N, K]
        model = torch.einsum("pnk,kpnz->pnz", beliefs, back[:, x_t])
        exact = back[x0, x_t]
        divergence = torch.special.xlogy(exact, exact) - torch.special.xlogy(exact, model)
        total -= per_state(x0, chances * divergence.sum((1, 2)))
    return total


def z_scores(process, steps=None, samples=32, repeats=12, predict=None, truth=None):
    """(bound - truth) / standard error for `repeats` estimates of each state, and the terms."""
    codes = TRUTH.states.repeat(repeats, 1)
    found = bound_terms(predict or TRUTH.predict(process), codes, process, samples, torch.Generator().manual_seed(0), steps)
    truth = TRUTH.log_prob(TRUTH.states) if truth is None else truth
    return (found.bound - truth.repeat(repeats)) / found.stderr.clamp_min(1e-9), found


# The bound


@pytest.mark.parametrize("kind, name", CASES)
def test_the_divergence_rate_sums_to_log_p(kind, name):
    """Minus its integral over the corruption, with all x_t summed, is log p of every state, as the network is exact."""
    process, predict = kind(3, name), TRUTH.predict(kind(3, name))
    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = torch.zeros(len(TRUTH.states), dtype=torch.float64)
    for u, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        m, measure = u**3, 3 * u**2  # fine steps near t = 0
        t = float(process.schedule.time(1 - m))
        x0, x_t, chances = corruptions(process, t)
        times = torch.full((len(x_t),), t, dtype=torch.float64)
        rate = process.divergence_rate(x0, x_t, predict(x_t, times), times)
        total -= weight * measure * per_state(x0, chances * rate)
    torch.testing.assert_close(total, TRUTH.joint.log(), rtol=0, atol=1e-9 if kind is Absorbing else 2e-4)


@pytest.mark.parametrize("kind, name", CASES)
def test_the_bound_is_log_p_within_its_standard_error(kind, name):
    z, found = z_scores(kind(3, name))
    # 324 estimates: the mean of z has a standard error of 0.06
    assert abs(float(z.mean())) < 0.25 and 0.8 < float(z.square().mean().sqrt()) < 1.4
    error = found.bound - TRUTH.log_prob(TRUTH.states).repeat(12)
    assert abs(float(error.mean())) < 4 * float(error.std()) / len(error) ** 0.5
    assert float(found.stderr.mean()) < (0.3 if kind is Absorbing else 0.8)
    assert bool((found.reconstruction == 0).all()) and bool((found.prior == 0).all())


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("steps", [1, 5])
def test_the_bound_of_a_number_of_steps_is_the_sum_over_all_states(kind, steps):
    process = kind(3)
    predict = TRUTH.predict(process)
    exact = chain_bound(process, steps, predict)
    z, found = z_scores(process, steps, truth=exact)
    error = found.bound - exact.repeat(12)
    assert abs(float(error.mean())) < max(4 * float(error.std()) / len(error) ** 0.5, 1e-9)
    torch.testing.assert_close(found.bound, found.prior + found.reconstruction + found.diffusion)
    assert bool((found.diffusion == 0).all()) is (steps == 1)
    # Below what that sampler's own codes have for log p, state by state
    assert bool((exact <= TRUTH.chain(process, steps, predict).log() + 1e-9).all())


@pytest.mark.parametrize("kind", BOTH)
def test_the_bound_is_below_log_p_and_nears_it_as_steps_grow(kind):
    process = kind(3)
    gaps = [float(TRUTH.joint @ (TRUTH.joint.log() - chain_bound(process, n, TRUTH.predict(process)))) for n in (1, 4, 16, 64)]
    assert all(gap > 0 for gap in gaps)
    assert gaps[1] < 0.7 * gaps[0] and gaps[2] < 0.4 * gaps[1] and gaps[3] < 0.4 * gaps[2]


@pytest.mark.parametrize("kind", BOTH)
def test_a_wrong_network_lowers_the_bound(kind):
    process, exact = kind(3), TRUTH.predict(kind(3))
    codes, g = TRUTH.draw(400), torch.Generator()
    for steps in (None, 8):
        right, shifted, wrong = (
            float(bound(predict, codes, process, 16, g.manual_seed(0), steps).mean())
            for predict in (exact, lambda codes, t: exact(codes, t) + 3.0, lambda codes, t: 0.5 * exact(codes, t))
        )
        assert right == pytest.approx(shifted, abs=1e-6) and wrong < right - 0.1


def nothing(codes, t):
    """A network that has learned nothing: all logits are 0."""
    return torch.zeros(*codes.shape, 4)


def test_uniform_codes_have_the_bits_of_their_number():
    nats = bound(nothing, torch.zeros(2, 3, 5).long(), Absorbing(4), 30)
    bits = bits_per_dim(nats, 15, levels=4, data_range=(0, 4))
    torch.testing.assert_close(bits, torch.full((2,), 2.0, dtype=torch.float64), rtol=0, atol=1e-9)


def test_with_the_evidence_of_their_own_code_positions_may_be_independent():
    """Codes that are independent and uniform: the others say nothing, and the evidence alone is the exact network."""
    process, codes = Uniform(4), torch.zeros(200, 5).long()
    found = bound_terms(add_evidence(nothing, process), codes, process, 32, torch.Generator().manual_seed(0))
    error = found.bound + 5 * np.log(4)
    assert abs(float(error.mean())) < 4 * float(error.std()) / 200**0.5 < 0.3
    near = torch.full((200,), 1e-6)
    informed, bare = (loss(each, codes, process, near) for each in (add_evidence(nothing, process), nothing))
    assert float(informed.max()) < 10 and float(bare.min()) > 1e5
    assert torch.equal(add_evidence(nothing, Absorbing(4))(codes, near), nothing(codes, near))
    x_t, t = TRUTH.states, torch.full((27,), 0.4, dtype=torch.float64)
    rest = TRUTH.joint.reshape(3, 9).sum(1)  # the first code by itself
    one = add_evidence(lambda codes, t: rest.log().expand(*codes.shape, 3), Uniform(3))
    first = one(x_t[:, :1], t).log_softmax(-1)[:, 0]
    truth = Alphabet(3, 1)
    truth.joint = rest
    torch.testing.assert_close(first, truth.predict(Uniform(3))(x_t[:, :1], t)[:, 0])


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("steps", [None, 3])
def test_the_bound_of_a_sample_does_not_depend_on_its_batch(kind, steps):
    process, codes = kind(3), TRUTH.states[[3, 20, 11]]
    predict = TRUTH.predict(process, torch.stack([TRUTH.joint, Alphabet(seed=2).joint]))
    label = torch.tensor([0, 1, 1])
    together = bound(predict, codes, process, 8, generators(0, range(3)), steps, label=label)
    for i in range(3):
        alone = bound(predict, codes[i : i + 1], process, 8, generators(0, [i]), steps, label=label[i : i + 1])
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-12)


# The loss


@pytest.mark.parametrize("kind, name", CASES)
def test_the_mean_loss_is_the_bound_per_code(kind, name):
    process = kind(3, name)
    n = 60000
    codes = TRUTH.draw(n)
    t = (torch.arange(n, dtype=torch.float64) + 0.5)[torch.randperm(n, generator=torch.Generator().manual_seed(1))] / n
    losses = loss(TRUTH.predict(process), codes, process, t, torch.Generator().manual_seed(0))
    assert losses.shape == (n,) and losses.dtype == torch.float32
    entropy = -float(TRUTH.log_prob(codes).mean()) / TRUTH.positions
    assert float(losses.mean()) == pytest.approx(entropy, abs=4 * float(losses.std()) / n**0.5)
    assert float(losses.std()) / n**0.5 < 0.05 * entropy


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("weighting", ["bound", "none"])
def test_the_loss_has_its_gradient_and_its_least_value_at_the_exact_network(kind, weighting):
    process, exact = kind(3), TRUTH.predict(kind(3))
    codes = TRUTH.draw(20000)
    t = torch.linspace(0.05, 1, len(codes), dtype=torch.float64)
    tilt = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)

    def tilted(codes, t):
        return exact(codes, t).clamp_min(-30.0) + tilt

    losses = loss(tilted, codes, process, t, torch.Generator().manual_seed(0), weighting)
    (slope,) = torch.autograd.grad(losses.mean(), tilt)
    assert bool((slope.abs() < 0.02).all())
    with torch.no_grad():
        for change in (0.5, -0.5):
            tilt[0, 1] = change
            other = loss(tilted, codes, process, t, torch.Generator().manual_seed(0), weighting)  # the same corruptions
            assert float((other - losses).mean()) > 3 * float((other - losses).std()) / len(codes) ** 0.5
        tilt[0, 1] = 0.0


@pytest.mark.parametrize("kind", BOTH)
def test_the_loss_without_weight_is_the_mean_cross_entropy(kind):
    process, codes = kind(3), TRUTH.states[[3, 20, 11]]
    logits = torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(0))
    seen = []

    def predict(codes, t):
        seen.append(codes)
        return logits

    losses = loss(predict, codes, process, torch.tensor([0.4, 0.7, 1.0]), generators(5, range(3)), "none")
    for i in range(3):
        each = torch.nn.functional.cross_entropy(logits[i], codes[i], reduction="none")
        counted = each if kind is Uniform else each[seen[0][i] == 3]
        assert float(losses[i]) == pytest.approx(float(counted.mean()) if len(counted) else 0.0, abs=1e-6)
    assert kind is Uniform or 0 < int((seen[0] == 3).sum()) < 9


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("t", [0.0, 1e-9, 1.0])
def test_the_loss_is_finite_at_both_ends(kind, t):
    logits = torch.randn(2, 3, 5, requires_grad=True)
    losses = loss(lambda codes, t: logits, torch.ones(2, 3).long(), kind(5, "cosine"), t)
    losses.sum().backward()
    assert bool(losses.isfinite().all()) and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize("kind", BOTH)
def test_the_loss_of_a_sample_does_not_depend_on_its_batch(kind):
    process, codes, t = kind(3), TRUTH.states[[3, 20, 11]], torch.tensor([0.3, 0.6, 0.9])
    predict = TRUTH.predict(process)
    together = loss(predict, codes, process, t, generators(0, range(3)))
    for i in range(3):
        alone = loss(predict, codes[i : i + 1], process, t[i : i + 1], generators(0, [i]))
        torch.testing.assert_close(alone[0], together[i])


# Mistakes


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda p, c: bound(p, c, Absorbing(3), 3), "samples: must be even and at least 2, not 3"),
        (lambda p, c: bound(p, c, Absorbing(3), steps=0), "steps: must be at least 1, not 0"),
        (lambda p, c: bound(p, c + 3, Absorbing(3)), "bound: codes must be from 0 to 2, not 3 to 3"),
        (lambda p, c: bound(p, c, Absorbing(4)), r"predict: logits of shape \[2, 3, 3\]"),
        (
            lambda p, c: loss(p, c, Uniform(3), 0.5, weighting="min_snr"),
            "weighting: 'min_snr' is unknown for codes; valid: bound, none",
        ),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(UserError, match=message):
        call(lambda codes, t: torch.zeros(*codes.shape, 3), torch.zeros(2, 3).long())


def test_a_code_that_is_thought_impossible_has_no_bound():
    logits = torch.tensor([-torch.inf, 0.0, 0.0]).expand(2, 3, 3)
    with pytest.raises(NotFiniteError, match="bound: not finite for 2 of 2 samples"):
        bound(lambda codes, t: logits, torch.zeros(2, 3).long(), Absorbing(3))
