"""The pipeline with guidance by argument, and without a diffusers scheduler."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler
from test_pipeline import NAMES, POINTS, latents_of, point_pipe, random_pipe, seeded
from tiny_models import tiny_unet, tiny_vae

from latentdiff import checkpoints
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.guidance import Autoguidance, Classifier, Reconstruction
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline, PipelineInputError, within

CALL = dict(class_labels=[0, 1], num_inference_steps=6, sampler="heun")


# Guidance by argument -----------------------------------------------------------------------------------------------


def test_guidance_stands_around_the_classifier_free_one():
    pipe, seen = random_pipe(), []

    def watch(denoiser):
        seen.append((denoiser.scale, denoiser.conditional["class_labels"].tolist()))
        return denoiser

    plain = latents_of(pipe, **CALL, guidance_scale=2.0)
    assert torch.equal(latents_of(pipe, **CALL, guidance_scale=2.0, guidance=watch), plain)
    assert seen == [(2.0, [0, 1])]
    off = latents_of(pipe, **CALL, guidance_scale=2.0, guidance=lambda d: Classifier(d, None, 0.0))
    assert torch.equal(off, plain)


def test_reconstruction_moves_the_latents_to_the_observation():
    """All latents of class 0 lie on one point, which no observation moves: the network's covariance there is 0."""
    pipe = point_pipe()
    target = torch.full((2, 5, 2, 3), 0.7)
    guide = lambda d: Reconstruction(d, lambda x0: x0, target, 1.0, noise_std=0.1, covariance=True)  # noqa: E731
    still = latents_of(pipe, **CALL, guidance=guide)
    torch.testing.assert_close(still[0], POINTS[0][:, None, None].expand(5, 2, 3), atol=2e-3, rtol=0)
    pipe = random_pipe()
    target = torch.full((2, 4, 4, 4), 0.7)
    guide = lambda d: Reconstruction(d, lambda x0: x0, target, 1.0, noise_std=0.1, covariance=True)  # noqa: E731
    plain, guided = latents_of(pipe, **CALL), latents_of(pipe, **CALL, guidance=guide)
    assert (guided - target).norm() < 0.5 * (plain - target).norm()
    assert not guided.requires_grad


def test_a_weaker_checkpoint_guides_a_better_one():
    pipe, weak = random_pipe(), random_pipe()
    torch.manual_seed(1)
    weak.unet = tiny_unet()
    labels = torch.tensor([0, 1])

    def guide(scale):
        return lambda d: Autoguidance(d, Denoiser.from_pipeline(weak, class_labels=labels), scale)

    plain = latents_of(pipe, **CALL)
    assert torch.equal(latents_of(pipe, **CALL, guidance=guide(1.0)), plain)
    assert (latents_of(pipe, **CALL, guidance=guide(2.0)) - plain).abs().max() > 1e-3
    torch.testing.assert_close(latents_of(pipe, **CALL, guidance=guide(0.0)), latents_of(weak, **CALL))


def test_guidance_needs_a_sampler():
    with pytest.raises(PipelineInputError, match="guidance: sampler= is needed"):
        point_pipe()(class_labels=[0], guidance=lambda d: d)


# Without a scheduler ------------------------------------------------------------------------------------------------


def bare_pipe(**config):
    torch.manual_seed(0)
    defaults = dict(
        class_names=NAMES,
        null_class=3,
        prediction="epsilon",
        schedule={"name": "subvp"},
        default_sampler="heun",
        default_num_inference_steps=4,
    )
    pipe = LatentDiffusionPipeline(tiny_unet(), tiny_vae(), None, **{**defaults, **config})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_default_sampler_takes_the_checkpoints_own_steps():
    pipe = bare_pipe(default_sampler="euler_maruyama", default_num_inference_steps=4)
    times = []
    pipe(class_labels=[0], output_type="latent", callback_on_step_end=lambda _, step, t, kwargs: times.append(t))
    assert len(times) == 4


