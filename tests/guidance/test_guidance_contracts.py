"""What every guidance keeps: rows to themselves, no cost where it is off, gradients that pass through, and nesting."""

import pytest
import torch
from exact import Gaussian, mixture
from test_guidance_exact import LABELS, NOISE_STD, SHAPE, Y, exact, operator, posterior, states, times

from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import Autoguidance, Classifier, ClassifierFree, Reconstruction, common, gradient
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule

KINDS = ["free", "auto", "classifier", "plain", "covariance"]


def build(kind, denoiser, s, rows, **options):
    """A guidance of some rows of the batch of 3, in dimensions SHAPE."""
    m, labels, y = mixture(SHAPE), LABELS[rows], states(seed=9)[rows, :, :1, 0]
    if kind == "free":
        # the condition moves the mean: model(x, t, shift)
        return ClassifierFree(denoiser, {"shift": 1.0 + labels}, {"shift": 0.0 * labels}, 2.0, **options)
    if kind == "auto":
        return Autoguidance(denoiser, exact(m.only(0), s), 2.0, **options)
    if kind == "classifier":
        return Classifier(denoiser, posterior(m, s, labels), 2.0, **options)
    covariance = {"covariance": True, "solver_steps": 2} if kind == "covariance" else {}
    return Reconstruction(denoiser, lambda v: v[:, :, :1].mean(-1), y, 1.5, 0.4, **covariance, **options)


def counted(s, m, seen):
    def model(x, t, shift=None):
        seen.append(len(x))
        return m.score(x if shift is None else x - shift.reshape(-1, *(1,) * (x.ndim - 1)), s, t)

    return Denoiser.from_score(model, s)


