import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from tiny_models import PictureVae, PointMassNet, tiny_unet, tiny_vae

from latentdiff import samplers
from latentdiff.generation import set_precision
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, PipelineInputError, denormalise

NAMES = ["Trouser", "Bag", "7"]
# one point for each class and the null class, another value in each of five channels: all of them must be guided
POINTS = torch.linspace(-1, 1, 20).reshape(4, 5).roll(3, 0)
LEADING = dict(timestep_spacing="leading")
EXACT = dict(clip_sample=False, set_alpha_to_one=True)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def point_pipe(scheduler=None, vae=None, **config):
    """A pipeline whose network knows the answer: class k's latents are POINTS[k], the null class's POINTS[3]."""
    scheduler = scheduler or DDIMScheduler(**EXACT)
    net = PointMassNet(POINTS, getattr(scheduler, "alphas_cumprod", None))
    config = {"class_names": NAMES, "null_class": 3, **config}
    pipe = LatentDiffusionPipeline(net, vae or PictureVae(torch.zeros(1, 4, 6)), scheduler, **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def random_pipe(scheduler=None, **config):
    torch.manual_seed(0)
    config = {"class_names": NAMES, "null_class": 3, **config}
    pipe = LatentDiffusionPipeline(tiny_unet(), tiny_vae(), scheduler or DDIMScheduler(clip_sample=False), **config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, **call):
    return pipe(generator=call.pop("generator", seeded()), output_type="latent", **call).images


def expected(rows, scale=1.0):
    """The points of some rows, guided: null + scale (point - null), exact as the network's output is linear in them."""
    guided = POINTS[3] + scale * (POINTS[rows] - POINTS[3])  # [B, c]
    return guided[:, :, None, None].expand(-1, -1, 2, 3)


# --- conditioning and guidance ---------------------------------------------------------------------------------------


def test_labels_by_name_number_numeral_and_none():
    latents = latents_of(point_pipe(), class_labels=["Bag", 0, "7", None, "1"], num_inference_steps=4)
    torch.testing.assert_close(latents, expected([1, 0, 2, 3, 1]), atol=1e-4, rtol=0)
    single = latents_of(point_pipe(), class_labels="Bag", num_images_per_label=3, num_inference_steps=4)
    torch.testing.assert_close(single, expected([1, 1, 1]), atol=1e-4, rtol=0)
    tensor = latents_of(point_pipe(), class_labels=torch.tensor([2, 0]), num_images_per_label=2, num_inference_steps=4)
    torch.testing.assert_close(tensor, expected([2, 2, 0, 0]), atol=1e-4, rtol=0)
    nothing = latents_of(point_pipe(), num_images_per_label=2, num_inference_steps=4)
    torch.testing.assert_close(nothing, expected([3, 3]), atol=1e-4, rtol=0)


SCHEDULERS = [
    DDIMScheduler(**EXACT),
    DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", **EXACT),
    DDPMScheduler(clip_sample=False),
    DPMSolverMultistepScheduler(),
    UniPCMultistepScheduler(),
    EulerDiscreteScheduler(**LEADING),
    HeunDiscreteScheduler(**LEADING),
    EulerAncestralDiscreteScheduler(**LEADING),
    FlowMatchEulerDiscreteScheduler(),
]


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_any_scheduler_ends_on_the_guided_point_in_every_channel(scheduler, scale):
    pipe = point_pipe(scheduler)
    latents = latents_of(pipe, class_labels=[0, 1, None], guidance_scale=scale, num_inference_steps=10)
    # multistep solvers stop at their last noise level, within a hundredth of the data
    torch.testing.assert_close(latents, expected([0, 1, 3], scale), atol=0.03, rtol=0)


def test_guidance_is_one_forward_of_twice_the_batch_and_off_at_one():
    pipe = point_pipe()
    latents_of(pipe, class_labels=[0, 2], guidance_scale=3.0, num_inference_steps=2)
    assert [labels for _, labels in pipe.unet.calls] == [[0, 2, 3, 3]] * 2
    pipe.unet.calls.clear()
    latents_of(pipe, class_labels=[0, 2], guidance_scale=1.0, num_inference_steps=2)
    assert [labels for _, labels in pipe.unet.calls] == [[0, 2]] * 2


@pytest.mark.parametrize(
    "scheduler, times",
    [
        # levels 750, 500, 250, 0 of 1000, the first being t = 1/1000; flow counts 1000 t itself
        (DDIMScheduler(timestep_spacing="leading"), [0.751, 0.501, 0.251, 0.001]),
        (FlowMatchEulerDiscreteScheduler(), [1.0, 0.667, 0.334, 0.001]),
    ],
)
def test_the_guidance_interval_is_in_t(scheduler, times):
    for low, high in [(0.3, 0.7), (0.0, 0.3), (0.7, 1.0), (times[1] - 1e-6, times[1] + 1e-6)]:
        pipe = point_pipe(scheduler)
        latents_of(pipe, class_labels=[1], guidance_scale=2.0, guidance_interval=(low, high), num_inference_steps=4)
        guided = [len(labels) == 2 for _, labels in pipe.unet.calls]
        assert guided == [low <= t <= high for t in times]
        assert any(guided)


@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_the_checkpoints_interval_holds_until_the_call_says_otherwise(sampler):
    pipe = point_pipe(DDIMScheduler(timestep_spacing="leading"), default_guidance_interval=(0.3, 0.8))
    call = dict(class_labels=[1], guidance_scale=2.0, num_inference_steps=4, sampler=sampler)

    def guided(**more):
        pipe.unet.calls.clear()
        latents_of(pipe, **call, **more)
        return sum(len(labels) == 2 for _, labels in pipe.unet.calls)

    assert 0 < guided() == guided(guidance_interval=(0.3, 0.8)) < guided(guidance_interval=(0.0, 1.0)) == 4


def test_the_checkpoints_defaults_hold_until_the_call_says_otherwise():
    pipe = point_pipe(default_guidance_scale=3.0, default_num_inference_steps=6)
    torch.testing.assert_close(latents_of(pipe, class_labels=[1]), expected([1], 3.0), atol=1e-4, rtol=0)
    assert len(pipe.unet.calls) == 6
    latents = latents_of(pipe, class_labels=[1], guidance_scale=1.0, num_inference_steps=2)
    torch.testing.assert_close(latents, expected([1]), atol=1e-4, rtol=0)
    assert len(pipe.unet.calls) == 8
    # there is nothing to guide an unconditional image towards, so the default does not apply
    torch.testing.assert_close(latents_of(pipe), expected([3]), atol=1e-4, rtol=0)


# --- latentdiff's own samplers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler(), FlowMatchEulerDiscreteScheduler()], ids=["vp", "flow"])
@pytest.mark.parametrize("sampler", samplers.names())
def test_any_sampler_ends_on_the_guided_point(sampler, scheduler):
    pipe = point_pipe(scheduler)
    generator = [seeded(i) for i in range(3)]
    call = dict(class_labels=[0, 1, None], num_inference_steps=8, generator=generator)
    torch.testing.assert_close(latents_of(pipe, **call, sampler=sampler), expected([0, 1, 3]), atol=2e-3, rtol=0)
    guided = latents_of(pipe, **call, sampler=sampler, guidance_scale=2.5)
    torch.testing.assert_close(guided, expected([0, 1, 3], 2.5), atol=2e-3, rtol=0)


def test_a_sampler_that_wants_more_steps_than_the_default_takes_them_unless_told():
    pipe = point_pipe(default_num_inference_steps=6)
    assert samplers.default_steps("predictor_corrector", 6) == 50
    for sampler, evaluations in (("euler", 6), ("euler_maruyama", 50), ("reverse_diffusion", 100)):
        assert samplers.default_steps(sampler, 6) == evaluations and samplers.default_steps(sampler, 200) == 200
        for asked, done in ((None, evaluations), (4, 4)):
            pipe.unet.calls.clear()
            latents_of(pipe, class_labels=[1], sampler=sampler, num_inference_steps=asked)
            assert len(pipe.unet.calls) == done


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_our_ddim_is_the_schedulers_ddim(prediction):
    pipe = random_pipe(DDIMScheduler(prediction_type=prediction, timestep_spacing="leading", **EXACT))
    call = dict(class_labels=[0, 1], num_inference_steps=5, guidance_scale=2.0, guidance_interval=(0.3, 0.7))
    theirs = latents_of(pipe, **call)
    ours = latents_of(pipe, **call, sampler="ddim", sampler_options={"grid": "leading"})
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    everywhere = latents_of(pipe, **{**call, "guidance_interval": None}, sampler="ddim")
    assert (everywhere - ours).abs().max() > 1e-3


def test_the_checkpoints_schedule_and_prediction_come_before_the_schedulers():
    call = dict(class_labels=[0, 1], num_inference_steps=4, sampler="euler")
    plain = random_pipe(DDIMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear"))
    stated = random_pipe(
        UniPCMultistepScheduler(),
        prediction="v_prediction",
        schedule={"name": "ddpm-scaled-linear", "beta_start": 0.0001, "beta_end": 0.02},
    )
    torch.testing.assert_close(latents_of(stated, **call), latents_of(plain, **call))


def test_options_and_callback_reach_the_sampler():
    pipe, seen = random_pipe(), []
    call = dict(class_labels=[0], num_inference_steps=4, sampler="ddim")

    def watch(pipe, step, t, tensors):
        seen.append((step, t))
        return {"latents": tensors["latents"] * 0} if step == 0 else None

    plain = latents_of(pipe, **call)
    assert (latents_of(pipe, **call, sampler_options={"eta": 1.0}) - plain).abs().max() > 1e-3
    assert (latents_of(pipe, **call, callback_on_step_end=watch) - plain).abs().max() > 1e-3
    assert [step for step, _ in seen] == list(range(len(seen))) and all(0 <= t <= 1 for _, t in seen)
    with pytest.raises(ValueError, match="churn"):
        pipe(**call, sampler_options={"churn": 1.0})
    with pytest.raises(ValueError, match="dpmpp_2m"):
        pipe(class_labels=[0], sampler="dpm")


# --- randomness ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [DDIMScheduler(clip_sample=False), DDPMScheduler(clip_sample=False)])
def test_an_image_is_the_same_at_any_batch_size(scheduler):
    pipe = random_pipe(scheduler)
    call = dict(guidance_scale=2.0, num_inference_steps=5, output_type="pt")
    together = pipe(class_labels=[0, 1, 2], generator=[seeded(i) for i in range(3)], **call).images
    for i in range(3):
        alone = pipe(class_labels=[i], generator=[seeded(i)], **call).images
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_given_latents_are_the_starting_noise():
    noise = torch.randn(2, 4, 4, 4, generator=seeded(5))
    pipe = random_pipe(EulerDiscreteScheduler())
    given = latents_of(pipe, class_labels=[0, 1], num_inference_steps=3, latents=noise)
    drawn = latents_of(pipe, class_labels=[0, 1], num_inference_steps=3, generator=seeded(5))
    assert torch.equal(given, drawn)


# --- latents to pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, box", [((4, 3), (1, 2)), ((6, 8), (0, 0)), ((5, 8), (0, 0)), (None, (0, 0))])
def test_the_padded_border_is_cut_off(size, box):
    picture = torch.arange(48.0).reshape(1, 6, 8) / 48
    pipe = point_pipe(vae=PictureVae(picture), image_size=size)
    images = pipe(class_labels=0, num_inference_steps=1, output_type="pt").images
    height, width = size or (6, 8)
    content = picture[:, box[0] : box[0] + height, box[1] : box[1] + width]
    torch.testing.assert_close(images[0], content / 2 + 0.5)


@pytest.mark.parametrize(
    "config",
    [
        dict(scaling_factor=0.5),
        dict(scaling_factor=0.5, shift_factor=0.25),
        dict(scaling_factor=2.0, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[0.5, 1.0, 2.0, 4.0]),
    ],
)
def test_denormalising_undoes_what_training_did(config):
    codec = LatentCodec(tiny_vae(**config))
    raw = torch.randn(2, 4, 4, 4, generator=seeded()) * 3 + 1
    torch.testing.assert_close(denormalise(codec.normalise(raw), codec.vae.config), raw)


def test_the_decoder_gets_the_raw_latents():
    vae = PictureVae(torch.zeros(3, 4, 6), scaling_factor=0.5, shift_factor=0.25)
    pipe = point_pipe(vae=vae)
    pipe(class_labels=[1], num_inference_steps=4, output_type="np")
    torch.testing.assert_close(vae.decoded, expected([1]) / 0.5 + 0.25, atol=1e-4, rtol=0)


def test_output_types():
    grey, colour = PictureVae(torch.full((1, 4, 6), 0.5)), PictureVae(torch.tensor([-9.0, 0.0, 9.0])[:, None, None])
    colour.picture.data = colour.picture.expand(3, 4, 6)
    call = dict(class_labels=[0, 1], num_inference_steps=1)
    images = point_pipe(vae=grey)(**call).images
    assert all(isinstance(i, PIL.Image.Image) and i.mode == "L" and i.size == (6, 4) for i in images)
    assert np.asarray(images[0]).tolist() == [[191] * 6] * 4  # (0.5 + 1) / 2 * 255
    images = point_pipe(vae=colour)(**call).images
    assert images[0].mode == "RGB" and images[0].getpixel((0, 0)) == (0, 128, 255)
    (array,) = point_pipe(vae=colour)(**call, output_type="np", return_dict=False)
    assert array.shape == (2, 4, 6, 3) and array.dtype == np.float32 and array[0, 0, 0].tolist() == [0, 0.5, 1]
    tensor = point_pipe(vae=colour)(**call, output_type="pt").images
    assert tensor.shape == (2, 3, 4, 6)
    with pytest.raises(PipelineInputError, match="5 channels"):
        point_pipe(vae=PictureVae(torch.zeros(5, 4, 6)))(**call)


# --- networks --------------------------------------------------------------------------------------------------------


def test_an_unconditional_network():
    unet = tiny_unet(num_class_embeds=None)
    pipe = LatentDiffusionPipeline(unet, tiny_vae(), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_images_per_label=3, num_inference_steps=2, output_type="np").images.shape == (3, 8, 8, 1)
    with pytest.raises(PipelineInputError, match="unconditional"):
        pipe(class_labels=["Bag"])
    with pytest.raises(PipelineInputError, match="no class or prompt to guide to"):
        pipe(guidance_scale=2.0)


def test_a_unet_that_could_cross_attend():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=4,
        mid_block_type=None,
    )
    pipe = LatentDiffusionPipeline(unet, tiny_vae(), DDIMScheduler(clip_sample=False), NAMES, null_class=3)
    pipe.set_progress_bar_config(disable=True)
    one, other = latents_of(pipe, class_labels=[0]), latents_of(pipe, class_labels=[1])
    assert (one - other).abs().max() > 1e-4


def test_half_precision_weights_keep_the_sampling_in_float32():
    pipe = random_pipe()
    full = latents_of(pipe, class_labels=[0], num_inference_steps=3)
    pipe.to(torch.bfloat16)
    half = latents_of(pipe, class_labels=[0], num_inference_steps=3)
    assert half.dtype == torch.float32
    assert 0 < (full - half).abs().max() < 0.2
    assert pipe(class_labels=[0], num_inference_steps=3, output_type="np").images.dtype == np.float32


# --- the loop as seen from outside -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [None, "dpmpp_3m"])
def test_weights_cast_once_are_autocast_to_the_bit(sampler):
    pipe, cast = random_pipe(), random_pipe()
    pipe.unet.forward = torch.autocast("cpu", torch.bfloat16)(pipe.unet.forward)
    set_precision(cast, "bfloat16")
    assert {p.dtype for p in cast.unet.parameters()} == {torch.float32, torch.bfloat16}
    ask = {"class_labels": [0, 1], "guidance_scale": 2.0, "num_inference_steps": 3, "sampler": sampler}
    assert torch.equal(latents_of(pipe, generator=seeded(), **ask), latents_of(cast, generator=seeded(), **ask))


def test_the_callback_sees_every_step_and_may_change_the_latents():
    pipe, seen = point_pipe(), []

    def watch(pipe, step, timestep, tensors):
        seen.append((step, int(timestep), tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0 + 5} if step == 3 else None

    latents = latents_of(pipe, class_labels=[0], num_inference_steps=4, callback_on_step_end=watch)
    assert seen == [(i, t, (1, 5, 2, 3)) for i, t in enumerate([750, 500, 250, 0])]
    assert torch.equal(latents, torch.full_like(latents, 5))


def test_a_bar_shows_the_steps(capsys):
    pipe = point_pipe()
    pipe.set_progress_bar_config(disable=False)
    pipe(class_labels=[0], num_inference_steps=4)
    captured = capsys.readouterr()
    assert "4/4" in captured.err and captured.out == ""


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(class_labels=["Bag", "Sneakr"]), "unknown class 'Sneakr'; the classes are: 0 Trouser, 1 Bag, 2 7"),
        (dict(class_labels=[3]), "unknown class 3; the classes are"),
        (dict(class_labels=["3"]), "unknown class '3'"),
        (dict(class_labels=[-1]), "unknown class -1"),
        (dict(class_labels=[1.0]), "unknown class 1.0"),
        (dict(class_labels=[True]), "unknown class True"),
        (dict(class_labels=[]), "class_labels is empty"),
        (dict(class_labels=0, num_images_per_label=0), "num_images_per_label 0"),
        (dict(class_labels=0, num_inference_steps=0), "num_inference_steps 0"),
        (dict(prompt="a red apple"), "no text encoder; "),
        (dict(guidance_scale=2.0), "no class or prompt to guide to"),
        (dict(class_labels=[None], guidance_scale=2.0), "no class or prompt to guide to"),
        (dict(class_labels=[0, 1], generator=[seeded()] * 3), "3 generators for 2 images"),
        (dict(class_labels=0, generator=5), "generator 5: must be a torch.Generator"),
        (dict(class_labels=[0, 1], generator=[seeded(), 5]), "must be a torch.Generator, or a list of one per image"),
        (dict(class_labels=[0], latents=torch.zeros(1, 5, 3, 2)), r"needs \[1, 5, 2, 3\]"),
        (dict(class_labels=[0], output_type="jpeg"), "pil, np, pt, latent"),
        (dict(class_labels=[0], sampler_options={"eta": 1.0}), "sampler="),
    ],
)
def test_a_call_that_cannot_be_answered_says_so_in_one_line(call, message):
    pipe = point_pipe()
    with pytest.raises(PipelineInputError, match=message) as error:
        pipe(**call)
    assert len(str(error.value).splitlines()) == 1
    assert not pipe.unet.calls