def test_the_default_sampler_runs_where_there_is_no_scheduler():
    pipe = bare_pipe()
    drawn = latents_of(pipe, class_labels=[0, 1], guidance_scale=2.0)
    assert torch.equal(drawn, latents_of(pipe, class_labels=[0, 1], guidance_scale=2.0, sampler="heun"))
    assert not torch.equal(drawn, latents_of(pipe, class_labels=[0, 1], guidance_scale=2.0, sampler="euler"))
    towards_zero = lambda d: Classifier(d, lambda x, t: -x.square().sum((1, 2, 3)), 1.0)  # noqa: E731
    guided = latents_of(pipe, class_labels=[0, 1], guidance=towards_zero)
    assert not torch.equal(guided, latents_of(pipe, class_labels=[0, 1]))
    options = latents_of(bare_pipe(default_sampler="ddim"), class_labels=[0], sampler_options={"eta": 0.5})
    assert options.shape == (1, 4, 4, 4)
    pipe.scheduler = DDIMScheduler(clip_sample=False)  # put in its place, it would draw from other noise
    with pytest.raises(PipelineInputError, match="DDIMScheduler cannot draw from this checkpoint, whose noise is subvp"):
        latents_of(pipe, class_labels=[0, 1], guidance_scale=2.0)
    with pytest.raises(PipelineInputError, match="neither a scheduler nor a default_sampler: sampler= is needed"):
        bare_pipe(default_sampler=None)(class_labels=[0])


def test_it_is_saved_and_loaded(tmp_path):
    pipe = bare_pipe()
    pipe.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "scheduler").exists()
    back = LatentDiffusionPipeline.from_pretrained(tmp_path / "model")
    back.set_progress_bar_config(disable=True)
    assert back.scheduler is None and back.config.default_sampler == "heun"
    torch.testing.assert_close(latents_of(back, class_labels=[0]), latents_of(pipe, class_labels=[0]), rtol=1e-4, atol=1e-4)


def publish(folder, **changes):
    torch.manual_seed(0)
    arguments = dict(
        unet=tiny_unet(),
        vae=tiny_vae(),
        scheduler=None,
        meta={},
        class_names=NAMES,
        null_class=3,
        prediction="score",
        schedule={"name": "ve"},
        default_sampler="heun",
    )
    return checkpoints.save(folder, **{**arguments, **changes})


def test_it_is_published_and_loaded(tmp_path):
    folder = publish(tmp_path / "model")
    pipe = checkpoints.load(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler is None and latents_of(pipe, class_labels=[0], num_inference_steps=2).shape == (1, 4, 4, 4)
    again = publish(tmp_path / "model", scheduler=DDIMScheduler(), default_sampler=None)
    assert checkpoints.load(again).scheduler is not None
    (again / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(UserError, match="scheduler_config.json: missing"):
        checkpoints.load(again)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"default_sampler": None}, "a checkpoint has one of the two"),
        ({"scheduler": DDIMScheduler()}, "a checkpoint has one of the two"),
        ({"default_sampler": "plms"}, "'plms' is unknown; valid: ancestral"),
        ({"schedule": None}, "schedule and prediction: both are needed"),
        ({"prediction": None}, "schedule and prediction: both are needed"),
    ],
)
def test_a_checkpoint_that_says_not_how_to_sample_is_not_published(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        publish(tmp_path / "model", **changes)
    assert not (tmp_path / "model").exists()


WITHOUT = """
import json, sys, torch
sys.modules["latentdiff"] = None
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
try:
    pipe(class_labels=[0])
except ValueError as error:
    print(json.dumps([type(error).__name__, str(error), pipe.num_classes]))
"""


def test_without_latentdiff_the_call_says_what_is_missing(tmp_path):
    folder = publish(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folder)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, text, classes = json.loads(done.stdout)
    assert name == "PipelineInputError" and "sampler='heun' needs the latentdiff package" in text and classes == 3
    assert len(text.splitlines()) == 1


def test_generators_and_shapes_hold_without_a_scheduler():
    pipe = bare_pipe(schedule={"name": "ve"}, prediction="score", default_sampler="ancestral")
    together = latents_of(pipe, class_labels=[0, 1], generator=[seeded(0), seeded(1)])
    alone = latents_of(pipe, class_labels=[1], generator=[seeded(1)])
    torch.testing.assert_close(alone[0], together[1], atol=1e-3, rtol=1e-3)  # of values near 100


@pytest.mark.parametrize("sigma_max", [10.0, 60.0, 80.0])
def test_everywhere_is_every_step_of_edm_too(sigma_max):
    scheduler = EDMEulerScheduler(sigma_max=sigma_max)
    scheduler.set_timesteps(7)
    assert all(within((0.0, 1.0), scheduler, timestep) for timestep in scheduler.timesteps)
    assert not within((0.0, 0.9), scheduler, scheduler.timesteps[0])
