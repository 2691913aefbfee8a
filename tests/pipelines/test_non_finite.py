"""A NaN or an infinity is never drawn, measured or written: the first stage that made it is named, and nothing is left."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler
from safetensors.torch import load_file, save_file
from test_pipeline import random_pipe
from tiny_models import tiny_unet, tiny_vae
from tiny_stable import stable_parts

from latentdiff import checkpoints, samplers
from latentdiff.denoiser import Denoiser
from latentdiff.errors import NotFiniteError, UserError
from latentdiff.evaluation.feature_statistics import feature_statistics
from latentdiff.likelihood import log_prob, variational_bound
from latentdiff.models.codec import LatentCodec
from latentdiff.models.feature_net import FeatureNet
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, NonFiniteError
from latentdiff.schedules import make_schedule

CALL = {"class_labels": [0, 1], "num_inference_steps": 4}


def spoil(module, name, value=float("nan")):
    """One entry of one weight."""
    with torch.no_grad():
        module.get_parameter(name).view(-1)[0] = value


def refusal(pipe, **call) -> str:
    generator = [torch.Generator().manual_seed(k) for k in (0, 1)]
    with pytest.raises(NonFiniteError) as error:
        pipe(**{**CALL, "generator": generator, **call})
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


@pytest.mark.parametrize("output_type", ["pil", "latent"])
@pytest.mark.parametrize("sampler", [None, "heun", "ancestral", "dopri5"])
def test_a_weight_of_the_unet_is_named(sampler, output_type):
    pipe = random_pipe()
    spoil(pipe.unet, "conv_out.bias")
    line = refusal(pipe, output_type=output_type, sampler=sampler)
    assert line.startswith("U-Net: its output is not finite (evaluation 1, timestep ")
    assert "its weight conv_out.bias is not finite" in line


@pytest.mark.parametrize("output_type", ["pil", "np", "pt"])
def test_a_weight_of_the_decoder_is_named(output_type):
    pipe = random_pipe()
    spoil(pipe.vae, "decoder.conv_out.weight")
    line = refusal(pipe, output_type=output_type)
    assert line.startswith("decoder: ") and "its weight decoder.conv_out.weight is not finite" in line
    assert pipe(**CALL, output_type="latent").images.isfinite().all()  # the decoder has no part in it


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_of_the_text_encoder_is_named(value):
    pipe = LatentDiffusionPipeline(**stable_parts())
    pipe.set_progress_bar_config(disable=True)
    (name,) = (name for name, _ in pipe.text_encoder.named_parameters() if name.endswith("final_layer_norm.bias"))
    spoil(pipe.text_encoder, name, value)
    call = {"class_labels": None, "guidance_scale": 2.0, "num_inference_steps": 2}
    line = refusal(pipe, prompt=["a picture of stripes"] * 2, **call)
    assert line.startswith("text encoder: its output for prompt is not finite; its weight ")


@pytest.mark.parametrize("sampler", [None, "dpmpp_2m"])
def test_guidance_that_overflows_names_the_evaluation(sampler):
    pipe = random_pipe(sampler and DDIMScheduler(clip_sample=False))
    line = refusal(pipe, guidance_scale=1e38, sampler=sampler, output_type="latent")
    assert line.startswith("U-Net: its output is not finite (evaluation ") and "guidance scale 1e+38" in line
    assert "(evaluation 1," not in line and "its weights are finite, its numbers reach " in line


def test_a_decoder_in_float16_is_told_of_wider_numbers():
    pipe = random_pipe()
    with torch.no_grad():  # weights that float16 holds, whose products are beyond its 65504
        pipe.vae.decoder.conv_norm_out.bias.fill_(6e4)
        pipe.vae.decoder.conv_out.weight.fill_(1.0)
    assert pipe(**CALL, output_type="pt").images.isfinite().all()
    pipe.vae.half()
    line = refusal(pipe)
    assert line.startswith("decoder: ") and "in float16" in line and "float32 or bfloat16 hold larger numbers" in line


def test_an_infinity_that_clamping_would_hide_is_refused():
    pipe = random_pipe()
    spoil(pipe.vae, "decoder.conv_out.bias", float("inf"))
    assert refusal(pipe, output_type="np").startswith("decoder: ")


def test_the_scheduler_the_callback_and_the_noise_are_named():
    pipe = random_pipe()
    bad = torch.full((2, 4, 4, 4), float("nan"))
    assert refusal(pipe, latents=bad) == "latents: the starting noise is not finite"
    line = refusal(pipe, callback_on_step_end=lambda *a: {"latents": bad}, output_type="latent")
    assert line.startswith("callback_on_step_end: ")
    step, forward = pipe.scheduler.step, pipe.unet.forward

    def finite_forward(*arguments, **keywords):
        out = forward(*arguments, **keywords)
        return type(out)(sample=out.sample.nan_to_num(0.0))

    pipe.scheduler.step = lambda *a, **k: (step(*a, **k)[0] * float("inf"),)
    pipe.unet.forward = finite_forward
    line = refusal(pipe, output_type="latent")
    assert line.startswith("sampler: each output of the U-Net is finite, and yet ")


def test_finding_the_stage_draws_the_same_numbers_again():
    # The network gives NaN only for the noise of these generators; a second draw of others would not show it
    pipe = random_pipe(HeunDiscreteScheduler(prediction_type="epsilon"))
    forward, seen = pipe.unet.forward, []

    def fails_at_third(*a, **k):
        seen.append(a[0].double().sum().item())
        out = forward(*a, **k)
        return type(out)(sample=out.sample * float("nan")) if len(seen) in (3, len(first) + 3) else out

    first = range(7)
    pipe.unet.forward = fails_at_third
    assert "evaluation 3," in refusal(pipe, output_type="latent")
    assert seen[7:10] == seen[:3]


def test_a_call_that_is_fine_is_as_it_was_and_looks_twice():
    pipe, looks = random_pipe(), []
    from latentdiff.pipelines import latent_diffusion as module

    original = module.all_finite
    module.all_finite = lambda values: looks.append(values.shape) or original(values)
    try:
        generator = torch.Generator().manual_seed(3)
        images = pipe(**CALL, generator=generator, output_type="pt").images
    finally:
        module.all_finite = original
    assert looks == [(2, 4, 4, 4), (2, 1, 8, 8)]
    pipe.refuse_non_finite = False
    assert torch.equal(images, pipe(**CALL, generator=generator.manual_seed(3), output_type="pt").images)
    spoil(pipe.unet, "conv_out.bias")
    assert pipe(**CALL, output_type="latent").images.isnan().any()


@pytest.fixture
def broken(tmp_path):
    """A checkpoint whose weights are finite, and whose decoder overflows."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias.fill_(3e38)
        vae.decoder.conv_out.weight.fill_(3e38)
    return checkpoints.save(
        tmp_path / "model",
        unet=tiny_unet(),
        vae=vae,
        scheduler=DDIMScheduler(clip_sample=False),
        meta={},
        class_names=["a", "b", "c"],
        null_class=3,
        dtype=torch.float32,
    )