def test_without_class_dropout_there_is_no_guidance_and_no_unconditional_image():
    torch.manual_seed(0)
    pipe = random_pipe(null_class=None, class_names=[*NAMES, "fourth"])
    assert latents_of(pipe, class_labels=["fourth"], num_inference_steps=1).shape == (1, 4, 4, 4)
    with pytest.raises(PipelineInputError, match="without class dropout"):
        pipe(class_labels=[0], guidance_scale=2.0)
    with pytest.raises(PipelineInputError, match="no null class, so every image needs a class"):
        pipe(class_labels=[0, None])


def test_many_classes_are_not_all_listed():
    pipe = random_pipe(class_names=[f"class{i}" for i in range(1000)])
    pipe.unet.register_to_config(num_class_embeds=1001)
    assert pipe.class_names[999] == "class999"
    with pytest.raises(PipelineInputError, match=r"1 class1, .* \(1000 in all\)") as error:
        pipe(class_labels="nothing")
    assert "class500" not in str(error.value)


@pytest.mark.parametrize("sampler", [None, "ddim"])
@pytest.mark.parametrize("interval", [(200, 800), (0.8, 0.2), (0.1, 0.2, 0.3)])
def test_an_interval_that_could_do_nothing_is_refused(interval, sampler):
    call = dict(class_labels=[1], guidance_scale=2.0, guidance_interval=interval, num_inference_steps=2, sampler=sampler)
    with pytest.raises(ValueError, match="guidance_interval .* 0 <= low <= high <= 1"):
        latents_of(random_pipe(), **call)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -3.0])
def test_a_scale_that_is_no_scale_is_refused(scale):
    with pytest.raises(ValueError, match="guidance_scale .* finite number of at least 0"):
        latents_of(random_pipe(), class_labels=[1], guidance_scale=scale, num_inference_steps=2)
