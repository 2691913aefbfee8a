"""Classifier-free guidance against the analytic guided score of a mixture, and what it costs."""

import pytest
import torch
from exact import mixture

from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import ClassifierFree
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule

SHAPE = (4, 2, 2)
NULL = 3


def setup(name="vp", kind="score"):
    """A mixture as a class-conditional model: class k is component k, NULL is all of them.  calls: batch sizes seen."""
    s, m, calls = make_schedule(name), mixture(SHAPE), []

    def model(x, t, class_labels):
        calls.append(len(x))
        rows = [m if k == NULL else m.only(k) for k in class_labels.tolist()]
        return torch.cat([row.score(x[i : i + 1], s, t[i : i + 1]) for i, row in enumerate(rows)])

    return s, m, Denoiser.from_score(model, s), calls


def conditions(*labels):
    return {"class_labels": torch.tensor(labels)}, {"class_labels": torch.full((len(labels),), NULL)}


def states(n, seed=0):
    return torch.randn((n, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0])
def test_guided_score_is_the_analytic_one_on_every_channel(scale):
    s, m, denoiser, calls = setup()
    x, t = states(3), torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    out = ClassifierFree(denoiser, *conditions(0, 1, 2), scale)(x, t)
    for i in range(3):
        conditional, plain = m.only(i).score(x[i : i + 1], s, t[i]), m.score(x[i : i + 1], s, t[i])
        torch.testing.assert_close(out.score[i : i + 1], plain + scale * (conditional - plain))
    assert calls == ([3] if scale == 1 else [6])
    noised = s.alpha(t).reshape(3, 1, 1, 1) * out.x0 + s.sigma(t).reshape(3, 1, 1, 1) * out.eps
    torch.testing.assert_close(noised, x)


def test_interval_is_in_t_and_per_sample():
    s, m, denoiser, calls = setup()
    x, t = states(3), torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    full = ClassifierFree(denoiser, *conditions(0, 1, 2), 3.0)(x, t)
    bare = ClassifierFree(denoiser, *conditions(0, 1, 2), 1.0)(x, t)
    calls.clear()
    part = ClassifierFree(denoiser, *conditions(0, 1, 2), 3.0, interval=(0.3, 0.6))
    out = part(x, t)
    for i, like in enumerate((bare, full, bare)):
        torch.testing.assert_close(out.x0[i], like.x0[i])
        torch.testing.assert_close(out.eps[i], like.eps[i])
    part(x, 0.9)
    part(x, 0.3)
    assert calls == [4, 3, 6]


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_on_x0_and_per_sample(rescale):
    s, m, denoiser, _ = setup()
    x, t = states(3), 0.5
    guide = ClassifierFree(denoiser, *conditions(0, 1, 2), 4.0, rescale=rescale)
    out = guide(x, t)
    plain = ClassifierFree(denoiser, *conditions(0, 1, 2), 4.0)(x, t)
    conditional = denoiser(x, t, **conditions(0, 1, 2)[0])
    for i in range(3):
        ratio = conditional.x0[i].std() / plain.x0[i].std()
        torch.testing.assert_close(out.x0[i], plain.x0[i] * (rescale * ratio + 1 - rescale))  # 2305.08891 eq. 15-16
        alone = ClassifierFree(denoiser, *conditions(i), 4.0, rescale=rescale)(x[i : i + 1], t)
        torch.testing.assert_close(alone.eps[0], out.eps[i])
    torch.testing.assert_close(s.alpha(t) * out.x0 + s.sigma(t) * out.eps, x)


def test_conditional_sampling_reaches_its_component():
    s, m, denoiser, _ = setup()
    labels = [1] * 60
    x = sample(ClassifierFree(denoiser, *conditions(*labels), 1.0), states(60), "dpmpp_2m", 12)
    posterior = m.posterior(x, s, 1e-3)
    assert posterior[:, 1].min() > 0.99
    torch.testing.assert_close(x.mean(0), m.means[1], rtol=0, atol=0.2)


def test_nests_and_shares_what_is_not_a_tensor():
    s = make_schedule("vp")

    def model(x, t, label, scale, extra):
        assert scale == "same" and len(label) == len(x) == len(extra)
        return x * label.reshape(-1, 1) + extra.reshape(-1, 1)

    one, zero = torch.ones(2), torch.zeros(2)
    inner = ClassifierFree(Denoiser(model, s), {"label": one, "scale": "same"}, {"label": zero, "scale": "same"}, 2.0)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(inner(x, 0.5, extra=one).eps, 2 * x + 1)
    outer = ClassifierFree(inner, {"extra": one}, {"extra": one}, 1.0)
    torch.testing.assert_close(outer(x, 0.5).eps, 2 * x + 1)


def test_mistakes_are_named():
    _, _, denoiser, _ = setup()
    given, null = conditions(0, 1)
    with pytest.raises(UserError, match="class_labels"):
        ClassifierFree(denoiser, given, {}, 2.0)
    ClassifierFree(denoiser, given, {}, 1.0)
    with pytest.raises(UserError, match="low <= high"):
        ClassifierFree(denoiser, given, null, 2.0, interval=(0.8, 0.2))
    with pytest.raises(UserError, match=r"in \[0, 1\]"):
        ClassifierFree(denoiser, given, null, 2.0, rescale=2)
    with pytest.raises(UserError, match="equal in both"):
        ClassifierFree(denoiser, {"class_labels": given["class_labels"]}, {"class_labels": None}, 2.0)(states(2), 0.5)


def test_conditions_may_hold_tensors_in_a_dict():
    s, m, _, _ = setup()
    # As SDXL's added_cond_kwargs: the model reads a tensor a level down, and both branches go through it in one batch.
    denoiser = Denoiser.from_score(lambda x, t, added: m.score(x, s, t) * added["gain"].reshape(-1, 1, 1, 1), s)
    conditions = {"added": {"gain": torch.full((2,), 2.0)}}, {"added": {"gain": torch.full((2,), 1.0)}}
    x = torch.randn((2, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = ClassifierFree(denoiser, *conditions, 3.0)(x, 0.5)
    torch.testing.assert_close(seen.score, (1 + 3 * (2 - 1)) * m.score(x, s, 0.5))


def test_rescale_leaves_a_constant_estimate_alone():
    s = make_schedule("vp")
    denoiser = Denoiser(lambda x, t, c: torch.ones_like(x) * c.reshape(-1, 1), s, "sample")
    seen = ClassifierFree(denoiser, {"c": torch.ones(3)}, {"c": torch.zeros(3)}, 2.0, rescale=0.7)(torch.zeros(3, 1), 0.5)
    assert torch.equal(seen.x0, torch.full((3, 1), 2.0))


@pytest.mark.parametrize("interval", [(200, 800), (0.8, 0.2), (0.1, 0.2, 0.3), (float("nan"), 1.0)])
def test_an_interval_that_could_do_nothing_is_refused(interval):
    _, _, denoiser, _ = setup()
    with pytest.raises(UserError, match="0 <= low <= high <= 1"):
        ClassifierFree(denoiser, *conditions(0), 2.0, interval=interval)
