"""A bridge between two data sets: exact between Gaussians, and a training run draws what it should from both sides."""

import json

import numpy as np
import pytest
import torch
from exact import Gaussian, gaussian
from PIL import Image
from planted import planted
from stripes import CLASSES
from tiny_runs import diffusion_config, diffusion_tree, write_stripes, write_yaml

from latentdiff import samplers
from latentdiff.checkpoints import load
from latentdiff.cli.info import info
from latentdiff.config import parse_config
from latentdiff.denoiser import Denoiser
from latentdiff.editing import edit, variations
from latentdiff.errors import UserError
from latentdiff.objective import diffusion_loss
from latentdiff.pipelines.latent_diffusion import PipelineInputError
from latentdiff.schedules import make_schedule
from latentdiff.training import bridge, conditioning, train
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.encode import encode_dataset
from latentdiff.training.publish import publish
from latentdiff.translation import cycle_error_of_images, encode_images, interpolate_images, translate_images
from latentdiff.utils.random import generators

FLOW = {"schedule": {"name": "flow"}, "prediction": "flow", "noise_levels": {"name": "uniform"}}
WHOLE = torch.linspace(1, 0, 101, dtype=torch.float64)
# From N(m1, C1) at t = 1 to N(m0, C0) at t = 0
START, END = gaussian(3, seed=3), gaussian(3, seed=8)


