"""Operators on images against what they are by definition."""

import pytest
import torch
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.guidance import Blur, Downsample, Grey, Mask, of_latents
from latentdiff.guidance.operators import LUMA, centre

SHAPE = (3, 3, 8, 12)  # B == C


def images(seed=0, shape=SHAPE):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def masks():
    """Another hidden rectangle in each sample, [3, 1, 8, 12]; white is 1."""
    mask = torch.zeros(3, 1, 8, 12)
    for i in range(3):
        mask[i, :, i : i + 4, 2 * i : 2 * i + 5] = 1
    return mask


OPERATORS = {"mask": Mask(masks()), "upscale": Downsample(4), "blur": Blur(1.2), "grey": Grey()}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_linear_and_can_be_differentiated_twice(name):
    operator, one, other = OPERATORS[name], images(1), images(2)
    torch.testing.assert_close(operator(2 * one - 3 * other), 2 * operator(one) - 3 * operator(other))
    at = one.clone().requires_grad_()
    (slope,) = torch.autograd.grad(operator(at).square().sum(), at, create_graph=True)
    (second,) = torch.autograd.grad((slope * other).sum(), at)  # 2 A^T A other
    torch.testing.assert_close((second * other).sum(), 2 * operator(other).square().sum())


@pytest.mark.parametrize("name", ["upscale", "blur", "grey"])
def test_a_sample_alone_is_that_sample_in_a_batch(name):
    operator, x = OPERATORS[name], images()
    for i in range(3):
        torch.testing.assert_close(operator(x[i : i + 1])[0], operator(x)[i])


@pytest.mark.parametrize("name", ["mask", "upscale", "grey"])
def test_projected_images_agree_with_the_observation_and_a_second_time_nothing_changes(name):
    operator, x, y = OPERATORS[name], images(1), OPERATORS[name](images(2))
    projected = operator.project(x, y)
    torch.testing.assert_close(operator(projected), y)
    torch.testing.assert_close(operator.project(projected, y), projected)
    torch.testing.assert_close(operator.project(images(2), y), images(2))  # nothing to change
    assert not torch.allclose(operator(x), y)


def test_white_of_the_mask_is_hidden_and_known_pixels_are_pasted_exactly():
    x, other = images(1), images(2)
    y = Mask(masks())(x)
    hidden = masks().expand(SHAPE).bool()
    assert bool((y[hidden] == 0).all()) and torch.equal(y[~hidden], x[~hidden])
    pasted = Mask(masks()).project(other, y)
    assert torch.equal(pasted[~hidden], x[~hidden]) and torch.equal(pasted[hidden], other[hidden])
    assert torch.equal(Mask(masks()[0, 0])(x[:1]), y[:1])


def test_a_lower_resolution_is_the_mean_of_squares():
    x = images()
    assert Downsample(4)(x).shape == (3, 3, 2, 3)
    torch.testing.assert_close(Downsample(4)(x)[1, 2, 1, 2], x[1, 2, 4:8, 8:12].mean())


def test_a_blur_is_a_gaussian_of_its_width_and_keeps_a_constant_image():
    point = torch.zeros(1, 1, 41, 41)
    point[..., 20, 20] = 1
    spot = Blur(2.0)(point)[0, 0].double()
    place = torch.arange(-20, 21).double()
    assert float(spot.sum()) == pytest.approx(1)
    for share in (spot.sum(0), spot.sum(1)):
        assert float((share * place**2).sum()) == pytest.approx(4, abs=1e-3)  # the variance along each axis
    torch.testing.assert_close(Blur(2.0)(torch.full(SHAPE, 0.3)), torch.full(SHAPE, 0.3))


def test_grey_is_pillows():
    from PIL import Image

    pixels = (images(shape=(1, 3, 8, 8)) * 127.5 + 127.5).round()
    picture = Image.fromarray(pixels[0].permute(1, 2, 0).byte().numpy())
    grey = torch.tensor(list(picture.convert("L").getdata())).reshape(8, 8)
    assert (Grey()(pixels)[0, 0] - grey).abs().max() <= 1 and sum(LUMA) == pytest.approx(1)


def test_the_border_of_training_is_cut_off_before_the_operator():
    padded = F.pad(images(), (2, 2, 2, 2), value=5.0)
    assert torch.equal(centre(padded, (8, 12)), images())
    observe = of_latents(Downsample(4), lambda z: F.pad(z, (2, 2, 2, 2), value=5.0), (8, 12))
    torch.testing.assert_close(observe(images()), Downsample(4)(images()))


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: Mask(torch.zeros(3, 3, 8, 12)), r"mask: has the shape \[3, 3, 8, 12\]"),
        (lambda: Mask(torch.zeros(8, 8))(images()), "mask: is 8x8 and the image 8x12"),
        (lambda: Downsample(0), "factor: 0 must be at least 1"),
        (lambda: Downsample(5)(images()), "factor: 5 does not divide the sides of the image, 8x12"),
        (lambda: Blur(0.0), "blur: a standard deviation of 0.0 pixels"),
        (lambda: Grey()(images(shape=(1, 1, 8, 8))), "grey: the images have 1 channels"),
    ],
)
def test_mistakes_are_named(make, said):
    with pytest.raises(UserError, match=said):
        make()
