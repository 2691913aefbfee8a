"""Calls with image=, strength= and mask_image=: what may change changes, what is known stays, at the right noise levels."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from test_scheduler_swaps import COUNT, MEAN, SHAPE, STD, STOCHASTIC, WORKING, pipe_of
from tiny_models import tiny_unet, tiny_vae
from tiny_stable import stable_parts

from latentdiff.pipelines.latent_diffusion import (
    LatentDiffusionPipeline,
    PipelineInputError,
    free_cells,
    noise_levels,
)

SIDE = 8
# First-order schedulers are off by up to 0.044 of a deviation of 0.6 at 30 steps, others by less than 0.03
OFF = 0.05
BIG = 5.0  # latents are this many times the pixels


class PlainVae(torch.nn.Module):
    """Latents are BIG times the pixels [B, c, h, w] in [-1, 1], with a posterior of deviation `std`."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, channels: int, std: float = 1e-9):
        super().__init__()
        self.std = std
        self.config = FrozenDict(in_channels=channels, block_out_channels=[1])

    def encode(self, images):
        log_var = torch.full_like(images, 2 * np.log(self.std))
        return AutoencoderKLOutput(DiagonalGaussianDistribution(torch.cat([BIG * images, log_var], 1)))

    def decode(self, latents):
        return DecoderOutput(latents / BIG)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_pipe(scheduler=None, **config):
    torch.manual_seed(0)
    names = {"class_names": ["a", "b", "c"], "null_class": 3, "prediction": "epsilon"}
    pipe = LatentDiffusionPipeline(
        tiny_unet(), tiny_vae(), scheduler or DDIMScheduler(clip_sample=False), **{**names, **config}
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(seed=0, channels=1, height=SIDE, width=SIDE):
    """Random pixels [1, C, H, W] in [0, 1], of 8 bits."""
    return (torch.rand(1, channels, height, width, generator=seeded(seed)) * 255).round() / 255


def half_mask(height=SIDE, width=SIDE):
    """The lower half is filled."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., height // 2 :, :] = 1
    return mask


CALL = {"class_labels": [1], "guidance_scale": 2.0, "num_inference_steps": 5, "output_type": "pt"}
WAYS = [None, "dpmpp_2m", "ddim", "heun"]


# --- strength -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", WAYS)
def test_at_strength_one_the_image_is_not_used(sampler):
    pipe = random_pipe()
    plain = pipe(**CALL, sampler=sampler, generator=seeded()).images
    changed = pipe(**CALL, sampler=sampler, generator=seeded(), image=picture(), strength=1.0).images
    assert torch.equal(plain, changed)


@pytest.mark.parametrize("sampler", WAYS)
def test_at_strength_zero_the_image_is_encoded_and_decoded(sampler):
    pipe = random_pipe()
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    drawn = torch.randn(1, 4, 4, 4, generator=(generator := seeded(3)))
    posterior = pipe.vae.encode(picture() * 2 - 1).latent_dist
    expected = pipe.decode_latents(posterior.mean + posterior.std * drawn, "pt")
    generator.manual_seed(3)
    found = pipe(**CALL, sampler=sampler, latents=noise, generator=generator, image=picture(), strength=0).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", WAYS)
def test_more_strength_goes_further_from_the_image_and_runs_more_steps(sampler):
    pipe = random_pipe()
    pipe.vae = PlainVae(4)
    image, distances, counts = picture(channels=4, height=4, width=4), [], []
    for strength in (0.2, 0.6, 1.0):
        seen = []
        found = pipe(
            **{**CALL, "num_inference_steps": 10},
            sampler=sampler,
            generator=seeded(),
            image=image,
            strength=strength,
            callback_on_step_end=lambda *a, seen=seen: seen.append(a[1]) or {},
        ).images
        distances.append(float((found - image).abs().mean()))
        counts.append(len(seen))
        assert seen == list(range(len(seen))) and pipe.num_timesteps == len(seen)
    assert distances == sorted(distances) and counts == [2, 6, 10]


@pytest.fixture
def quiet():
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    yield
    diffusers.utils.logging.set_verbosity(before)


@pytest.mark.parametrize("path", WORKING)
@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_images_of_the_data_keep_its_distribution_by_every_scheduler(path, strength, quiet):
    """The network is exact for data N(MEAN, STD^2), so noise on data and back again gives data.

    And a deterministic scheduler gives what the ODE makes of alpha data + sigma noise, at the time that the network is
    first given.
    """
    pipe = pipe_of(path)
    pipe.vae = PlainVae(SHAPE[0])
    own, schedule, first = pipe.scheduler, pipe.unet.schedule, []
    pipe.unet.register_forward_pre_hook(lambda net, inputs: first.append(float(torch.as_tensor(inputs[1]).reshape(-1)[0])))
    data, noise = MEAN + STD * torch.randn(COUNT, *SHAPE, generator=seeded(5)), torch.randn(COUNT, *SHAPE, generator=seeded(6))
    call = {"image": (data / BIG + 1) / 2, "strength": strength, "num_inference_steps": 30, "output_type": "latent"}
    ran = 0
    for name in sorted(WORKING[path] - {"PNDMScheduler"}):
        try:
            pipe.scheduler = getattr(diffusers, name).from_config(own.config)
        except (ImportError, TypeError, ValueError):  # needs torchsde, or things that no config has
            continue
        first.clear()
        found = pipe(**call, latents=noise, generator=seeded(7)).images
        t = schedule.time_from_timestep(torch.tensor(first[0], dtype=torch.float64)).clamp(max=schedule.t_max)
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        width = (alpha**2 * STD**2 + sigma**2) ** 0.5
        expected = MEAN + STD / width * (alpha * (data - MEAN) + sigma * noise)
        if "LCM" not in name:  # made for networks that are distilled for it
            assert abs(found.mean() - MEAN) < 0.06 and abs(found.std() - STD) < 0.12, (name, found.mean(), found.std())
        if name not in STOCHASTIC:
            assert (found - expected).abs().mean() < OFF, (name, (found - expected).abs().mean())
        ran += 1
    pipe.scheduler = own
    by_sampler = pipe(**call, sampler="dpmpp_2m", generator=seeded(7)).images
    assert abs(by_sampler.mean() - MEAN) < 0.06 and abs(by_sampler.std() - STD) < 0.06
    assert ran >= 2


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp_2m_sde", "dopri5", "predictor_corrector", "annealed_langevin"])
def test_images_of_the_data_keep_its_distribution_by_samplers(sampler):
    pipe = pipe_of("vp")
    pipe.vae = PlainVae(SHAPE[0])
    data = MEAN + STD * torch.randn(COUNT, *SHAPE, generator=seeded(5))
    call = {"image": (data / BIG + 1) / 2, "strength": 0.5, "num_inference_steps": 60, "output_type": "latent"}
    found = pipe(**call, sampler=sampler, generator=seeded()).images
    assert abs(found.mean() - MEAN) < 0.06 and abs(found.std() - STD) < 0.08


def test_a_scheduler_that_cannot_begin_in_the_middle_is_refused():
    pipe = random_pipe(PNDMScheduler(skip_prk_steps=True))
    pipe(**CALL, generator=seeded())
    with pytest.raises(PipelineInputError, match="PNDMScheduler cannot change images"):
        pipe(**CALL, image=picture())


def test_levels_are_those_of_add_noise():
    for scheduler in (DDIMScheduler(), DPMSolverMultistepScheduler(), diffusers.EulerDiscreteScheduler()):
        scheduler.set_timesteps(7)
        levels = noise_levels(scheduler)
        for k, timestep in enumerate(scheduler.timesteps):
            one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
            factors = [scheduler.add_noise(a, b, timestep[None]).item() for a, b in ((one, zero), (zero, one))]
            assert levels[k] == pytest.approx(factors, rel=1e-4)
        assert levels[-1] == (1.0, 0.0) and len(levels) == len(scheduler.timesteps) + 1


# --- the mask -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "strength"), [*((way, s) for way in [*WAYS, "ancestral"] for s in (1.0, 0.6)), ("dopri5", 0.3)]
)
def test_known_pixels_stay_exactly(sampler, strength):
    pipe = random_pipe()
    image, mask = picture(), half_mask()
    call = {**CALL, "sampler": sampler, "image": image, "mask_image": mask, "strength": strength, "generator": seeded()}
    found = pipe(**call).images
    known = mask < 0.5
    assert torch.equal(found[known], image[known])
    assert (found[~known] - image[~known]).abs().max() > 1e-2
    array = np.round(image[0, 0].numpy() * 255).astype(np.uint8)
    pictures = {"image": Image.fromarray(array), "mask_image": Image.fromarray((mask[0, 0].numpy() * 255).astype(np.uint8))}
    (made,) = pipe(**{**call, **pictures, "output_type": "pil", "generator": seeded()}).images
    assert made.mode == "L" and np.array_equal(np.asarray(made)[:4], array[:4])
    assert np.array_equal(np.asarray(made), np.round(found[0, 0].numpy() * 255).astype(np.uint8))
    as_array = pipe(**{**call, "output_type": "np", "generator": seeded()}).images
    assert np.array_equal(as_array[0, :4, :, 0], image[0, 0, :4].numpy())


@pytest.mark.parametrize("sampler", WAYS)
def test_masked_pixels_change_nothing(sampler):
    pipe, mask = random_pipe(), half_mask()
    one, other = picture(1), picture(1)
    other[..., 4:, :] = picture(2)[..., 4:, :]
    call = {**CALL, "sampler": sampler, "mask_image": mask, "mask_margin": 0}  # else no cell of the 4x4 would be known
    found = [pipe(**call, image=each, generator=seeded()).images for each in (one, other)]
    assert torch.equal(*found)
    weaker = [pipe(**call, image=each, generator=seeded(), strength=0.6).images for each in (one, other)]
    assert (weaker[0] - weaker[1])[..., 4:, :].abs().max() > 1e-3  # below strength 1 they are what it starts from


@pytest.mark.parametrize("sampler", WAYS)
def test_known_latents_keep_to_their_path_and_free_ones_do_not(sampler):
    pipe = random_pipe()
    pipe.vae, seen = PlainVae(4), []
    image, mask = picture(channels=4, height=4, width=4), half_mask(4, 4)
    noise = torch.randn(1, 4, 4, 4, generator=seeded(4))

    def watch(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call = {**CALL, "image": image, "mask_image": mask, "mask_margin": 1, "latents": noise, "generator": seeded()}
    pipe(**call, sampler=sampler, callback_on_step_end=watch)
    z = BIG * (2 * image - 1)[0, :, 0]  # the only row that the mask and its margin leave
    for latents in seen:
        # Each is alpha z + sigma noise: the two factors fit all entries of the row
        pairs = torch.stack([z.flatten(), noise[0, :, 0].flatten()], 1)
        factors = torch.linalg.lstsq(pairs, latents[0, :, 0].reshape(-1, 1)).solution
        torch.testing.assert_close(pairs @ factors, latents[0, :, 0].reshape(-1, 1), atol=2e-3, rtol=0)
    torch.testing.assert_close(seen[-1][0, :, 0], z, atol=0.05, rtol=0)
    outside = torch.stack([(BIG * (2 * image - 1))[0, :, 3].flatten(), noise[0, :, 3].flatten()], 1)
    fit = outside @ torch.linalg.lstsq(outside, seen[-1][0, :, 3].reshape(-1, 1)).solution
    assert (fit - seen[-1][0, :, 3].reshape(-1, 1)).abs().max() > 0.1


@pytest.mark.parametrize("sampler", [None, "ddim", "dpmpp_2m_sde"])
def test_an_interrupted_call_keeps_what_is_known(sampler):
    pipe = random_pipe()
    pipe.vae = PlainVae(4)
    image, mask = picture(channels=4, height=4, width=4), half_mask(4, 4)

    def stop(pipe, step, t, tensors):
        pipe._interrupt = step == 1

    call = {**CALL, "image": image, "mask_image": mask, "mask_margin": 0, "sampler": sampler, "callback_on_step_end": stop}
    latents = pipe(**{**call, "output_type": "latent"}, generator=seeded()).images
    torch.testing.assert_close(latents[..., :2, :], BIG * (2 * image - 1)[..., :2, :], atol=1e-4, rtol=0)
    assert torch.equal(pipe(**call, generator=seeded()).images[..., :2, :], image[..., :2, :])


def test_free_cells_are_those_that_the_mask_touches_and_a_margin():
    mask = torch.zeros(1, 1, 12, 16)
    mask[0, 0, 4, 7] = 1
    assert free_cells(mask, (6, 8), 0).nonzero()[:, 2:].tolist() == [[2, 3]]
    around = free_cells(mask, (6, 8), 1).nonzero()[:, 2:].tolist()
    assert around == [[r, c] for r in (1, 2, 3) for c in (2, 3, 4)]
    assert not free_cells(torch.full((1, 1, 12, 16), 0.4), (6, 8), 1).any()


def test_the_border_of_training_is_known(monkeypatch):
    """Images of 6x6 lie in the middle of 8x8 whose border is black, as training pads them."""
    pipe, seen = random_pipe(image_size=(6, 6)), []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda images: seen.append(images) or encode(images))
    image, mask = picture(height=6, width=6), half_mask(6, 6)
    found = pipe(**CALL, image=image, mask_image=mask, generator=seeded()).images
    assert found.shape == (1, 1, 6, 6) and torch.equal(found[..., :3, :], image[..., :3, :])
    (given,) = seen
    expected = torch.full((1, 1, 8, 8), -1.0)
    expected[..., 1:7, 1:7] = torch.where(mask > 0.5, 0.0, image * 2 - 1)
    torch.testing.assert_close(given, expected)


# --- batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m_sde"])
@pytest.mark.parametrize("mask", [None, half_mask()])
def test_an_image_is_the_same_at_any_batch_size(sampler, mask):
    pipe = random_pipe()
    images = torch.cat([picture(k) for k in range(3)])
    call = {**CALL, "sampler": sampler, "mask_image": mask, "strength": 0.6}
    together = pipe(**{**call, "class_labels": [0, 1, 2]}, image=images, generator=[seeded(k) for k in range(3)]).images
    for k in range(3):
        alone = pipe(**{**call, "class_labels": [k]}, image=images[k], generator=[seeded(k)]).images
        torch.testing.assert_close(alone[0], together[k], atol=2e-5, rtol=0)


def test_images_prompts_and_repeats_go_together():
    pipe = random_pipe()
    images = [picture(k)[0] for k in range(2)]
    call = {**CALL, "mask_image": half_mask(), "generator": seeded()}
    one_class = pipe(**call, image=images).images
    assert len(one_class) == 2 and all(torch.equal(one_class[k, :, :4], images[k][:, :4]) for k in range(2))
    repeated = pipe(**call, image=images, num_images_per_label=2).images
    assert len(repeated) == 4 and torch.equal(repeated[1, :, :4], images[0][:, :4])
    assert len(pipe(**{**call, "class_labels": [0, 1, 2]}, image=images[0]).images) == 3
    two_masks = torch.cat([half_mask(), 1 - half_mask()])
    both = pipe(**{**call, "mask_image": two_masks}, image=images[0]).images
    assert torch.equal(both[0, :, :4], images[0][:, :4]) and torch.equal(both[1, :, 4:], images[0][:, 4:])
    with pytest.raises(PipelineInputError, match="2 images and 3 prompts or class_labels"):
        pipe(**{**call, "class_labels": [0, 1, 2]}, image=images)
    with pytest.raises(PipelineInputError, match="mask_image: 2 for 3 images"):
        pipe(**{**call, "mask_image": two_masks}, image=[*images, images[0]])


def test_forms_of_an_image():
    pipe = random_pipe()
    image = picture()
    array = image[0].permute(1, 2, 0).numpy()
    grey = Image.fromarray(np.round(array[..., 0] * 255).astype(np.uint8))
    call = {**CALL, "strength": 0.4}
    expected = pipe(**call, image=image, generator=seeded()).images
    for form in (grey, [grey], image[0], [image[0]], array, array[None], array[..., 0], (image[0] * 255).round().byte()):
        found = pipe(**call, image=form, generator=seeded()).images
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    number = pipe(**{**call, "strength": np.float32(0.4)}, image=image, generator=seeded()).images
    assert torch.equal(number, expected)
    larger = grey.resize((20, 30)).convert("RGB")
    assert pipe(**call, image=larger).images.shape == (1, 1, 8, 8)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))  # what is transparent counts as white
    white = pipe(**call, image=torch.ones(1, 1, 8, 8), generator=seeded()).images
    torch.testing.assert_close(pipe(**call, image=clear, generator=seeded()).images, white, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m"])
def test_a_larger_canvas_continues_an_image(sampler):
    pipe = random_pipe()
    canvas = torch.zeros(1, 1, 8, 14)
    canvas[..., 3:11] = picture()
    mask = torch.ones(1, 1, 8, 14)
    mask[..., 3:11] = 0
    call = {**CALL, "sampler": sampler, "height": 8, "width": 14}
    found = pipe(**call, image=canvas, mask_image=mask, generator=seeded()).images
    assert found.shape == (1, 1, 8, 14) and torch.equal(found[..., 3:11], picture())
    assert pipe(**call, generator=seeded()).images.shape == (1, 1, 8, 14)
    with pytest.raises(PipelineInputError, match=r"\(1, 8, 8\): this call needs \(1, 8, 14\)"):
        pipe(**call, image=picture())


def test_unconditional_models_change_images():
    pipe = LatentDiffusionPipeline(tiny_unet(num_class_embeds=None), tiny_vae(), DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    found = pipe(image=[picture()[0], picture(1)[0]], mask_image=half_mask(), num_inference_steps=3, output_type="pt").images
    assert found.shape == (2, 1, 8, 8) and torch.equal(found[0, :, :4], picture()[0, :, :4])


# --- beside diffusers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable():
    """The parts of a small Stable Diffusion, whose posterior draws are its means."""
    parts = stable_parts()
    with torch.no_grad():
        parts["vae"].quant_conv.bias[4:] = -60.0
        parts["vae"].quant_conv.weight[4:] = 0.0
    extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return parts, extra


def pipes_of(stable, kind):
    parts, extra = stable
    pipes = [LatentDiffusionPipeline(**parts), kind(**parts, **extra)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    return pipes


TEXT = {"prompt": "a picture of blank stripes", "guidance_scale": 3.0, "num_inference_steps": 10, "output_type": "np"}


def test_img2img_gives_the_numbers_of_diffusers(stable):
    ours, theirs = pipes_of(stable, StableDiffusionImg2ImgPipeline)
    image = picture(channels=3, height=16, width=16)
    generator = seeded()
    torch.randn(1, 4, 8, 8, generator=generator)  # diffusers draws from the posterior before it draws the noise
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    expected = theirs(**TEXT, image=image, strength=0.6, generator=seeded()).images
    found = ours(**TEXT, image=image, strength=0.6, latents=noise).images
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_inpainting_gives_the_numbers_of_diffusers(stable):
    ours, theirs = pipes_of(stable, StableDiffusionInpaintPipeline)
    image, mask = picture(channels=3, height=16, width=16), half_mask(16, 16)
    image[..., 8:, :] = 0.5  # mid-grey: what is masked in ours
    generator = seeded()
    torch.randn(1, 4, 8, 8, generator=generator)  # as above
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    # Not at strength 1, where theirs starts the known cells from pure noise instead of their own noisy latents
    call = {**TEXT, "image": image, "mask_image": mask, "strength": 0.8}
    expected = theirs(**call, generator=seeded()).images
    found = ours(**call, mask_margin=0, latents=noise).images
    np.testing.assert_allclose(found[:, 8:], expected[:, 8:], atol=2e-4)
    assert np.array_equal(found[:, :8], image[..., :8, :].permute(0, 2, 3, 1).numpy())


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(strength=0.5), "strength: goes with image="),
        (dict(mask_image=half_mask()), "mask_image: goes with image="),
        (dict(image=picture(), strength=1.5), "strength 1.5: must be from 0"),
        (dict(image=picture(), strength=float("nan")), "strength nan: must be"),
        (dict(image=picture(), strength="much"), "strength much: must be"),
        (dict(image=picture(), mask_margin=1), "mask_margin: goes with mask_image="),
        (dict(image=picture(), mask_image=half_mask(), mask_margin=-1), "mask_margin -1: must be a whole number"),
        (dict(image=picture(channels=3)), r"image of \(channels, height, width\) \(3, 8, 8\): this call needs \(1, 8, 8\)"),
        (dict(image=picture() * 2 - 1), "image: its values must be from 0 to 1"),
        (dict(image=picture() * float("nan")), "image: its values must be from 0 to 1"),
        (dict(image=[]), "image: is an empty list"),
        (dict(image="a.png"), "image: must be a PIL image"),
        (dict(image=picture(), mask_image=picture(channels=3)), r"mask_image of .* needs \(1, 8, 8\)"),
        (dict(image=[picture()] * 2, class_labels=[0, 1, 2]), "2 images and 3 prompts"),
        (dict(height=0), "height 0: must be a whole number"),
        (dict(width=8.5), "width 8.5: must be a whole number"),
        (dict(image=picture(), sampler="ddim", sampler_options={"start": "state"}), "start is taken by image="),
    ],
)
def test_a_call_that_cannot_be_answered_says_so_in_one_line(call, message):
    pipe = random_pipe()
    with pytest.raises(ValueError, match=message) as error:
        pipe(**{**CALL, **call})
    assert len(str(error.value).splitlines()) == 1


def test_a_damaged_encoder_is_named():
    pipe = random_pipe()
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight[0] = float("nan")
    with pytest.raises(ValueError, match="encoder: its output is not finite; its weight encoder.conv_in.weight"):
        pipe(**CALL, image=picture())