def check_rows(kind, **options):
    s, m = make_schedule("vp"), mixture(SHAPE)
    x, t = states(), times(s)
    together = build(kind, counted(s, m, []), s, [0, 1, 2], **options)(x, t)
    for i in range(3):
        alone = build(kind, counted(s, m, []), s, [i], **options)(x[i : i + 1], t[i])
        torch.testing.assert_close(alone.x0[0], together.x0[i], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(alone.eps[0], together.eps[i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_is_that_row_in_a_batch(kind, rescale):
    check_rows(kind, rescale=rescale)


@pytest.mark.parametrize("kind", KINDS)
def test_planted_norms_over_the_batch_are_seen(monkeypatch, kind):
    monkeypatch.setattr(common, "flat_std", lambda x: x.std().expand(len(x)))
    with pytest.raises(AssertionError):
        check_rows(kind, rescale=0.7)


def test_a_planted_solver_that_shares_its_steps_is_seen(monkeypatch):
    def shared(apply, b, steps):
        return common.conjugate_gradient(lambda u: apply(u[0])[None], b[None], steps)[0]

    monkeypatch.setattr(gradient, "conjugate_gradient", shared)
    with pytest.raises(AssertionError):
        check_rows("covariance")


def test_a_planted_gradient_of_the_batch_is_seen(monkeypatch):
    def normed(value, of, again, retain=False):
        slope = common.gradient(value, of, again, retain)
        return slope / slope.norm()

    monkeypatch.setattr(gradient, "gradient", normed)
    for kind in ("classifier", "plain"):
        with pytest.raises(AssertionError):
            check_rows(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_interval_and_rescale(kind):
    s, m, seen = make_schedule("vp"), mixture(SHAPE), []
    x, t = states(), torch.tensor([0.1, 0.4, 0.8]).double()
    denoiser = counted(s, m, seen)
    full, part = build(kind, denoiser, s, LABELS)(x, t), build(kind, denoiser, s, LABELS, interval=(0.3, 0.6))
    base = denoiser(x, t, shift=1.0 + LABELS) if kind == "free" else denoiser(x, t)
    out = part(x, t)
    for i, like in enumerate((base, full, base)):
        torch.testing.assert_close(out.x0[i], like.x0[i])
        torch.testing.assert_close(out.eps[i], like.eps[i])
    seen.clear()
    part(x, 0.9)
    assert seen == [3]  # outside of the interval it costs nothing more
    scaled = build(kind, denoiser, s, LABELS, rescale=1.0)(x, t)
    torch.testing.assert_close(scaled.x0.flatten(1).std(1), base.x0.flatten(1).std(1))
    alpha, sigma = s.alpha(t).reshape(3, 1, 1, 1), s.sigma(t).reshape(3, 1, 1, 1)
    torch.testing.assert_close(alpha * scaled.x0 + sigma * scaled.eps, x)
    assert (scaled.x0 - full.x0).abs().max() > 1e-3


def test_off_costs_nothing():
    s, m, seen = make_schedule("vp"), mixture(SHAPE), []
    denoiser, x = counted(s, m, seen), states()

    def never(*_):
        raise AssertionError("was evaluated")

    weak = Denoiser(never, s)
    guides = [
        Autoguidance(denoiser, weak, 1.0),
        Classifier(denoiser, never, 0.0),
        Reconstruction(denoiser, never, x, 0.0),
        Reconstruction(denoiser, never, x, 0.0, covariance=True),
    ]
    for guide in guides:
        seen.clear()
        assert torch.equal(guide(x, 0.5).x0, denoiser(x, 0.5).x0) and seen == [3, 3]


@pytest.mark.parametrize("kind", ["classifier", "plain", "covariance"])
def test_nothing_is_guided_where_there_is_noise_alone(kind):
    s, m = make_schedule("flow"), mixture(SHAPE)
    known = exact(m, s)
    flow = Denoiser(lambda x, t: known(x, t.clamp(max=0.999)).velocity, s, "flow")  # finite at alpha(1) = 0
    x, t = states(), torch.tensor([0.3, 1.0, 0.7]).double()
    out, base = build(kind, flow, s, LABELS)(x, t), flow(x, t)
    assert bool(out.x0.isfinite().all()) and torch.equal(out.x0[1], base.x0[1])
    assert not torch.equal(out.x0[0], base.x0[0])


@pytest.mark.parametrize("kind", KINDS)
def test_samplers_get_tensors_without_a_graph(kind):
    s, m = make_schedule("vp"), mixture(SHAPE)
    weight = torch.nn.Parameter(torch.ones(()).double())
    denoiser = Denoiser.from_score(lambda x, t, shift=0: weight * m.score(x - 0 * weight, s, t), s)
    x = states()
    with torch.no_grad():
        out = build(kind, denoiser, s, LABELS)(x, 0.5)
    assert not out.x0.requires_grad and not out.eps.requires_grad and not x.requires_grad and weight.grad is None
    half = build(kind, counted(s, m, []), s, LABELS)(x.half(), 0.5)
    assert half.x0.dtype == torch.float32 and half.eps.dtype == torch.float32
    drawn = sample(build(kind, counted(s, m, []), s, LABELS), x.float(), "dpmpp_2m", 4)
    assert drawn.dtype == torch.float32 and bool(drawn.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_pass_through(kind):
    """As the divergence of a likelihood, or a guidance around this one, needs: against finite differences."""
    s, m = make_schedule("vp"), mixture(SHAPE)
    guide = build(kind, exact(m, s), s, LABELS) if kind != "free" else build(kind, counted(s, m, []), s, LABELS)
    x, v = states().requires_grad_(), states(seed=4)
    (slope,) = torch.autograd.grad((guide(x, 0.5).velocity * v).sum(), x)
    step = 1e-5 * states(seed=5)
    with torch.no_grad():
        difference = ((guide(x + step, 0.5).velocity - guide(x - step, 0.5).velocity) * v).sum() / 2
    assert float((slope * step).sum()) == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize("name", ["vp", "flow"])
def test_they_nest_to_the_posterior_of_a_class_and_an_observation(name):
    """Classifier within Reconstruction: the component's own Gaussian, updated by the observation, in closed form."""
    s, m = make_schedule(name), mixture((4,))
    matrix, apply = operator()
    x, t = states(3, (4,)), times(s)
    classified = Classifier(exact(m, s), posterior(m, s, LABELS), 1.0)
    out = Reconstruction(classified, apply, Y.expand(3, 2), 1.0, NOISE_STD, covariance=True)(x, t)
    for i in range(3):
        truth = Gaussian(m.means[i], m.stds[i] ** 2 * torch.eye(4).double()).given(matrix, Y, NOISE_STD)
        torch.testing.assert_close(out.score[i : i + 1], truth.score(x[i : i + 1], s, t[i]), rtol=1e-6, atol=1e-6)


def test_they_nest_in_any_order_that_keeps_the_rows():
    s, m = make_schedule("vp"), mixture(SHAPE)
    x, t = states(), times(s)
    free = build("free", Autoguidance(counted(s, m, []), counted(s, m, []), 2.0), s, LABELS)  # weak is itself: no change
    torch.testing.assert_close(free(x, t).score, build("free", counted(s, m, []), s, LABELS)(x, t).score)
    both = Classifier(free, posterior(m, s, LABELS), 2.0)(x, t).score
    alone = Classifier(exact(m, s), posterior(m, s, LABELS), 2.0)(x, t).score - exact(m, s)(x, t).score
    torch.testing.assert_close(both, free(x, t).score + alone)
    within = ClassifierFree(build("plain", counted(s, m, []), s, LABELS), {"shift": LABELS}, {"shift": 0 * LABELS}, 2.0)
    with pytest.raises(UserError, match=r"operator\(x0\) is \[6, 3, 1\] and y \[3, 3, 1\]"):
        within(x, t)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda d: Classifier(d, lambda x, t: x.sum(), 1.0), r"log_prob_fn gave \[\] for 3 samples"),
        (lambda d: Classifier(d, lambda x, t: x.detach().sum((1, 2, 3)), 1.0), "log_prob_fn.* must depend on x"),
        (lambda d: Classifier(d, None, 1.0, interval=(0.6, 0.4)), "low <= high"),
        (lambda d: Classifier(d, None, 1.0, rescale=-1), r"in \[0, 1\]"),
        (lambda d: Reconstruction(d, lambda v: v[:, :1], states(), 1.0), r"operator\(x0\) is \[3, 1, 2, 3\] and y"),
        (lambda d: Reconstruction(d, lambda v: v.detach(), states(), 1.0), r"operator\(x0\) must depend on x"),
        (lambda d: Reconstruction(d, lambda v: v, states(), 1.0, noise_std=0.0), "noise_std 0.0 must be above 0"),
        (lambda d: Reconstruction(d, lambda v: v, states(), 1.0, solver_steps=0), "solver_steps 0 at least 1"),
    ],
)
def test_mistakes_are_named(make, said):
    s, m = make_schedule("vp"), mixture(SHAPE)
    with pytest.raises(UserError, match=said):
        make(exact(m, s))(states(), 0.5)


@pytest.mark.parametrize("kind", ["classifier", "plain", "covariance"])
def test_gradients_are_had_in_inference_mode(kind):
    s, m, x = make_schedule("vp"), mixture(SHAPE), states()
    outside = build(kind, counted(s, m, []), s, LABELS)(x, 0.5, shift=0.1 * LABELS)
    drawn = sample(build(kind, counted(s, m, []), s, LABELS), x, steps=3)
    guided = build(kind, counted(s, m, []), s, LABELS)
    with torch.inference_mode():
        made = x.clone()
        if kind != "classifier":  # y may come from there too; what log_prob_fn holds on to may not
            guided = build(kind, counted(s, m, []), s, LABELS)
        inside = guided(made, torch.full((3,), 0.5).double(), shift=0.1 * LABELS)
        torch.testing.assert_close(sample(guided, made, steps=3), drawn)
    torch.testing.assert_close((inside.x0, inside.eps), (outside.x0, outside.eps))
    after = build(kind, counted(s, m, []), s, LABELS)(made, 0.5, shift=0.1 * LABELS)
    torch.testing.assert_close(after.x0, outside.x0)


def test_what_inference_mode_made_cannot_be_differentiated():
    s, m = make_schedule("vp"), mixture(SHAPE)
    with torch.inference_mode():
        weight = torch.ones(SHAPE).double()
        with pytest.raises(UserError, match="guidance: Classifier .* use torch.no_grad instead"):
            Classifier(exact(m, s), lambda x, t: (x * weight).sum((1, 2, 3)), 1.0)(states(), 0.5)
