"""Stage 1 with its encoder frozen: the decoder learns, and latents, with all that was made of them, stay as they are."""

import json

import pytest
import torch
from processes import carry_out, job
from test_processes import ADVERSARY, CODEBOOK, SMOOTH, at
from test_training import refusal
from tiny_runs import autoencoder_config, autoencoder_tree, diffusion_config, write_yaml

from latentdiff import LatentDiffusionPipeline
from latentdiff.config import DataConfig, parse_config
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.training import train, train_autoencoder
from latentdiff.training.images import Images


def continued(data, output, start, **changes):
    # a picture in the midst: drawing it must not free the encoder
    changes = {"model": {"pretrained": str(start)}, "freeze_encoder": True, "train__picture_every": 2, **changes}
    return autoencoder_tree(data, output, **changes)


def train_on(data, output, start, resume=False, **changes):
    train(parse_config(continued(data, output, start, **changes)), resume=resume)
    return output


def changed(first, second) -> set[str]:
    """The parts whose weights differ between two autoencoders of one architecture."""
    a, b = first.state_dict(), second.state_dict()
    return {key.split(".")[0] for key in a if not torch.equal(a[key], b[key])}


def held_out_error(vae, data) -> float:
    codec = LatentCodec(vae)
    x, _ = Images(DataConfig(source=str(data), size=(16, 16), channels=1, held_out=0.25), codec.factor).held_out_batch(12)
    return float((codec.reconstruct(x) - x).square().mean())


def test_the_decoder_gets_better_and_the_latents_stay(tmp_path, stripe_folder, autoencoder_run):
    run = train_on(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=60, loss__kl=0.0, **ADVERSARY)
    before, after = load_autoencoder(str(autoencoder_run)), load_autoencoder(str(run))
    assert changed(before, after) == {"decoder", "post_quant_conv"}
    assert {k: v for k, v in before.config.items() if k[0] != "_"} == {k: v for k, v in after.config.items() if k[0] != "_"}
    assert held_out_error(after, stripe_folder) < 0.7 * held_out_error(before, stripe_folder)
    assert (run / "report.png").is_file() and json.loads((run / "report.json").read_text())["images"] == 12


