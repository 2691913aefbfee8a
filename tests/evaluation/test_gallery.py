"""The gallery: what each picture shows is what its name says."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import checkpoints
from latentdiff.denoiser import Denoiser
from latentdiff.evaluation.gallery import (
    COLUMNS,
    SCALES,
    STRENGTHS,
    GallerySampler,
    _pairs,
    classifier_columns,
    interpolation,
    trajectory,
)
from latentdiff.generation import generate_batches
from latentdiff.guidance import LatentClassifier
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
    draw = generators(derive_seed(stage.seed, "posterior", 0), stage.labels.tolist())
    return stage.codec.latents(images, draw)


def test_a_picture_that_is_done_is_not_lost_with_the_next(monkeypatch, model, stripe_folder, tmp_path):
    from latentdiff.evaluation import gallery

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery, "interpolation", fail)
    with pytest.raises(KeyboardInterrupt):
        gallery.gallery(model, str(stripe_folder), tmp_path / "out", steps=2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["trajectory.png"]
