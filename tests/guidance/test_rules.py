"""Rules of guidance: what each promises, and the numbers of diffusers' own guiders."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from exact import mixture
from test_guidance_exact import SHAPE, exact, states, times

from latentdiff.denoiser import Denoised, Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import RULES, Autoguidance, ClassifierFree, Rule
from latentdiff.guidance.rules import RunningSum
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule

RULE = {"cfg": Rule(), "apg": Rule("apg", 0.3, 1.5), "cfg_zero": Rule("cfg_zero")}
SCALE = 3.0


def estimates(name="flow"):
    """(x, t, what to guide to, what to guide away from) of a mixture."""
    s, m = make_schedule(name), mixture(SHAPE)
    x, t = states(), times(s)
    return x, t, exact(m.only(0), s)(x, t), exact(m, s)(x, t)


def dot(a, b):
    return (a * b).flatten(1).sum(1).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("name", ["vp", "flow", "ve"])
@pytest.mark.parametrize("rule", RULES)
def test_x0_and_eps_still_make_x_and_each_sample_is_alone(rule, name):
    x, t, p, n = estimates(name)
    x0, eps = RULE[rule].combine(x, p, n, SCALE)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (p.schedule.alpha(t), p.schedule.sigma(t)))
    torch.testing.assert_close(alpha * x0 + sigma * eps, x)
    for i in range(len(x)):
        one, other = (Denoised(d.x0[i : i + 1], d.eps[i : i + 1], d.schedule, t[i : i + 1]) for d in (p, n))
        torch.testing.assert_close(RULE[rule].combine(x[i : i + 1], one, other, SCALE)[0][0], x0[i])
    torch.testing.assert_close(RULE[rule].combine(x, p, n, 1.0)[0], p.x0)  # scale 1 is off


def test_apg_keeps_what_is_parallel_to_the_estimate():
    x, t, p, n = estimates()
    shift = Rule("apg").combine(x, p, n, SCALE)[0] - p.x0
    torch.testing.assert_close(dot(shift, p.x0), torch.zeros(3, 1, 1, 1).double(), atol=1e-9, rtol=0)
    assert shift.abs().max() > 0.1
    torch.testing.assert_close(Rule("apg", parallel=1.0).combine(x, p, n, SCALE), Rule().combine(x, p, n, SCALE))
    short = Rule("apg", parallel=1.0, threshold=1e-3).combine(x, p, n, SCALE)[0] - p.x0
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((3,), (SCALE - 1) * 1e-3).double())


def test_cfg_zero_does_nothing_to_velocities_that_differ_by_a_factor():
    """Plain guidance overshoots there by the scale; the optimised scale finds the factor."""
    x, t, p, _ = estimates()
    velocity = 0.6 * p.velocity  # on the flow x0 = x - t v, eps = x + (1 - t) v
    wide = t.reshape(-1, 1, 1, 1)
    n = Denoised(x - wide * velocity, x + (1 - wide) * velocity, p.schedule, t)
    torch.testing.assert_close(Rule("cfg_zero").combine(x, p, n, SCALE)[0], p.x0)
    assert (Rule().combine(x, p, n, SCALE)[0] - p.x0).abs().max() > 0.1


@pytest.mark.parametrize("threshold", [0.5, math.inf])
def test_apg_is_that_of_diffusers(threshold):
    x, t, p, n = estimates()
    limit = 0.0 if threshold == math.inf else threshold
    peer = normalized_guidance(p.x0, n.x0, SCALE - 1, eta=0.3, norm_threshold=limit, use_original_formulation=True)
    torch.testing.assert_close(Rule("apg", 0.3, threshold).combine(x, p, n, SCALE)[0], peer)


def test_cfg_zero_is_that_of_diffusers():
    x, t, p, n = estimates()
    factor = cfg_zero_star_scale(p.velocity.flatten(1), n.velocity.flatten(1)).reshape(-1, 1, 1, 1)
    peer = factor * n.velocity + SCALE * (p.velocity - factor * n.velocity)
    x0, eps = Rule("cfg_zero").combine(x, p, n, SCALE)
    torch.testing.assert_close(eps - x0, peer, rtol=1e-5, atol=1e-5)  # diffusers computes in float32


@pytest.mark.parametrize("kind", ["classifier-free", "autoguidance"])
def test_momentum_of_apg_is_that_of_diffusers(kind):
    """Each sample has its own times, as with adaptive steps, and an interval in which it is guided."""
    s, m = make_schedule("flow"), mixture(SHAPE)
    rule, scale, interval = Rule("apg", 0.3, 1.5, momentum=-0.6), 3.0, (0.0, 0.85)

    def model(x, t, label):
        rows = [m if k < 0 else m.only(k) for k in label.tolist()]
        return torch.cat([row.score(x[i : i + 1], s, t[i : i + 1]) for i, row in enumerate(rows)])

    if kind == "autoguidance":
        guided = Autoguidance(exact(m.only(0), s), exact(m, s), scale, interval=interval, rule=rule)
    else:
        labels = {"label": torch.zeros(3).long()}, {"label": torch.full((3,), -1)}
        guided = ClassifierFree(Denoiser.from_score(model, s), *labels, scale, rule=rule, interval=interval)
    for _ in range(2):  # a second run starts anew
        buffers = [MomentumBuffer(-0.6) for _ in range(3)]
        for k in range(4):
            x, t = states(seed=k), torch.tensor([0.9 - 0.2 * k, 0.8 - 0.1 * k, 0.7 - 0.2 * k], dtype=torch.float64)
            p, n, found = exact(m.only(0), s)(x, t), exact(m, s)(x, t), guided(x, t)
            for i, buffer in enumerate(buffers):
                one = (p.x0[i : i + 1], n.x0[i : i + 1], scale - 1, buffer, 0.3, 1.5, True)
                expected = normalized_guidance(*one)[0] if t[i] <= 0.85 else p.x0[i]
                torch.testing.assert_close(found.x0[i], expected)


def test_momentum_sums_a_geometric_series():
    running, d, t = RunningSum(0.5), torch.ones(2, 3), torch.tensor([0.9, 0.8])
    sums = [running.add(d, t - 0.1 * k, torch.arange(2), 2) for k in range(4)]
    torch.testing.assert_close(sums[-1], torch.full((2, 3), (1 - 0.5**4) / 0.5))
    mixed = running.add(d, torch.tensor([0.5, 0.9]), torch.arange(2), 2)  # the second one starts anew
    torch.testing.assert_close(mixed, torch.tensor([[1 + 0.5 * 1.875], [1.0]]).expand(2, 3))
    assert torch.equal(running.add(torch.ones(1, 3), t[:1] - 1, torch.arange(1), 1), torch.ones(1, 3))  # another batch


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
def test_zero_init_leaves_the_noise_as_it_is_in_the_first_steps(sampler):
    s, m, seen = make_schedule("flow"), mixture(SHAPE), []
    noise, grid = states(seed=3), torch.linspace(1, 0, 11, dtype=torch.float64)
    rule = Rule("cfg_zero", zero_init=0.2)
    guided = Autoguidance(exact(m.only(0), s), exact(m, s), SCALE, rule=rule)
    sample(guided, noise, sampler, grid=grid, callback=lambda step, t, x, x0: seen.append(x))
    torch.testing.assert_close(torch.stack(seen[:2]), noise.expand(2, *noise.shape), atol=1e-6, rtol=0)
    assert (seen[2] - noise).abs().max() > 1e-2
    plain = Autoguidance(exact(m.only(0), s), exact(m, s), SCALE, rule=Rule("cfg_zero"))
    later = sample(plain, noise, sampler, grid=grid[2:], start="state")  # as if the first two steps were not there
    found = sample(guided, noise, sampler, grid=grid)
    if sampler == "euler":
        torch.testing.assert_close(found, later)


@pytest.mark.parametrize("rule", RULES)
def test_both_guidances_follow_the_rule(rule):
    s, m = make_schedule("flow"), mixture(SHAPE)
    x, t, p, n = estimates()
    truth = RULE[rule].combine(x, p, n, SCALE)[0]
    auto = Autoguidance(exact(m.only(0), s), exact(m, s), SCALE, rule=RULE[rule])
    torch.testing.assert_close(auto(x, t).x0, truth)

    def model(x, t, label):
        rows = [m if k < 0 else m.only(k) for k in label.tolist()]
        return torch.cat([row.score(x[i : i + 1], s, t[i : i + 1]) for i, row in enumerate(rows)])

    conditions = {"label": torch.zeros(3).long()}, {"label": torch.full((3,), -1)}
    free = ClassifierFree(Denoiser.from_score(model, s), *conditions, SCALE, rule=RULE[rule], interval=(0.0, float(t[1])))
    torch.testing.assert_close(free(x, t).x0[:2], truth[:2])
    torch.testing.assert_close(free(x, t).x0[2], p.x0[2])  # beyond the interval


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Rule("pag"), "guidance rule: 'pag' is unknown; valid: cfg, apg, cfg_zero"),
        (lambda: Rule("apg", threshold=0.0), "threshold 0.0 above 0"),
        (lambda: Rule("apg", parallel=math.nan), "parallel nan must be finite"),
        (lambda: Rule("cfg", parallel=0.5), "cfg has no parallel; there are parallel, threshold and momentum of apg"),
        (lambda: Rule("cfg_zero", momentum=0.5), "cfg_zero has no momentum"),
        (lambda: Rule("apg", zero_init=0.5), "apg has no zero_init"),
        (lambda: Rule("apg", momentum=-1.0), "momentum -1.0 must be between -1 and 1"),
        (lambda: Rule("cfg_zero", zero_init=1.0), "zero_init 1.0 must be from 0"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