def test_generate_and_reconstruct_write_nothing(broken, refused, tmp_path):
    from PIL import Image

    Image.new("L", (8, 8), 99).save(tmp_path / "a.png")
    for out in ("x.png", "x.npz", "x"):
        assert "latentdiff: decoder: its output is not finite" in refused(
            "generate", "a", "--model", broken, "--steps", 2, "--out", out
        )
    line = refused("reconstruct", broken, tmp_path / "a.png", "--out", "r.png")
    assert line.startswith("latentdiff: decoder (AutoencoderKL, float32): its output is not finite")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_weight_that_is_not_finite_is_named_when_the_checkpoint_is_opened(broken, refused, part):
    file = broken / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = "conv_in.bias" if part == "unet" else "encoder.conv_in.bias"
    weights[name][1] = float("nan")
    save_file(weights, file, {"format": "pt"})
    (file.parent / "hashes.json").unlink(missing_ok=True)
    line = refused("generate", "a", "--model", broken, "--out", "x.png")
    assert line.startswith(f"latentdiff: {file}: {name} is not finite in float32")
    assert refused("info", broken).startswith(f"latentdiff: {file}: {name} is not finite")


def test_a_small_network_is_looked_at_too(tmp_path):
    from latentdiff.models.feature_net import load_features

    FeatureNet(1, 3, (8, 8, 8)).fold().save(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    weights["head.bias"][0] = float("inf")
    save_file(weights, file)
    (tmp_path / "hashes.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"{file}: .*head.bias is not finite"):
        load_features(tmp_path)


def test_features_codecs_densities_and_encodings_are_refused():
    net = FeatureNet(1, 3, (8, 8, 8)).fold()
    spoil(net, next(name for name, _ in net.named_parameters()))
    with pytest.raises(NotFiniteError, match="feature network .*: its features are not finite"):
        feature_statistics(net, [(torch.zeros(2, 1, 16, 16), None)])
    vae = tiny_vae()
    spoil(vae, "encoder.conv_in.bias")
    with pytest.raises(NotFiniteError, match="encoder .AutoencoderKL, float32.: its output is not finite"):
        LatentCodec(vae).moments(torch.zeros(1, 1, 8, 8))
    assert LatentCodec(vae, refuse_non_finite=False).moments(torch.zeros(1, 1, 8, 8))[0].isnan().any()
    schedule = make_schedule("vp")
    nan = Denoiser.from_score(lambda x, t: x * float("nan"), schedule)
    for call in (log_prob, variational_bound, samplers.encode):
        with pytest.raises(UserError, match="finite"):
            call(nan, torch.ones(2, 3))


def test_a_sampler_says_where_the_network_failed():
    schedule, calls = make_schedule("vp"), []

    def score(x, t):
        calls.append(float(t.max()))
        return x * float("nan") if len(calls) in (4, 13) else -x

    with pytest.raises(NotFiniteError, match="the network's output is not finite .evaluation 4, t = 0"):
        samplers.sample(Denoiser.from_score(score, schedule), torch.ones(2, 3), "euler", steps=9)
    assert json.dumps(calls[:4]) == json.dumps(calls[-4:])
