"""Translation: between Gaussians it is the known map, its ends meet, and images of a model go through it one by one."""

import numpy as np
import pytest
import torch
from exact import Gaussian, gaussian
from planted import Lying
from stripes import stripe_pixels
from tiny_runs import autoencoder_config, diffusion_config

from latentdiff import translation
from latentdiff.checkpoints import load
from latentdiff.data.transforms import Preprocess
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import Autoguidance
from latentdiff.models.codec import LatentCodec
from latentdiff.schedules import make_schedule
from latentdiff.training import train
from latentdiff.translation import (
    cycle_error,
    cycle_error_of_images,
    encode_images,
    interpolate,
    interpolate_images,
    translate,
    translate_images,
)
from latentdiff.utils.random import generators

A, B = gaussian(4, seed=3), gaussian(4, seed=8)


def exact(g: Gaussian, name: str) -> Denoiser:
    schedule = make_schedule(name)
    return Denoiser.from_score(lambda x, t: g.score(x, schedule, t), schedule)


def root(matrix: torch.Tensor, power: float = 0.5) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


def spread(g: Gaussian, schedule, t: float) -> torch.Tensor:
    return schedule.alpha(t) ** 2 * g.covariance + schedule.sigma(t) ** 2 * torch.eye(len(g.mean)).double()


def to_state(g: Gaussian, schedule, x0: torch.Tensor, t: float) -> torch.Tensor:
    """x_t of the ODE from x0: the whitened distance from the mean is kept, as all covariances on the path commute."""
    return schedule.alpha(t) * g.mean + (x0 - g.mean) @ root(g.covariance, -0.5) @ root(spread(g, schedule, t))


def to_data(g: Gaussian, schedule, x: torch.Tensor, t: float) -> torch.Tensor:
    return g.mean + (x - schedule.alpha(t) * g.mean) @ root(spread(g, schedule, t), -0.5) @ root(g.covariance)


def draw(g: Gaussian = A, n: int = 6, seed: int = 0) -> torch.Tensor:
    noise = torch.randn((n, len(g.mean)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g.mean + noise @ root(g.covariance)


def known(x0: torch.Tensor, names: tuple[str, str], strength: float = 1.0) -> torch.Tensor:
    """The exact translation from A to B at finite ends of the schedules."""
    before, after = (make_schedule(name) for name in names)
    if strength == 1:
        noise = to_state(A, before, x0, before.t_max) / before.prior_std
        return to_data(B, after, noise * after.prior_std, after.t_max)
    end = float(after.time_from_log_snr(before.log_snr(strength)))
    return to_data(B, after, to_state(A, before, x0, strength) / before.alpha(strength) * after.alpha(end), end)


@pytest.mark.parametrize("names", [("vp", "vp"), ("flow", "flow"), ("vp", "flow"), ("flow", "edm"), ("ddpm-linear", "subvp")])
def test_between_two_gaussians_it_is_the_known_map(names):
    x0 = draw()
    result = translate(exact(A, names[0]), exact(B, names[1]), x0, steps=100)
    torch.testing.assert_close(result, known(x0, names), rtol=0, atol=0.01)
    # Where the schedules end on pure noise: m' + C'^(1/2) C^(-1/2) (x - m)
    limit = B.mean + (x0 - A.mean) @ root(A.covariance, -0.5) @ root(B.covariance)
    torch.testing.assert_close(result, limit, rtol=0, atol=0.05)
    assert float((result - x0).abs().max()) > 1


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("names", [("flow", "flow"), ("vp", "flow"), ("flow", "edm")])
def test_below_full_strength_both_ways_meet_at_one_signal_to_noise_ratio(names, strength):
    x0 = draw()
    result = translate(exact(A, names[0]), exact(B, names[1]), x0, steps=200, strength=strength)
    torch.testing.assert_close(result, known(x0, names, strength), rtol=0, atol=0.01)


def test_the_error_falls_with_the_steps_and_little_strength_changes_little():
    x0, truth = draw(n=20), known(draw(n=20), ("flow", "flow"))
    errors = [float((translate(exact(A, "flow"), exact(B, "flow"), x0, steps=n) - truth).square().mean()) for n in (10, 20, 40)]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    moved = [translate(exact(A, "flow"), exact(B, "flow"), x0, strength=s) - x0 for s in (0.02, 0.3, 0.6, 1)]
    lengths = [float(each.norm()) for each in moved]
    assert lengths == sorted(lengths) and lengths[0] < 0.05 * lengths[-1]


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5, float("nan")])
def test_an_impossible_strength_is_refused(strength):
    with pytest.raises(UserError, match="strength: .*: must be above 0 and at most 1"):
        translate(exact(A, "flow"), exact(B, "flow"), draw(), strength=strength)


