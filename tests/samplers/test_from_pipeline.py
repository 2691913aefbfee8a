"""A Denoiser from diffusers pipelines that the library did not make: Stable Diffusion with random weights."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_models import tiny_unet, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel

from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import ClassifierFree
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.samplers import sample
from latentdiff.schedules import RectifiedFlow, make_schedule

STEPS = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def text(seed=1):
    """What a text encoder would say of two prompts: [2, 5, 8]."""
    return torch.randn(2, 5, 8, generator=seeded(seed))


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    """A small StableDiffusionPipeline with random weights, as it comes back from its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
        encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=8,
                intermediate_size=16,
                num_attention_heads=2,
                num_hidden_layers=1,
                vocab_size=50,
                max_position_embeddings=8,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        steps_offset=1,
    )
    folder = tmp_path_factory.mktemp("stable") / "model"
    parts = dict(tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    StableDiffusionPipeline(unet=unet, vae=vae, text_encoder=encoder, scheduler=scheduler, **parts).save_pretrained(folder)
    pipe = StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def own_grid(pipe):
    """The times at which the pipeline's scheduler looks, then data."""
    pipe.scheduler.set_timesteps(STEPS)
    times = Denoiser.from_pipeline(pipe).schedule.time_from_timestep(pipe.scheduler.timesteps)
    return torch.cat([times, times.new_zeros(1)])


def run_theirs(pipe, noise, scale):
    return pipe(
        prompt_embeds=text(),
        negative_prompt_embeds=text(2),
        latents=noise,
        guidance_scale=scale,
        num_inference_steps=STEPS,
        output_type="latent",
    ).images


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_our_ddim_is_stable_diffusions_own(stable, prediction, scale):
    stable.scheduler = DDIMScheduler.from_config(stable.scheduler.config, prediction_type=prediction)
    noise, grid = torch.randn(2, 4, 8, 8, generator=seeded()), own_grid(stable)
    condition, null = {"encoder_hidden_states": text()}, {"encoder_hidden_states": text(2)}
    denoiser = ClassifierFree(Denoiser.from_pipeline(stable), condition, null, scale)
    ours = sample(denoiser, noise, "ddim", grid=grid)
    theirs = run_theirs(stable, noise, scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    bound = sample(Denoiser.from_pipeline(stable, **condition), noise, "ddim", grid=grid)
    assert torch.equal(bound, ours) == (scale == 1)
    # planted: the scheduler's betas not looked at, the last prompt's text for every image
    wrong = Denoiser(denoiser.denoiser.model, make_schedule("ddpm-linear"), prediction)
    other = sample(ClassifierFree(wrong, condition, null, scale), noise, "ddim", grid=grid)
    assert (other - ours).abs().max() > 0.01
    swapped = {"encoder_hidden_states": text().flip(0)}
    other = sample(ClassifierFree(denoiser.denoiser, swapped, null, scale), noise, "ddim", grid=grid)
    assert (other - ours).abs().max() > 1e-3


def test_an_image_of_stable_diffusion_does_not_depend_on_its_batch(stable):
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    both = sample(Denoiser.from_pipeline(stable, encoder_hidden_states=text()), noise, "heun", 4)
    for i in range(2):
        alone = Denoiser.from_pipeline(stable, encoder_hidden_states=text()[i : i + 1])
        torch.testing.assert_close(sample(alone, noise[i : i + 1], "heun", 4)[0], both[i], rtol=1e-5, atol=1e-5)


def test_the_log_density_of_a_latent_of_stable_diffusion(stable):
    likelihood = pytest.importorskip("latentdiff.likelihood")
    x0 = torch.randn(2, 4, 8, 8, generator=seeded())
    denoiser = Denoiser.from_pipeline(stable, encoder_hidden_states=text())
    both = likelihood.log_prob(denoiser, x0, probes=1, rtol=1e-3, atol=1e-3, generator=[seeded(i) for i in range(2)])
    assert both.log_prob.shape == (2,) and bool(both.log_prob.isfinite().all()) and bool((both.nfe > 0).all())


def test_weights_in_half_precision_are_run_as_such(stable):
    noise = torch.randn(2, 4, 8, 8, generator=seeded())
    full = sample(Denoiser.from_pipeline(stable, encoder_hidden_states=text()), noise, "euler", 4)
    stable.unet.to(torch.bfloat16)
    denoiser = Denoiser.from_pipeline(stable, encoder_hidden_states=text().bfloat16())
    half = sample(denoiser, noise, "euler", 4)
    stable.unet.to(torch.float32)
    assert half.dtype == torch.float32 and 0 < (half - full).abs().max() < 0.2


def test_our_own_pipeline_states_schedule_and_prediction_itself():
    torch.manual_seed(0)
    config = dict(prediction="v_prediction", schedule={"name": "vp", "beta_max": 12.0})
    pipe = LatentDiffusionPipeline(tiny_unet(), tiny_vae(), EulerDiscreteScheduler(), **config)
    denoiser = Denoiser.from_pipeline(pipe, class_labels=torch.tensor([1, 3]))
    assert denoiser.prediction == "v_prediction" and denoiser.schedule.beta_max == 12.0
    x = torch.randn(2, 4, 4, 4, generator=seeded())
    with torch.no_grad():
        out = pipe.unet(x, torch.tensor([499.0, 499.0]), class_labels=torch.tensor([1, 3])).sample
        torch.testing.assert_close(denoiser.output(x, 0.5), out)
        out = pipe.unet(x, torch.tensor([499.0, 499.0]), class_labels=torch.tensor([2, 0])).sample
        torch.testing.assert_close(denoiser.output(x, 0.5, class_labels=torch.tensor([2, 0])), out)
    flow = Denoiser.from_pipeline(LatentDiffusionPipeline(tiny_unet(), tiny_vae(), FlowMatchEulerDiscreteScheduler()))
    assert isinstance(flow.schedule, RectifiedFlow) and flow.prediction == "flow"


def test_a_pipeline_with_nothing_to_read_is_refused():
    with pytest.raises(UserError, match="str has no unet"):
        Denoiser.from_pipeline("a/folder")
    pipe = DDPMPipeline(tiny_unet(), DDIMScheduler())
    pipe.scheduler = None
    with pytest.raises(UserError, match="must state a schedule and a prediction"):
        Denoiser.from_pipeline(pipe)
