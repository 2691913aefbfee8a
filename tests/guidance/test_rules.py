"""Rules of guidance: what each promises, and the numbers of diffusers' own guiders."""

import math

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from exact import mixture
from test_guidance_exact import SHAPE, exact, states, times

from latentdiff.denoiser import Denoised, Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import RULES, Autoguidance, ClassifierFree, Rule
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
        (lambda: Rule("cfg", parallel=0.5), "cfg has no parallel and no threshold"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