def test_a_codebook_is_frozen_with_its_encoder_and_not_revived(tmp_path, stripe_folder):
    changes = {**CODEBOOK, "loss__commitment": 1.0}
    train(autoencoder_config(stripe_folder, tmp_path / "start", **changes, train__steps=3))
    run = train_on(stripe_folder, tmp_path / "run", tmp_path / "start", train__steps=12)  # 4 steps an epoch
    used = [json.loads(line).get("codes/used", 1.0) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert min(used) < 1.0  # so there were codes to revive
    before, after = load_autoencoder(str(tmp_path / "start")), load_autoencoder(str(run))
    assert changed(before, after) == {"decoder", "post_quant_conv"}


def test_a_resumed_run_is_the_run(tmp_path, stripe_folder, autoencoder_run):
    whole = train_on(stripe_folder, tmp_path / "whole", autoencoder_run, train__steps=8)
    broken = train_on(stripe_folder, tmp_path / "broken", autoencoder_run, train__steps=5)
    train_on(stripe_folder, broken, autoencoder_run, resume=True, train__steps=8)
    a, b = at(whole, 8), at(broken, 8)
    assert {name: set(group) for name, group in a.items()} == {name: set(group) for name, group in b.items()}
    assert all(torch.equal(value, b[name][key]) for name, group in a.items() for key, value in group.items())


def test_two_processes_take_the_steps_of_one(tmp_path, stripe_folder, autoencoder_run):
    jobs = []
    for name, world in (("one", 1), ("two", 2)):
        tree = continued(
            stripe_folder,
            tmp_path / name,
            autoencoder_run,
            train__steps=8,
            latent_noise=0.3,
            **SMOOTH,
            **ADVERSARY,
            train__micro_batch=3,
            train__gradient_checkpointing=True,
        )
        jobs.append(job(write_yaml(tmp_path / f"{name}.yaml", tree), world))
    for result in carry_out(jobs):
        assert set(result["codes"]) == {0}, result["stderr"]
    one, two = at(tmp_path / "one", 8), at(tmp_path / "two", 8)
    for key, value in one["model"].items():
        assert float((two["model"][key] - value).abs().max()) <= 1e-5, key
    start, end = load_autoencoder(str(autoencoder_run)), load_autoencoder(str(tmp_path / "one"))
    assert changed(start, end) == {"decoder", "post_quant_conv"}


def test_a_pipeline_takes_the_new_decoder(tmp_path, stripe_folder, autoencoder_run, model):
    """The decoder of a run that began from a pipeline's folder goes into it: same latents, other pixels."""
    run = train_on(stripe_folder, tmp_path / "run", model, train__steps=6)
    old = LatentDiffusionPipeline.from_pretrained(str(model))
    new = LatentDiffusionPipeline.from_pretrained(str(model), vae=load_autoencoder(str(run)))
    made = {}
    for name, pipe in (("old", old), ("new", new)):
        for kind in ("latent", "pt"):
            made[name, kind] = pipe(
                class_labels=0, num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type=kind
            ).images
    assert torch.equal(made["old", "latent"], made["new", "latent"]) and not torch.equal(made["old", "pt"], made["new", "pt"])


def test_a_decoder_that_learned_from_noised_latents_forgives_errors(tmp_path, stripe_folder, autoencoder_run):
    """Beside the same training without the noise, errors of the latents show less in the images."""
    errors, changes = {}, {"train__steps": 60, "loss__kl": 0.0}
    for tau in (0.0, 0.6):
        run = train_on(stripe_folder, tmp_path / f"{tau}", autoencoder_run, latent_noise=tau, **changes)
        codec = LatentCodec(load_autoencoder(str(run)))
        images = Images(DataConfig(source=str(stripe_folder), size=(16, 16), channels=1, held_out=0.25), codec.factor)
        x, _ = images.held_out_batch(12)
        z = codec.normalise(codec.moments(x)[0])
        noised = z + 0.6 * torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        errors[tau] = float((codec.decode(noised) - x).square().mean())
    assert errors[0.6] < 0.9 * errors[0.0]


def test_latent_noise_is_of_the_latents_scale(autoencoder_run):
    """The decoder is given z + level std n: of a normaliser with another scale, another noise."""
    vae = load_autoencoder(str(autoencoder_run))
    codec = LatentCodec(vae)
    given = []
    vae.decode = lambda z: given.append(z) or type("Out", (), {"sample": z})
    x = torch.zeros(2, 1, 16, 16)
    model = train_autoencoder.EncoderDecoder(vae, codec.scale)
    noise = torch.ones(2, codec.latent_channels, 16 // codec.factor, 16 // codec.factor)
    with torch.no_grad():
        mean, std = codec.moments(x)
        model(x, noise, torch.tensor([0.0, 3.0]))
    moved = codec.normalise(given[0]) - codec.normalise(mean)
    spread = std * codec.scale[:, None, None]
    assert torch.allclose(moved[0], spread[0], atol=1e-4)
    assert torch.allclose(moved[1], (spread[1].square() + 9).sqrt(), atol=1e-4)


def test_latent_noise_needs_finished_latents(tmp_path, stripe_folder, autoencoder_run):
    for changes in ({}, {"model": {"pretrained": str(autoencoder_run)}}):
        message = refusal(lambda c=changes: train(autoencoder_config(stripe_folder, tmp_path / "run", latent_noise=0.3, **c)))
        assert message.startswith("latent_noise: ") and "freeze_encoder" in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{}, {"model__type": "AutoencoderKL"}])
def test_there_must_be_an_encoder_to_freeze(tmp_path, stripe_folder, changes):
    message = refusal(lambda: train(autoencoder_config(stripe_folder, tmp_path / "run", freeze_encoder=True, **changes)))
    assert message.startswith("freeze_encoder: needs model.pretrained") and not (tmp_path / "run").exists()


def test_a_cache_and_a_unet_of_the_old_decoder_are_of_the_new_one_too(tmp_path, stripe_folder, autoencoder_run):
    run = train_on(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=4)
    cache = {"cache__folder": str(tmp_path / "latents"), "train__steps": 2}
    train(diffusion_config(stripe_folder, tmp_path / "first", autoencoder_run, **cache))
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "latents").rglob("*.safetensors")}
    train(diffusion_config(stripe_folder, tmp_path / "second", run, **cache))
    assert written and {p: p.stat().st_mtime_ns for p in (tmp_path / "latents").rglob("*.safetensors")} == written
