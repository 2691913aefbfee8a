"""Completion by known pixels: what the estimates become, and the stated error against a posterior that is known."""

import pytest
import torch
from exact import gaussian
from test_posterior_samplers import DRAWS, HIDDEN, KNOWN, errors, linear
from torch.nn import functional as F

from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.guidance import KnownPixels, restoration
from latentdiff.samplers import sample
from latentdiff.schedules import make_schedule
from latentdiff.utils.tensors import per_sample

CELL = 4  # pixels of a cell's side


class Estimate:
    """A denoiser whose estimate of x0 is fixed, [B, 16, 2, 2]."""

    def __init__(self, x0):
        self.x0, self.schedule = x0, make_schedule("flow")

    def __call__(self, x, t, **conditioning):
        return Denoised(self.x0[: len(x)], torch.ones_like(x), self.schedule, per_sample(t, x))


def blur(images):
    """A mean over 3x3 pixels, so that an encoding of a cell sees the cells around."""
    return F.avg_pool2d(images, 3, 1, 1, count_include_pad=False)


def encode(images):
    return F.pixel_unshuffle(blur(images), CELL)


def decode(z):
    return F.pixel_shuffle(z, CELL)


def states(size=6):
    """(estimate, x_t, known images [2, 1, size, size], mask that hides the lower half)."""
    generator = torch.Generator().manual_seed(3)
    x0, x = (torch.rand(2, 16, 2, 2, generator=generator) - 0.5 for _ in range(2))
    images = torch.rand(2, 1, size, size, generator=generator) * 2 - 1
    mask = torch.zeros(1, 1, size, size)
    mask[..., size // 2 :, :] = 1
    return x0, x, images, mask


def test_known_cells_encode_the_known_pixels_beside_what_is_drawn():
    x0, x, images, mask = states()
    out = KnownPixels(Estimate(x0), images, mask, encode, decode)(x, 0.5)
    canvas = torch.full((2, 1, 8, 8), -1.0)  # a border of one pixel, which training made black
    canvas[:, :, 1:7, 1:7] = torch.where(mask > 0, decode(x0)[:, :, 1:7, 1:7], images)
    expected = encode(canvas)
    torch.testing.assert_close(out.x0[:, :, 0], expected[:, :, 0])  # the upper cells hold no hidden pixel
    assert torch.equal(out.x0[:, :, 1], x0[:, :, 1])
    torch.testing.assert_close(out.eps[:, :, 0], (x - 0.5 * expected)[:, :, 0] / 0.5)
    assert bool((out.eps[:, :, 1] == 1).all())


def test_a_cell_that_the_mask_touches_is_free():
    x0, x, images, mask = states()
    mask[..., 2, 0] = 1
    out = KnownPixels(Estimate(x0), images, mask, encode, decode)(x, 0.5)
    assert torch.equal(out.x0[:, :, 0, 0], x0[:, :, 0, 0])
    assert not torch.equal(out.x0[:, :, 0, 1], x0[:, :, 0, 1])


def test_hidden_pixels_change_nothing_and_each_sample_is_alone():
    x0, x, images, mask = states()
    out = KnownPixels(Estimate(x0), images, mask, encode, decode)(x, 0.5)
    other = torch.where(mask > 0, torch.tensor(0.9), images)
    assert torch.equal(KnownPixels(Estimate(x0), other, mask, encode, decode)(x, 0.5).x0, out.x0)
    alone = KnownPixels(Estimate(x0[1:]), images[1:], mask, encode, decode)(x[1:], 0.5)
    torch.testing.assert_close(alone.x0[0], out.x0[1])


@pytest.mark.parametrize(
    "sampler, options, share, stated",
    [
        ("heun", {}, 1.0, (0.26, 0.37)),
        ("heun", {}, 0.0, (0.26, 0.33)),
        ("ddim", {"eta": 1.0}, 1.0, (0.20, 0.21)),
        ("ddim", {"eta": 1.0}, 0.5, (0.20, 0.18)),
        ("ddim", {"eta": 1.0}, 0.0, (0.20, 0.17)),
    ],
)
def test_the_stated_error_where_pixels_are_the_latents(sampler, options, share, stated):
    """Error of the hidden entries' mean in standard deviations of the posterior, and relative error of their covariance.

    With less noise of the known cells the second is smaller.
    """
    s, prior = make_schedule("vp"), gaussian()
    known, hidden = KNOWN.reshape(1, 1, 2, 2), HIDDEN.reshape(1, 1, 2, 2)

    class Flat:
        schedule = s

        def __call__(self, x, t, **conditioning):
            out = linear(prior, s)(x.flatten(1), t)
            return Denoised(out.x0.reshape(x.shape), out.eps.reshape(x.shape), s, out.t)

    def same(images):
        return images

    noise = torch.randn(DRAWS, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    guide = KnownPixels(Flat(), known, hidden, same, same, share)
    x = sample(guide, noise, sampler, 100, torch.Generator().manual_seed(2), **options).flatten(1)
    assert torch.equal(x[:, :2], KNOWN[:2].expand(DRAWS, 2))
    truth = prior.given(torch.eye(4).double()[:2], KNOWN[:2], 1e-6)
    free = type(truth)(truth.mean[2:], truth.covariance[2:, 2:])
    assert errors(x[:, 2:], free) == pytest.approx(stated, abs=0.01)


def test_the_denoiser_sees_known_cells_with_a_share_of_their_noise():
    x0, x, images, mask = states()
    inputs = []

    class Watched(Estimate):
        def __call__(self, x, t, **conditioning):
            inputs.append(x)
            return super().__call__(x, t, **conditioning)

    guide = KnownPixels(Watched(x0), images, mask, encode, decode, noise=0.25)
    known = guide(x, 1.0).x0  # a run begins, and nothing is remembered
    out = guide(x, 0.5)
    torch.testing.assert_close(inputs[1][:, :, 0], (0.5 * known + 0.25 * (x - 0.5 * known))[:, :, 0])
    assert torch.equal(inputs[0], x) and torch.equal(inputs[1][:, :, 1], x[:, :, 1])
    torch.testing.assert_close(out.eps[:, :, 0], (x - 0.5 * known)[:, :, 0] / 0.5)  # of the state itself
    guide(x, 1.0)  # another run
    guide(x[:1], 0.5)  # and another batch
    assert torch.equal(inputs[2], x) and torch.equal(inputs[3], x[:1])


def test_mistakes_are_named():
    x0, _, images, mask = states()
    with pytest.raises(UserError, match="noise: 1.5: the share of the known cells' noise must be from 0 to 1"):
        KnownPixels(Estimate(x0), images, mask, encode, decode, noise=1.5)
    with pytest.raises(UserError, match="mask: has the shape"):
        KnownPixels(Estimate(x0), images, mask[..., :4], encode, decode)
    with pytest.raises(UserError, match="task upscale: method known_pixels is of inpaint"):
        restoration("upscale", torch.zeros(1, 1, 7, 7), decode, [28, 28], method="known_pixels", encode=encode)


def test_restoration_passes_the_share_of_the_noise_on():
    x0, _, images, mask = states()
    how = {"method": "known_pixels", "encode": encode}
    for given, share in (({}, 0.5), ({"known_noise": 1.0}, 1.0)):
        plan = restoration("inpaint", images, decode, [6, 6], mask, **how, **given)
        assert plan.guide(Estimate(x0)).noise == share