def draw(g: Gaussian, n: int, seed: int) -> torch.Tensor:
    noise = torch.randn((n, len(g.mean)), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g.mean + noise @ torch.linalg.cholesky(g.covariance).T


def velocity(start: Gaussian, end: Gaussian):
    """E[x1 - x0 given x_t] for independent ends: m1 - m0 + (t C1 - (1 - t) C0) S^-1 (x - (1 - t) m0 - t m1)."""

    def model(x, t):
        t = t.double()[:, None]
        inner = (1 - t) * end.mean + t * start.mean
        t = t[..., None]
        spread = (1 - t) ** 2 * end.covariance + t**2 * start.covariance
        slope = t * start.covariance - (1 - t) * end.covariance
        moved = torch.linalg.solve(spread, (x - inner)[..., None])
        return start.mean - end.mean + (slope @ moved)[..., 0]

    return model


def exact(start: Gaussian, end: Gaussian) -> Denoiser:
    return Denoiser(velocity(start, end), make_schedule("flow"), "flow")


# Between Gaussians


@pytest.mark.parametrize("sampler", ["heun", "euler", "dpmpp_2m"])
def test_between_gaussians_that_commute_it_is_the_monotone_map(sampler):
    """x -> m0 + (s0 / s1) (x - m1) in each dimension."""
    stds = torch.tensor([[0.5, 1.0, 2.0], [1.5, 1.0, 0.25]], dtype=torch.float64)
    start, end = (Gaussian(g.mean, torch.diag(std**2)) for g, std in zip((START, END), stds, strict=True))
    x1 = draw(start, 50, seed=1)
    truth = end.mean + stds[1] / stds[0] * (x1 - start.mean)
    grid = WHOLE if sampler != "dpmpp_2m" else "angle"  # it starts at t_max, as the published scheduler does
    result = samplers.sample(exact(start, end), x1, sampler, steps=100, grid=grid)
    error = {"heun": 0.005, "euler": 0.15, "dpmpp_2m": 0.02}[sampler]
    torch.testing.assert_close(result, truth, rtol=0, atol=error)


def test_any_gaussian_is_taken_to_the_other_one():
    """The map is affine; with its matrix M and offset: M C1 M' = C0, and m1 goes to m0."""
    points = torch.cat([START.mean[None], START.mean + torch.eye(3).double()])
    result = samplers.sample(exact(START, END), points, "heun", grid=WHOLE)
    matrix = (result[1:] - result[0]).T
    torch.testing.assert_close(result[0], END.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(matrix @ START.covariance @ matrix.T, END.covariance, rtol=0, atol=2e-3)


def trained(x0: torch.Tensor, x1: torch.Tensor, t: torch.Tensor) -> Denoiser:
    """The network of the least `diffusion_loss` among those that are affine in x, with splines of t for coefficients.

    The loss is a quadratic form of the coefficients, so its minimum is one linear solve.
    """
    knots = torch.linspace(0, 1, 17, dtype=torch.float64)

    def features(x, t):
        hats = (1 - (t.double()[:, None] - knots).abs() * 16).clamp_min(0)  # [B, 17]
        affine = torch.cat([torch.ones(len(x), 1).double(), x.double()], 1)  # [B, 4]
        return (hats[:, :, None] * affine[:, None]).flatten(1)

    weights = torch.zeros(17 * 4, x0.shape[1], dtype=torch.float64, requires_grad=True)
    denoiser = Denoiser(lambda x, t: (features(x, t) @ weights).to(x.dtype), make_schedule("flow"), "flow")
    columns = features(*(each.float() for each in ((1 - t)[:, None] * x0 + t[:, None] * x1, t)))
    loss = diffusion_loss(denoiser, x0, t, x1).mean()  # at weights 0: its gradient is minus 2 / D times columns' y
    (gradient,) = torch.autograd.grad(loss, weights)
    normal = columns.T @ columns / len(x0) * 2 / x0.shape[1]
    with torch.no_grad():
        weights.copy_(torch.linalg.solve(normal + 1e-9 * torch.eye(len(normal)).double(), -gradient))
    return denoiser


def test_what_training_minimises_gives_the_known_map():
    n = 60_000
    x0, x1 = draw(END, n, seed=1), draw(START, n, seed=2)
    t = torch.rand(n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    learnt, points = trained(x0, x1, t), draw(START, 20, seed=4)
    truth = samplers.sample(exact(START, END), points, "heun", grid=WHOLE)
    torch.testing.assert_close(samplers.sample(learnt, points, "heun", grid=WHOLE), truth, rtol=0, atol=0.06)
    # Pairs that belong together are another coupling, and another map
    paired = trained(x0, START.mean + (x0 - END.mean) @ torch.diag(torch.tensor([1.0, -1.0, 1.0])).double(), t)
    assert float((samplers.sample(paired, points, "heun", grid=WHOLE) - truth).abs().max()) > 0.5


# A training run


@pytest.fixture(scope="module")
def dark(tmp_path_factory):
    """40 grey 16x16 images without classes, darker than the stripes."""
    folder = tmp_path_factory.mktemp("dark")
    for k, pixels in enumerate(np.random.default_rng(5).integers(0, 120, (40, 16, 16), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{k:02d}.png")
    return folder


@pytest.fixture
def trainer(stripe_folder, autoencoder_run, tmp_path, dark):
    """trainer(**changes) -> the trainer of a bridge before its first step; its source is `dark`."""

    def build(**changes):
        tree = {**FLOW, "bridge": {"source": str(dark)}, "train__batch_size": 8, **changes}
        config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **tree)
        accelerator = start_accelerator(config.train)
        codec, images = stage2.open_inputs(config, accelerator.device)
        latents = stage2.prepare_latents(config, accelerator, None, (codec, images))
        source = bridge.open_source(config, latents, bridge.open_images(config, images, codec), accelerator)
        torch.manual_seed(0)
        conditions = conditioning.prepare_conditions(config, latents, accelerator)
        made = stage2.DiffusionTrainer(config, latents, conditions, accelerator, source)
        made.prepare_validation()
        return made

    return build


def distances(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Of each row to the nearest of the others, [B]."""
    return torch.cdist(rows.flatten(1), others.flatten(1), compute_mode="donot_use_mm_for_euclid_dist").min(1).values


def test_a_batch_starts_from_the_source_in_an_order_of_its_own(trainer):
    made = trainer(cache__use_mean=True)
    batch = made.draw_batch(3)
    of_source = made.source.latents.normalised(torch.arange(30), None, False)
    of_data = made.latents.normalised(torch.arange(len(made.latents.cache)), None, False)
    assert len(made.source.latents.cache) == 30
    assert float(distances(batch.noise, of_source).max()) < 1e-5 < 0.1 < float(distances(batch.noise, of_data).min())
    assert float(distances(batch.x0, of_data).max()) < 1e-5
    held_out = made.validation["noise"]
    assert float(distances(held_out, of_source).min()) > 0.1
    assert torch.equal(held_out, made.source.held_out(len(held_out)))


def check_independent(draw, made):
    """A bridge from a data set to itself: the pairs are not an image and itself."""
    made.source.draw = lambda *arguments: draw(made.source, *arguments)
    pairs = [made.draw_batch(step) for step in range(6)]
    same = torch.cat([(batch.noise - batch.x0).flatten(1).abs().amax(1) < 1e-5 for batch in pairs])
    assert 0 <= int(same.sum()) < 8  # of 48 pairs, one in 36 by chance


def test_the_ends_are_drawn_independently(trainer, stripe_folder):
    made = trainer(cache__use_mean=True, bridge={"source": str(stripe_folder)})
    check_independent(bridge.Source.draw, made)
    bug = ('derive_seed(self.seed, "bridge")', "self.seed")
    with pytest.raises(AssertionError):
        check_independent(planted(bridge.Source.draw, bug), made)


def test_the_posterior_of_the_source_is_drawn_and_two_processes_share_a_batch(trainer):
    made = trainer()
    first, again = made.draw_batch(2), made.draw_batch(2)
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, made.draw_batch(3).noise)
    noise = torch.randn((8, *made.latents.cache.latent_shape), generator=torch.Generator().manual_seed(0))
    whole = made.source.draw(2, noise, slice(0, 8), 8)
    halves = [made.source.draw(2, noise[rows], rows, 8) for rows in (slice(0, 4), slice(4, 8))]
    assert torch.equal(torch.cat(halves), whole)
    mean = made.source.draw(2, torch.zeros_like(noise), slice(0, 8), 8)
    spread = (whole - mean) / noise
    assert float(spread.min()) >= 0 and float(spread.max()) > 0


def test_the_loss_is_that_of_the_path_between_the_two(trainer):
    made = trainer()
    batch = made.draw_batch(0)
    seen = {}

    def output(x_t, t, **conditions):
        seen["x_t"] = x_t
        return torch.zeros_like(x_t)

    made.denoiser.output = output
    loss = diffusion_loss(made.denoiser, batch.x0, batch.t, batch.noise)
    t = batch.t.float()[:, None, None, None]
    torch.testing.assert_close(seen["x_t"], (1 - t) * batch.x0 + t * batch.noise)
    torch.testing.assert_close(loss, (batch.noise - batch.x0).square().flatten(1).mean(1))


@pytest.fixture(scope="module")
def finished(stripe_folder, autoencoder_run, dark, tmp_path_factory):
    """Output folder of a finished bridge of 40 steps."""
    output = tmp_path_factory.mktemp("bridge") / "run"
    tree = {**FLOW, "bridge": {"source": str(dark)}, "train__steps": 40, "train__picture_every": 20}
    train(diffusion_config(stripe_folder, output, autoencoder_run, **tree))
    return output


def test_a_run_publishes_a_bridge_that_starts_from_images_alone(finished, dark, stripe_folder):
    assert len(list((finished / "pictures").glob("*.png"))) == 2
    meta = json.loads((finished / "model" / "latentdiff.json").read_text())
    assert meta["bridge"]["source"] == str(dark) and meta["bridge"]["images"] == 30
    pipe = load(finished / "model")
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(PipelineInputError, match="is a bridge from .*: give latents="):
        pipe(class_labels=[0])
    images = torch.stack([torch.from_numpy(np.array(Image.open(dark / f"{k:02d}.png"))) for k in range(4)])
    images = images[:, None].float() / 127.5 - 1
    z = encode_images(pipe, images, generators(0, range(4)))
    with pytest.raises(PipelineInputError, match="sampler 'ancestral' adds noise, and a bridge has none"):
        pipe(class_labels=[0] * 4, latents=z, sampler="ancestral")
    result = translate_images(pipe, images, to=CLASSES[:1], steps=20, guidance=1.0, generator=generators(0, range(4)))
    by_pipe = pipe(class_labels=[0] * 4, latents=z, num_inference_steps=60, guidance_scale=1.0, output_type="pt").images * 2 - 1
    torch.testing.assert_close(result, by_pipe, rtol=0, atol=0.05)
    assert float(result.mean() - images.mean()) > 0.2  # the stripes are lighter
    assert float(cycle_error_of_images(pipe, images, to=[0], steps=40, generator=generators(0, range(4))).max()) < 0.05
    with pytest.raises(UserError, match="a bridge from .* takes images alone"):
        translate_images(pipe, images, ["across"], ["down"])
    for needs_noise in (
        lambda: interpolate_images(pipe, images[:2], images[2:], [0.5]),
        lambda: variations(pipe, images / 2 + 0.5),
    ):
        with pytest.raises(UserError, match="MODEL: is a bridge, which starts from images of"):
            needs_noise()
    with pytest.raises(UserError, match="--sampler: goes with .*, not translate"):
        edit(finished / "model", [dark / "00.png"], sampler="heun", out=finished / "x.png")


def test_a_bridge_goes_on_only_with_the_source_it_had(finished, stripe_folder, autoencoder_run, dark, tmp_path):
    tree = {**FLOW, "bridge": {"source": str(dark)}, "train__steps": 42, "train__picture_every": 20}
    train(diffusion_config(stripe_folder, finished, autoencoder_run, **tree), resume=True)
    other = write_stripes(tmp_path / "other", seed=9)
    changed = diffusion_config(stripe_folder, finished, autoencoder_run, **{**tree, "bridge": {"source": str(other)}})
    with pytest.raises(UserError, match="bridge.source"):
        train(changed, resume=True)
    folder = publish(finished, out=tmp_path / "again")
    assert load(folder).config.bridge == str(dark)


def test_encode_builds_both_caches(stripe_folder, autoencoder_run, dark, tmp_path):
    tree = {**FLOW, "bridge": {"source": str(dark), "cache": str(tmp_path / "dark")}, "cache__folder": str(tmp_path / "light")}
    path = write_yaml(tmp_path / "b.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **tree))
    encode_dataset(path, progress=False)
    counts = [json.loads((tmp_path / name / "manifest.json").read_text())["identity"]["count"] for name in ("light", "dark")]
    assert counts == [36, 30]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"schedule": "vp"}, "schedule: vp is for noise, .*; valid: flow"),
        ({"prediction": "v_prediction"}, "prediction: v_prediction is for noise, .*; valid: flow"),
        ({"weighting": "min_snr"}, "weighting: min_snr is for noise, .*; valid: none, uncertainty"),
        ({"sample": {"scheduler": None, "sampler": "ancestral"}}, "sample.sampler: ancestral adds noise"),
        ({"bridge": {"source": "nowhere"}}, "nowhere"),
        ({"bridge": {"cache": "x"}}, "bridge.source: this key is required"),
    ],
)
def test_what_a_bridge_cannot_be_is_refused_before_anything_is_written(
    change, said, stripe_folder, autoencoder_run, dark, tmp_path
):
    with pytest.raises(UserError, match=said):
        tree = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **FLOW, bridge={"source": str(dark)})
        train(parse_config({**tree, **change}))
    assert not (tmp_path / "run").exists()


def test_info_counts_the_source_too(stripe_folder, autoencoder_run, finished, dark, tmp_path):
    plans = []
    for more in ({}, {"bridge": {"source": str(dark)}}):
        tree = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **FLOW, **more)
        plans.append(info(write_yaml(tmp_path / "c.yaml", tree)))
    assert "bridge" not in plans[0]
    assert plans[1]["bridge"]["source"] == str(dark) and plans[1]["bridge"]["images"] == 30
    assert plans[1]["bridge"]["latent_cache"]["folder"] != plans[1]["latent_cache"]["folder"]
    assert info(finished / "model")["bridge"]["images"] == 30


def test_a_source_of_another_size_is_refused(stripe_folder, autoencoder_run, tmp_path):
    other = write_stripes(tmp_path / "large", size=32)
    tree = {**FLOW, "bridge": {"source": str(other)}, "data__size": None}
    config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **tree)
    with pytest.raises(UserError, match="bridge.source: its images are 32x32, and those of data are 16x16"):
        train(config)