def test_each_sample_is_translated_on_its_own():
    way, x0 = (exact(A, "vp"), exact(B, "flow")), draw(n=4)
    together = translate(*way, x0, steps=8)
    torch.testing.assert_close(translate(*way, x0[2:3], steps=8), together[2:3], rtol=1e-9, atol=1e-9)


def test_the_cycle_closes_as_steps_are_added_and_sees_a_model_that_lies():
    x0 = draw(n=20)
    by_steps = [cycle_error(exact(A, "vp"), exact(B, "flow"), x0, steps=n) for n in (10, 40, 160)]
    assert by_steps[0].shape == (20,)
    means = [float(each.mean()) for each in by_steps]
    assert means[0] > 4 * means[1] > 16 * means[2] and means[2] < 0.01
    lying = Lying(exact(B, "flow"), score=0.9)
    assert float(cycle_error(exact(A, "vp"), lying, x0, steps=160).mean()) > 10 * means[2]


def test_an_interpolation_ends_on_its_ends_and_its_middle_is_known():
    a, b, schedule = draw(seed=1), draw(seed=2), make_schedule("vp")
    between = interpolate(exact(A, "vp"), a, b, [0.0, 0.25, 1.0], steps=100)
    assert between.shape == (3, *a.shape)
    torch.testing.assert_close(between[0], a, rtol=0, atol=0.01)
    torch.testing.assert_close(between[2], b, rtol=0, atol=0.01)
    noises = [to_state(A, schedule, x, schedule.t_max) for x in (a, b)]
    cosine = torch.nn.functional.cosine_similarity(*noises, dim=1)
    angle = torch.acos(cosine)[:, None]
    mixed = (torch.sin(0.75 * angle) * noises[0] + torch.sin(0.25 * angle) * noises[1]) / torch.sin(angle)
    torch.testing.assert_close(between[1], to_data(A, schedule, mixed, schedule.t_max), rtol=0, atol=0.01)
    elsewhere = interpolate(exact(A, "vp"), a, b, [0.0], target=exact(B, "vp"), steps=100)
    torch.testing.assert_close(elsewhere[0], known(a, ("vp", "vp")), rtol=0, atol=0.01)


# Images and pipelines


