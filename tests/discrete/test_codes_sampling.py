"""Samples of codes against enumerated distributions, and what sampling keeps to."""

from types import SimpleNamespace

import pytest
import torch
from alphabet import Alphabet, chi_square, total_variation
from diffusers import AmusedScheduler
from torch.nn.functional import one_hot

from latentdiff.discrete import Absorbing, ClassifierFree, Uniform, common, sample
from latentdiff.errors import NotFiniteError, UserError
from latentdiff.utils.random import generators

TRUTH = Alphabet()
BOTH = [Absorbing, Uniform]


def drawn(process, steps, n=8000, predict=None, truth=TRUTH, **options):
    """The histogram of n samples."""
    predict = predict or truth.predict(process)
    shape = (n, truth.positions)
    return truth.histogram(sample(predict, shape, process, steps, torch.Generator().manual_seed(0), **options))


def random_network(num_codes, seed=0):
    """Float64 logits that depend on all codes of a sample, and on t and label."""
    weight = torch.randn(64, num_codes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def network(codes, t, label=None):
        t = t.reshape(-1, *(1,) * codes.ndim)
        total = codes.reshape(len(codes), -1).sum(1).reshape(t.shape)
        logits = 2 * weight[codes % 64] + torch.sin(total + 3 * t + torch.arange(num_codes))
        return logits if label is None else logits + label.reshape(t.shape) * torch.arange(num_codes) / num_codes

    return network


# The distribution


@pytest.mark.parametrize("kind, name", [(Absorbing, "linear"), (Absorbing, "cosine"), (Uniform, "linear"), (Uniform, "cosine")])
def test_few_steps_draw_the_enumerated_chain(kind, name):
    process = kind(3, name)
    predict = TRUTH.predict(process)
    distances = []
    for steps in (1, 4, 16):
        chain = TRUTH.chain(process, steps, predict)
        assert abs(chi_square(drawn(process, steps), chain)) < 3.5
        distances.append(total_variation(chain, TRUTH.joint))
    # One step draws each position from its own marginal: the error of a factorised joint.
    places = one_hot(TRUTH.states, 3).double()
    marginals = torch.einsum("s,snk->nk", TRUTH.joint, places)
    torch.testing.assert_close(TRUTH.chain(process, 1, predict), torch.einsum("snk,nk->sn", places, marginals).prod(1))
    assert distances[0] > 0.3 and distances[2] < 0.5 * distances[1] and distances[1] < 0.6 * distances[0]


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("size", [(5, 2), (2, 4)])
def test_many_steps_draw_the_joint(kind, size):
    truth = Alphabet(*size, seed=1, sharpness=2.0)
    process = kind(size[0])
    assert abs(chi_square(drawn(process, 256, 6000, truth=truth), truth.joint)) < 3.5
    assert chi_square(drawn(process, 4, 6000, truth=truth), truth.joint) > 10  # the check can see an error


def test_temperature_sharpens():
    truth = Alphabet(5, 1)
    for temperature in (0.5, 2.0):
        expected = truth.joint ** (1 / temperature)
        counts = drawn(Absorbing(5), 3, truth=truth, temperature=temperature)
        assert abs(chi_square(counts, expected / expected.sum())) < 3.5


# Guidance


def test_guidance_of_one_code_is_the_tilted_distribution():
    truth = Alphabet(5, 1, seed=3)
    joints = torch.stack([truth.joint, Alphabet(5, 1, seed=4).joint])
    n, scale = 8000, 2.5
    one, none = torch.ones(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    guided = joints[0] * (joints[1] / joints[0]) ** scale
    process = Absorbing(5)
    predict = truth.predict(process, joints)
    for factor, interval, expected in (
        (scale, None, guided / guided.sum()),
        (1.0, None, joints[1]),
        (0.0, None, joints[0]),
        (scale, (0.0, 0.2), joints[1]),  # one step, at t = 1
    ):
        guidance = ClassifierFree({"label": one}, {"label": none}, factor, interval)
        assert abs(chi_square(drawn(process, 1, n, predict, truth, guidance=guidance), expected)) < 3.5


@pytest.mark.parametrize("kind", BOTH)
def test_guided_steps_draw_the_enumerated_chain(kind):
    process, other = kind(3), Alphabet(seed=5)
    predict = TRUTH.predict(process, torch.stack([TRUTH.joint, other.joint]))
    plain, conditional = TRUTH.predict(process), other.predict(process)

    def exact(codes, t):
        to, away = (each(codes, t).clamp_min(-1e4) for each in (conditional, plain))
        return (away + 2.0 * (to - away)).log_softmax(-1)

    n = 8000
    guidance = ClassifierFree({"label": torch.ones(n).long()}, {"label": torch.zeros(n).long()}, 2.0)
    counts = drawn(process, 4, n, predict, guidance=guidance)
    assert abs(chi_square(counts, TRUTH.chain(process, 4, exact))) < 3.5
    assert chi_square(counts, TRUTH.chain(process, 4, conditional)) > 10


def test_guidance_evaluates_only_the_rows_it_guides():
    calls = []

    def predict(codes, t, label):
        calls.append(len(codes))
        return label[:, None, None].expand(-1, 2, 3) * torch.arange(3.0)

    guided = ClassifierFree({"label": torch.ones(3)}, {"label": torch.zeros(3)}, 3.0, (0.2, 0.6))(predict)
    logits = guided(torch.zeros(3, 2).long(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    slopes = logits[:, 0].diff(dim=-1)
    torch.testing.assert_close(slopes, torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.0, 1.0]]), rtol=0, atol=1e-5)
    guided(torch.zeros(3, 2).long(), torch.full((3,), 0.9).double())
    assert calls == [4, 3]


# Known codes


def known_case(kind, steps, n=6000):
    """(histogram of samples whose last code is 2, p(free | known), p(free) with the last code set to 2)."""
    process = kind(3)
    known = torch.tensor([-1, -1, 2]).expand(n, 3)
    counts = drawn(process, steps, n, known=known)
    holds = TRUTH.states[:, 2] == 2
    conditional = TRUTH.joint * holds
    ignoring = TRUTH.joint.reshape(9, 3).sum(1).repeat_interleave(3) * holds
    return counts, conditional / conditional.sum(), ignoring


def test_known_codes_under_masks_give_the_conditional():
    counts, conditional, ignoring = known_case(Absorbing, 256)
    holds = conditional > 0
    assert bool((counts[~holds] == 0).all())
    assert abs(chi_square(counts[holds], conditional[holds])) < 3.5
    assert chi_square(counts[holds], ignoring[holds]) > 10


def test_known_codes_under_uniform_come_near_the_conditional():
    counts, conditional, ignoring = known_case(Uniform, 128)
    assert bool((counts[conditional == 0] == 0).all())
    share = counts / counts.sum()
    assert total_variation(share, conditional) < 0.25 * total_variation(ignoring, conditional)  # measured: 0.15


# Confidence


@pytest.mark.parametrize("n, steps", [(17, 6), (5, 9)])
def test_confidence_is_that_of_diffusers(n, steps):
    """With codes that are all but certain and no noise, both fix the same positions in the same order."""
    mask = 8
    doubt = 1e-6 * (1 + torch.randperm(n, generator=torch.Generator().manual_seed(0)))
    logits = one_hot(torch.arange(n) % mask, mask) * (1 / doubt).log()[:, None] + torch.zeros(2, n, mask)
    peer = AmusedScheduler(mask_token_id=mask)
    peer.set_timesteps(steps, (0, 0))
    states, codes = [], torch.full((2, n), mask)
    for t in peer.timesteps:
        codes = peer.step(logits, t, codes, generator=torch.Generator().manual_seed(1)).prev_sample
        states.append(codes)
    own = []
    sample(
        lambda codes, t: logits,
        (2, n),
        Absorbing(mask, "cosine"),
        steps,
        torch.Generator().manual_seed(0),
        order="confidence",
        confidence_noise=0.0,
        callback=lambda i, t, codes, x0: own.append(codes),
    )
    assert len(own) == steps
    for theirs, ours in zip(states, own, strict=True):
        assert torch.equal(theirs, ours)


def test_masks_that_are_left_are_counted_exactly():
    """In float32, 22 of 49 steps would leave 26 of 49 masks."""
    left = []
    options = {"order": "confidence", "callback": lambda i, t, codes, x0: left.append(int(codes.eq(3).sum()))}
    sample(lambda codes, t: torch.zeros(1, 49, 3), (1, 49), Absorbing(3), 49, torch.Generator().manual_seed(0), **options)
    assert left == [*range(48, -1, -1)]


def test_confidence_noise_makes_the_order_random():
    logits = one_hot(torch.arange(8), 8) * 12.0 + torch.linspace(0, 1, 8)[:, None] * one_hot(torch.arange(8), 8)

    def first(noise, steps):
        """The positions that the first of two steps fixes, in 300 samples."""
        states = []
        network = lambda codes, t: logits.expand(300, -1, -1)  # noqa: E731
        record = lambda i, t, codes, x0: states.append(codes)  # noqa: E731
        options = {"order": "confidence", "confidence_noise": noise, "callback": record}
        sample(network, (300, 8), Absorbing(8), steps, torch.Generator().manual_seed(0), **options)
        return [(state < 8).double().mean(0) for state in states]

    assert bool((first(0.0, 2)[0][4:] > 0.99).all())  # the surer half
    share = first(1e4, 2)[0]
    assert bool(((share - 0.5).abs() < 0.12).all())
    assert [round(float(state.sum())) for state in first(4.5, 4)] == [2, 4, 6, 8]


def test_confidence_noise_falls_with_t():
    """Of two positions, one certain and one of 8 equal codes, the first of two steps fixes one: a race of Gumbel noise."""
    n, noise, states = 6000, 4.0, []
    logits = torch.stack([1e3 * one_hot(torch.tensor(2), 8), torch.zeros(8)]).expand(n, 2, 8)
    options = {"order": "confidence", "confidence_noise": noise, "callback": lambda i, t, codes, x0: states.append(codes)}
    sample(lambda codes, t: logits, (n, 2), Absorbing(8), 2, torch.Generator().manual_seed(0), **options)
    share = float((states[0][:, 0] < 8).double().mean())
    assert share == pytest.approx(1 / (1 + 8 ** (-1 / (noise * 0.5))), abs=0.025)  # at s = 0.5; 0.739


# What sampling keeps to


@pytest.mark.parametrize("options", [{}, {"order": "confidence"}, {"guided": True}, {"known": True}, {"kind": Uniform}])
def test_a_sample_does_not_depend_on_its_batch(options):
    options = dict(options)
    process, shape = options.pop("kind", Absorbing)(3), (3, 3, 3)  # each axis as long as the batch
    label = torch.tensor([1.0, 2.0, 3.0]).double()
    known = torch.full((3, *shape), -1)
    known[0, 0], known[2] = 1, 2  # a part of one sample, and all of another
    is_known, is_guided = options.pop("known", False), options.pop("guided", False)

    def draw(rows):
        more = {"known": known[rows]} if is_known else {}
        if is_guided:
            more["guidance"] = ClassifierFree({"label": label[rows]}, {"label": 0 * label[rows]}, 2.0, (0.3, 0.8))
        else:
            more["label"] = label[rows]
        return sample(random_network(3), (len(rows), *shape), process, 5, generators(7, rows), **more, **options)

    together = draw([0, 1, 2])
    assert together.shape == (3, *shape) and together.dtype == torch.int64 and 0 <= together.min() and together.max() < 3
    for i in range(3):
        assert torch.equal(draw([i])[0], together[i])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("kind", BOTH)
def test_the_callback_sees_every_step_and_may_change_it(kind):
    seen, before = [], [torch.full((2, 5), 4)]

    def callback(step, t, codes, x0):
        seen.append((step, t, int((codes == 4).sum())))
        assert int(x0.max()) < 4
        if kind is Absorbing:  # what is clean already is its own x0
            assert torch.equal(x0[before[-1] < 4], before[-1][before[-1] < 4])
            before.append(codes)
        return torch.ones_like(codes) if step == 3 else None

    process = kind(4)
    codes = sample(random_network(4), (2, 5), process, 4, torch.Generator().manual_seed(0), callback=callback)
    assert [each[:2] for each in seen] == [(0, 1.0), (1, 0.75), (2, 0.5), (3, 0.25)]
    assert seen[-1][2] == 0 and bool((codes == 1).all())
    if kind is Absorbing:
        masks = [each[2] for each in seen]
        assert masks == sorted(masks, reverse=True) and masks[0] > 0


def test_what_has_no_probability_is_not_drawn(monkeypatch):
    """At both ends of the uniform number, which must be float64: the largest of float32 is 6e-8 below 1."""
    probs = torch.tensor([[0.0, 0.3, 0.0, 0.7, 1e-12, 0.0]], dtype=torch.float64)
    asked = []
    for place, code in ((0.0, 1), (1 - 2**-53, 4), (0.3 - 1e-9, 1), (0.3 + 1e-9, 3)):

        def rand(shape, generator, device, dtype, place=place):
            asked.append(dtype)
            return torch.full(shape, place, dtype=dtype)

        monkeypatch.setattr(common, "rand", rand)
        assert common.draw(probs / probs.sum()).tolist() == [code]
    assert set(asked) == {torch.float64}


def test_devices_and_shapes():
    codes = sample(random_network(3), [2, 3], Uniform(3), 2)
    assert codes.shape == (2, 3)
    assert sample(random_network(3), (2, 3), Absorbing(3), 2, device="cpu").device.type == "cpu"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps: must be at least 1, not 0"),
        ({"order": "surest"}, "order: 'surest' is unknown; valid: random, confidence"),
        ({"temperature": 0.0}, "temperature: must be above 0"),
        ({"confidence_noise": -1.0}, "confidence_noise: must be at least 0"),
        ({"known": torch.zeros(2, 4).long()}, r"known: shape \[2, 4\] is not that of the samples, \[2, 3\]"),
        ({"known": torch.full((2, 3), 4)}, "known: codes must be from -1 to 3, not 4 to 4"),
        ({"process": Uniform(4), "order": "confidence"}, '"confidence" needs a process with masks'),
        (
            {"predict": random_network(5)},
            r"predict: logits of shape \[2, 3, 5\].* one for each of the 4 codes, none for the mask",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    values = SimpleNamespace(**{"predict": random_network(4), "process": Absorbing(4), **options})
    options = {key: value for key, value in options.items() if key not in ("predict", "process")}
    with pytest.raises(UserError, match=message):
        sample(values.predict, (2, 3), values.process, **options)


def test_logits_that_are_not_finite_are_refused():
    with pytest.raises(NotFiniteError, match="predict: logits that are not finite"):
        sample(lambda codes, t: torch.full((2, 3, 4), torch.nan), (2, 3), Absorbing(4), 2)
    with pytest.raises(UserError, match="the keys must be the same"):
        ClassifierFree({"label": 1}, {}, 2.0)
    with pytest.raises(UserError, match="guidance interval"):
        ClassifierFree({}, {}, 2.0, (0.5, 0.2))


def test_a_code_may_be_forbidden():
    def predict(codes, t, label):
        return torch.tensor([0.0, -torch.inf, 0.0]).expand(*codes.shape, 3)

    guidance = ClassifierFree({"label": 0}, {"label": 0}, 3.0)
    for each in (None, guidance):
        codes = sample(predict, (50, 4), Absorbing(3), 3, guidance=each, **({} if each else {"label": 0}))
        assert not bool((codes == 1).any())
