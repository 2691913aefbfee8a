"""The gallery: what each picture shows is what its name says."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tiny_models import tiny_unet
from tiny_text import UNET, write_bert, write_captioned
from transformers import BertModel, BertTokenizer

from latentdiff import checkpoints, samplers
from latentdiff.denoiser import Denoiser
from latentdiff.evaluation.gallery import (
    COLUMNS,
    SCALES,
    STRENGTHS,
    GallerySampler,
    _pairs,
    _spread_pairs,
    classifier_columns,
    interpolation,
    trajectory,
)
from latentdiff.generation import generate_batches
from latentdiff.guidance import LatentClassifier
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.utils.random import derive_seed, generators


@pytest.fixture
def stage(model) -> GallerySampler:
    return GallerySampler(checkpoints.load(model), seed=0, steps=6, sampler="dpmpp_2m")


def test_the_command_writes_labelled_pictures(run, here, model, stripe_folder):
    paths = run("gallery", model, "--data", stripe_folder, "--steps", 4, "--out", "pictures").split()
    assert paths == [f"pictures/{name}.png" for name in ("trajectory", "interpolation", "guidance")]
    for path, columns in zip(paths, (4, COLUMNS, len(SCALES)), strict=True):  # a trajectory of 4 steps has 4 estimates
        picture = Image.open(here / path)
        assert picture.height == 3 * (2 * 16 + 2) and columns * 34 < picture.width < columns * 34 + 80
        assert np.asarray(picture.convert("L")).std() > 10


def test_a_trajectory_ends_where_the_pipeline_does(stage):
    stage.pipeline.register_to_config(default_guidance_interval=[0.3, 0.8], default_guidance_scale=3.0)
    columns = trajectory(stage)
    assert len(columns) == 6
    end = stage.draw(stage.guided(3.0, interval=(0.3, 0.8)))
    assert float((stage.draw(stage.guided(3.0)) - end).abs().max()) > 1e-3
    torch.testing.assert_close(columns[-1], end, rtol=0, atol=1e-4)
    assert float((columns[0] - end).abs().max()) > 0.05
    latents = torch.stack(list(stage.noise))
    out = stage.pipeline(class_labels=[0, 1, 2], latents=latents, sampler="dpmpp_2m", num_inference_steps=6, output_type="pt")
    torch.testing.assert_close(out.images, (end / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-4)


def test_the_ends_of_the_arc_are_the_round_trips_of_the_ends(stage, model, stripe_folder):
    # For latents of N(0, I) the flow is known: there and back is the identity, up to the solver.
    schedule = stage.denoiser.schedule
    stage.denoiser = Denoiser.from_score(lambda x, t, class_labels: -x, schedule)
    stage.steps = 20
    columns = interpolation(stage, *_pairs(model, str(stripe_folder), stage.pipeline))
    assert len(columns) == COLUMNS and columns[0].shape == (3, 1, 16, 16)
    apart = float((columns[0] - columns[-1]).abs().max())
    assert float((columns[1] - columns[0]).abs().max()) < 0.05 * apart
    assert float((columns[-2] - columns[-1]).abs().max()) < 0.05 * apart
    assert float((columns[4] - columns[0]).abs().max()) > 0.2 * apart


def test_the_columns_of_the_classifier_are_what_they_are_called(stage):
    torch.manual_seed(0)
    classifier = LatentClassifier(2, 3, {"name": "ddpm-linear"}, widths=(8, 8))
    columns = classifier_columns(stage, classifier)
    assert len(columns) == 1 + len(STRENGTHS) + 3
    assert torch.equal(columns[1 + len(STRENGTHS)], stage.draw(stage.guided(1.0)))  # the conditional model
    null = [k for _, k in generate_batches(stage.pipeline, [None], 1, num_inference_steps=2)][0]
    assert null == [None] and not torch.equal(columns[0], columns[1 + len(STRENGTHS)])
    assert all(not torch.equal(columns[0], column) for column in columns[1 : 1 + len(STRENGTHS)])


def test_what_cannot_be_shown_is_refused(refused, model, stripe_folder, here):
    ask = ("gallery", model, "--data", stripe_folder)
    assert "--sampler eular: unknown; valid: ancestral" in refused(*ask, "--sampler", "eular")
    (here / "file").write_text("")
    assert "--out file: is a file" in refused(*ask, "--out", "file")


def test_what_is_encoded_are_draws_unless_the_model_was_trained_on_means(stage, model, stripe_folder):
    pair = _pairs(model, str(stripe_folder), stage.pipeline)
    stage.steps = 2
    draws, again, means = interpolation(stage, *pair), interpolation(stage, *pair), interpolation(stage, *pair, use_mean=True)
    mean, std = stage.codec.moments(pair[0])
    assert torch.equal(means[0], stage.decode(stage.codec.normalise(mean))) and torch.equal(draws[0], again[0])
    noise = (stage.codec.denormalise(_encoded(stage, pair[0])) - mean) / std
    assert abs(float(noise.std()) - 1) < 5 / noise.numel() ** 0.5
    assert torch.equal(draws[0], stage.decode(_encoded(stage, pair[0]))) and not torch.equal(draws[0], means[0])


def _encoded(stage, images):
    return stage.codec.latents(images, _draws(stage, 0))


def other_model(monkeypatch, pipe, tmp_path, reads_text, **config):
    """Let every model that is opened be one of text, or an unconditional one, over the same latents."""
    config = {"image_size": (16, 16), "prediction": "epsilon", **config}
    if reads_text:
        bert = write_bert(tmp_path / "bert", "across down stripes a picture of")
        config["text_encoder"], config["tokenizer"] = BertModel.from_pretrained(bert), BertTokenizer.from_pretrained(bert)
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=8, in_channels=2, out_channels=2, cross_attention_dim=16, **UNET["config"])
    else:
        unet = tiny_unet(sample_size=8, in_channels=2, out_channels=2, num_class_embeds=None)
    made = LatentDiffusionPipeline(unet.eval(), pipe.vae, DDIMScheduler(clip_sample=False), **config)
    made.set_progress_bar_config(disable=True)
    monkeypatch.setattr(checkpoints, "load", lambda folder: made)
    return made


@pytest.mark.parametrize("reads_text", [True, False])
def test_models_of_text_and_of_nothing_are_drawn(monkeypatch, run, refused, here, model, stripe_folder, tmp_path, reads_text):
    made = other_model(monkeypatch, checkpoints.load(model), tmp_path, reads_text)
    data = write_captioned(tmp_path / "captioned") if reads_text else stripe_folder
    names = ["trajectory", "interpolation", *(["guidance"] if reads_text else [])]
    paths = run("gallery", model, "--data", data, "--steps", 3, "--out", "pictures").split()
    assert paths == [f"pictures/{name}.png" for name in names]
    first, second, shown, others = _spread_pairs(model, str(data), made)
    assert first.shape == second.shape == (len(shown), 1, 16, 16) and not torch.equal(first, second)
    assert all(isinstance(row, str) if reads_text else row is None for row in (*shown, *others))
    stage = GallerySampler(made, seed=0, steps=3, sampler="heun", rows=shown)
    assert stage.names == (shown if reads_text else [str(k) for k in range(len(shown))])
    columns = interpolation(stage, first, second, second_rows=others)
    assert torch.equal(columns[0], interpolation(stage, first, second)[0]) and len(columns) == COLUMNS
    # The outermost of the arc are the round trips of the two, each under what it shows itself
    there = samplers.encode(stage.guided(1.0, rows=others), stage.codec.latents(second, _draws(stage, 1)), "heun", 3)
    back = stage.decode(samplers.sample(stage.guided(1.0, rows=others), there, "heun", 3))
    torch.testing.assert_close(columns[-2], back, rtol=0, atol=1e-4)
    if reads_text:
        assert "its images have no captions" in refused("gallery", model, "--data", stripe_folder, "--out", "more")


def test_a_bridge_is_refused_in_one_line(monkeypatch, refused, model, stripe_folder, tmp_path):
    other_model(monkeypatch, checkpoints.load(model), tmp_path, False, bridge="drawings")
    line = refused("gallery", model, "--data", stripe_folder, "--out", "pictures")
    assert "MODEL: is a bridge, which starts from images of drawings and not from noise" in line


def _draws(stage, side):
    return generators(derive_seed(stage.seed, "posterior", side), stage.labels.tolist())


def test_a_picture_that_is_done_is_not_lost_with_the_next(monkeypatch, model, stripe_folder, tmp_path):
    from latentdiff.evaluation import gallery

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "interpolation", fail)
    with pytest.raises(KeyboardInterrupt):
        gallery.gallery(model, str(stripe_folder), tmp_path / "out", steps=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trajectory.png"]