@pytest.fixture(scope="module")
def pipe(model):
    pipeline = load(model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def shipped():
    pipeline = load("weights/fashion-mnist")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def images():
    pixels = stripe_pixels(4, size=16)[0]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_images_go_one_by_one_and_to_the_class_that_is_named(pipe, images):
    names = pipe.class_names
    way = {"source": [names[0]], "steps": 4, "guidance": 2.0}
    result = translate_images(pipe, images, to=names[1:2], generator=generators(0, range(4)), **way)
    assert result.shape == images.shape and float(result.min()) >= -1 and float(result.max()) <= 1
    alone = translate_images(pipe, images[2:3], to=names[1:2], generator=generators(0, [2]), **way)
    torch.testing.assert_close(alone, result[2:3], rtol=1e-4, atol=1e-4)
    each = translate_images(pipe, images, to=[1, 1, 2, 1], generator=generators(0, range(4)), **way)
    torch.testing.assert_close(each[[0, 1, 3]], result[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert float((each[2] - result[2]).abs().max()) > 1e-3
    second = translate_images(pipe, images, to=names[1:2], into=pipe, generator=generators(0, range(4)), **way)
    none = translate_images(pipe, images, to=names[1:2], away=[None], generator=generators(0, range(4)), **way)
    assert torch.equal(second, none)
    assert float((none - result).abs().max()) > 1e-4  # guidance leads away from the source, where it is not told otherwise


def test_guidance_away_from_the_source_leaves_what_is_not_of_the_class():
    """Two Gaussian classes that differ in one entry: guidance moves that one alone; away from a third mean it moves both."""
    means = {"a": [0.0, 2.0], "b": [1.0, 2.0], "none": [0.5, 0.0]}
    of = {name: exact(Gaussian(torch.tensor(m).double(), 0.04 * torch.eye(2).double()), "flow") for name, m in means.items()}
    x0 = draw(Gaussian(torch.tensor(means["a"]).double(), 0.04 * torch.eye(2).double()), 50)
    guided = {name: Autoguidance(of["b"], of[name], 3.0) for name in ("a", "none")}
    away_from_source, away_from_none = (translate(of["a"], guided[name], x0, steps=60) for name in ("a", "none"))
    torch.testing.assert_close(away_from_source[:, 1], x0[:, 1], rtol=0, atol=0.02)
    assert float((away_from_none[:, 1] - x0[:, 1]).abs().mean()) > 0.5


def test_images_translated_to_what_they_are_come_back(shipped):
    """As far as the autoencoder keeps them, up to the solver's error."""
    sneaker = 2 * shipped(class_labels=["Sneaker"], generator=generators(3, [0]), output_type="pt").images - 1
    kept = translation.decode_latents(shipped, encode_images(shipped, sneaker, generators(0, [0])))
    way = {"steps": 4, "generator": generators(0, [0])}
    same = translate_images(shipped, sneaker, ["Sneaker"], ["Sneaker"], guidance=1.0, **way)
    torch.testing.assert_close(same, kept, rtol=0, atol=0.3)
    assert float((same - kept).square().mean()) < 0.002
    error = cycle_error_of_images(shipped, sneaker, ["Sneaker"], ["Ankle boot"], steps=4, generator=generators(0, [0]))
    assert error.shape == (1,) and 0.01 < float(error) < 0.5


def test_images_are_interpolated_from_the_first_to_the_second(pipe, images):
    way = {"what": [0], "steps": 3, "generator": generators(1, range(2))}
    strip = interpolate_images(pipe, images[:2], images[2:], [0.25, 0.5], **way)
    assert strip.shape == (2, 2, *images.shape[1:])
    draws = generators(1, range(2))
    ends = [encode_images(pipe, each, draws) for each in (images[:2], images[2:])]
    expected = interpolate(translation.conditional_denoiser(pipe, [0], 2, 1.0), *ends, [0.25, 0.5], steps=3)
    torch.testing.assert_close(strip[1], translation.decode_latents(pipe, expected[1]))
    with pytest.raises(UserError, match="3 classes or prompts for 2 images"):
        interpolate_images(pipe, images[:2], images[2:], [0.5], [0, 1, 0])


def test_the_border_of_training_is_put_around_images(shipped):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 1), dtype=np.uint8)
    padded = Preprocess((28, 28), 1, "pad", 8).batch(list(pixels), [False, False])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = LatentCodec(shipped.vae).latents(padded, generators(0, range(2)))
    assert torch.equal(encode_images(shipped, images, generators(0, range(2))), expected)


def test_what_cannot_be_translated_is_refused_in_one_line(pipe, images, stripe_folder, tmp_path):
    for arguments, said in (
        ({"to": ["plaid"]}, "unknown class 'plaid'; the classes are"),
        ({"to": [0, 1]}, "2 classes or prompts for 4 images"),
        ({"to": [0], "guidance": -1.0}, "guidance_scale -1"),
        ({"to": [0], "sampler": "ancestral"}, "does not encode; valid: heun"),
        ({"to": [0], "strength": 2.0}, "strength: 2"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            translate_images(pipe, images, [0], steps=2, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="images of 8x16: this model's are 16x16"):
        translate_images(pipe, images[:, :, :8], [0], [1])
    train(autoencoder_config(stripe_folder, tmp_path / "ae", train__steps=2))
    train(diffusion_config(stripe_folder, tmp_path / "other", tmp_path / "ae", train__steps=2))
    with pytest.raises(UserError, match="into: the two models have different autoencoders"):
        translate_images(pipe, images, [0], [1], into=load(tmp_path / "other" / "model"))
