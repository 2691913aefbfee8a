"""Stage 2 over codes: the cache, the run, resuming, several processes, publishing, and what is refused."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from processes import carry_out, job
from safetensors.torch import load_file
from tiny_runs import SMALL_VQ, autoencoder_config, diffusion_config, discrete_config, discrete_tree, write_yaml
from tiny_text import text_tree, write_captioned

from latentdiff.checkpoints import load
from latentdiff.cli.info import info
from latentdiff.config import parse_config
from latentdiff.data.latent_cache import build_cache, open_cache
from latentdiff.errors import UserError
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.training import state, train
from latentdiff.training.images import Images
from latentdiff.training.publish import publish
from latentdiff.training.train_discrete import spread_times


def refusal(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(run):
    return load_file(run / "model" / "unet" / "diffusion_pytorch_model.safetensors")


def test_training_learns_the_codes(discrete_run, curves):
    losses = curves(discrete_run)["train/loss"]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    validation = curves(discrete_run)["validation/loss_ema"][-1]
    assert 0 < validation < torch.tensor(6.0).log()  # better than a uniform guess
    assert len(list((discrete_run / "pictures").glob("*.png"))) == 1
    record = json.loads((discrete_run / "model" / "latentdiff.json").read_text())
    assert record["codes"]["shape"] == [1, 8, 8] and record["codes"]["codes"] == 6
    assert 0.5 < record["codes"]["usage"][0] <= 1 and 1 < record["codes"]["perplexity"][0] <= 6


def test_the_cache_holds_codes_and_those_of_mirrored_images(discrete_run, stripe_folder, vq_run):
    cache = open_cache(discrete_run / "codes")
    assert cache.holds_codes and cache.has_flips
    codec = LatentCodec(load_autoencoder(str(vq_run)))
    images = Images(discrete_config(stripe_folder, discrete_run, vq_run).data, codec.factor).samples
    rows = torch.tensor([3, 0, 30])
    plain = codec.codes(images.batch(rows)[0])
    mirrored = codec.codes(images.batch(rows, flips=True)[0])
    flips = torch.tensor([False, True, False])
    expected = torch.where(flips[:, None, None, None], mirrored, plain)
    assert torch.equal(cache.codes(rows, flips), expected)
    assert not torch.equal(mirrored, plain)
    everything = [cache.codes(range(len(cache)), side) for side in (False, True)]
    assert torch.equal(cache.code_counts(6)[0], torch.bincount(torch.cat(everything).flatten(), minlength=6))


def test_a_cache_of_latents_is_no_cache_of_codes(tmp_path, stripe_folder, vq_run):
    config = discrete_config(stripe_folder, tmp_path / "run", vq_run, cache__folder=str(tmp_path / "cache"))
    codec = LatentCodec(load_autoencoder(str(vq_run)))
    images = Images(config.data, codec.factor).samples
    build_cache(codec, images, tmp_path / "cache")
    assert "other content" in refusal(lambda: train(config))
    build_cache(codec, images, tmp_path / "codes", codes=True)
    assert "other content" in refusal(lambda: build_cache(codec, images, tmp_path / "codes"))


@pytest.mark.parametrize("process", ["absorbing", "uniform"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, stripe_folder, vq_run, curves, process):
    changes = {"process": process, "data__flips": True, "model__config__dropout": 0.2, "weighting": "bound"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(discrete_config(stripe_folder, whole, vq_run, **changes, train__steps=5))
    train(discrete_config(stripe_folder, broken, vq_run, **changes, train__steps=2))
    train(discrete_config(stripe_folder, broken, vq_run, **changes, train__steps=5), resume=True)
    first, second = weights(whole), weights(broken)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert curves(whole)["train/loss"][2:] == curves(broken)["train/loss"][2:]
    assert curves(whole)["validation/loss_ema"][-1] == curves(broken)["validation/loss_ema"][-1]


def test_two_processes_and_pieces_take_the_steps_of_one(tmp_path, stripe_folder, vq_run):
    smooth = {"optimizer__eps": 1e-3, "optimizer__lr": 3e-3, "data__flips": True, "model__config__dropout": 0.1}
    ways = {"one": (1, None), "pieces": (1, 3), "two": (2, 2)}
    jobs = []
    for name, (world, piece) in ways.items():
        folder = str(tmp_path / "codes")
        changes = {**smooth, "train__steps": 4, "cache__folder": folder, "train__micro_batch": piece}
        tree = discrete_tree(stripe_folder, tmp_path / name, vq_run, **changes)
        jobs.append(job(write_yaml(tmp_path / f"{name}.yaml", tree), world))
    for (name, (world, _)), result in zip(ways.items(), carry_out(jobs), strict=True):
        assert result["codes"] == [0] * world, (name, result["stderr"])
    one = state.load_state(tmp_path / "one")[0]["model"]
    for name in ("pieces", "two"):
        other = state.load_state(tmp_path / name)[0]["model"]
        assert max(float((other[key] - value).abs().max()) for key, value in one.items()) <= 1e-5, name


def test_a_snapshot_is_published(discrete_run, tmp_path):
    folder = publish(discrete_run, out=tmp_path / "again")
    first, second = weights(discrete_run), load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_captions_guide_it(tmp_path, vq_run):
    data = write_captioned(tmp_path / "data")
    tree = text_tree(data, tmp_path / "run", vq_run, stage="discrete", train__steps=2, sample__prompts=["down stripes"])
    train(parse_config(tree))
    pipe = load(tmp_path / "run" / "model")
    pipe.set_progress_bar_config(disable=True)
    call = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "codes"}
    draws = [[torch.Generator().manual_seed(5)] for _ in range(3)]
    down, again, across = (
        pipe(prompt=prompt, generator=draw, **call).images
        for prompt, draw in zip(("down stripes", "down stripes", "a picture of across"), draws, strict=True)
    )
    assert torch.equal(down, again) and not torch.equal(down, across)


def test_residual_codes_have_a_channel_for_each_level(tmp_path, stripe_folder):
    changes = {**SMALL_VQ, "model__type": "ResidualVQModel"}
    changes["model__config"] = {**SMALL_VQ["model__config"], "num_quantizers": 2}
    train(autoencoder_config(stripe_folder, tmp_path / "ae", **changes, train__steps=2))
    train(discrete_config(stripe_folder, tmp_path / "run", tmp_path / "ae", train__steps=2))
    pipe = load(tmp_path / "run" / "model")
    assert pipe.code_shape == (2, 8, 8) and pipe.unet.config.in_channels == 2 * 7 and pipe.unet.config.out_channels == 2 * 6
    codec, images = LatentCodec(pipe.vae), torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = pipe.encode_codes(images)
    assert torch.equal(codes, codec.codes(images))
    swapped = codes.flip(0)  # of another picture, so the decoder would find other codes by itself
    swapped[:, 0] = codes[:, 0]
    expected = (codec.decode_codes(swapped) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(pipe.decode_codes(swapped, "pt"), expected)


def test_info_says_what_a_run_will_cost(tmp_path, stripe_folder, vq_run):
    path = write_yaml(tmp_path / "run.yaml", discrete_tree(stripe_folder, tmp_path / "run", vq_run, data__flips=True))
    facts = info(path)
    assert facts["latent_shape"] == [1, 8, 8] and facts["unknown"] == {}
    assert facts["latent_cache"]["bytes"] == facts["data"]["images"] * 64 * 4 * 2
    assert facts["parameters"]["unet"] > 1000 and facts["step"]["seconds"] > 0


def test_times_are_spread_evenly_and_each_is_uniform():
    draws = torch.stack([spread_times(8, torch.Generator().manual_seed(seed)) for seed in range(500)])
    assert draws.min() > 0 and draws.max() <= 1
    gaps = draws.sort(dim=1).values.diff(dim=1)
    assert torch.allclose(gaps, torch.full_like(gaps, 1 / 8))
    assert abs(float(draws[:, 0].mean()) - 0.5) < 0.05  # of one sample over the seeds; 4 standard errors


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"condition__type": "class+image"}, "condition.type: class+image, and stage discrete takes no second image"),
        ({"process": "uniform", "sample__order": "confidence"}, "sample.order: confidence is for process absorbing"),
        ({"schedule": "linea"}, "schedule: 'linea' is unknown for codes; valid: linear"),
        ({"cache__use_mean": True}, "cache.use_mean: codes have no posterior"),
        ({"model__config__in_channels": 3}, "model.config.in_channels: leave it out"),
        ({"sample__guidance": 2.0, "condition__dropout": 0.0}, "sample.guidance: 2 needs an unconditional prediction"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, stripe_folder, vq_run, changes, said):
    config = discrete_config(stripe_folder, tmp_path / "run", vq_run, **changes)
    assert said in refusal(lambda: train(config))
    assert not (tmp_path / "run").exists()


def test_an_autoencoder_without_a_codebook_is_refused(tmp_path, stripe_folder, autoencoder_run):
    message = refusal(lambda: train(discrete_config(stripe_folder, tmp_path / "run", autoencoder_run)))
    assert "AutoencoderKL has no codebook" in message and not (tmp_path / "run").exists()


def test_keys_of_latent_diffusion_are_unknown(tmp_path, stripe_folder, vq_run):
    tree = discrete_tree(stripe_folder, tmp_path, vq_run, prediction="flow")
    assert "prediction: unknown key" in refusal(lambda: parse_config(tree))


@pytest.fixture(scope="module")
def latent_run(tmp_path_factory, stripe_folder, vq_run):
    """A diffusion model over the latents that the codes stand for."""
    output = tmp_path_factory.mktemp("latents")
    train(diffusion_config(stripe_folder, output, vq_run, train__steps=2))
    return output


def test_a_model_over_latents_is_the_start_of_one_over_codes(tmp_path, stripe_folder, vq_run, latent_run):
    config = discrete_config(
        stripe_folder, tmp_path / "run", vq_run, model={"pretrained": str(latent_run / "model")}, optimizer__lr=1e-9
    )
    train(config)
    before, after = weights(latent_run), weights(tmp_path / "run")
    anew = {"conv_in.weight", "conv_out.weight", "conv_out.bias"}
    assert before.keys() == after.keys()
    assert {name for name in before if before[name].shape != after[name].shape} == anew
    for name in before.keys() - anew:
        torch.testing.assert_close(after[name].float(), before[name].float(), rtol=2e-3, atol=2e-3)
    pipe = load(tmp_path / "run" / "model")
    assert pipe(class_labels=["down"], num_inference_steps=2).images[0].size == (16, 16)
    facts = info(str(write_yaml(tmp_path / "d.yaml", config.model_dump(mode="json"))))
    assert not [line for line in facts["warnings"] if "U-Net" in line]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "UNet2DModel"}, "model.type and model.config: leave them out"),
        ({"condition__dropout": 0.0}, "its num_class_embeds is 4"),
        ({"condition__type": "none"}, "takes class"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path, stripe_folder, vq_run, latent_run, changes, said):
    changes = {"model": {"pretrained": str(latent_run / "model")}, **changes}
    assert said in refusal(lambda: train(discrete_config(stripe_folder, tmp_path / "run", vq_run, **changes)))


def test_a_start_over_other_latents_is_refused(tmp_path, stripe_folder, vq_run, latent_run):
    config = json.loads((latent_run / "model" / "unet" / "config.json").read_text())
    UNet2DModel.from_config({**config, "in_channels": 5, "out_channels": 5}).save_pretrained(tmp_path / "other")
    changes = {"model": {"pretrained": str(tmp_path / "other")}}
    said = refusal(lambda: train(discrete_config(stripe_folder, tmp_path / "run", vq_run, **changes)))
    assert "its codes stand for vectors of" in said and "has in_channels 5 and out_channels 5" in said
