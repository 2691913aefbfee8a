"""Folders and files that others made: Stable Diffusion's layout runs and trains on, original single files are imported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file
from tiny_models import tiny_vae
from tiny_runs import diffusion_tree, write_yaml
from tiny_stable import BETAS, WEIGHTS, change_json, open_stock, stable_parts, write_original, write_stable
from tiny_text import write_captioned

from latentdiff import checkpoints, samplers
from latentdiff.config import parse_config
from latentdiff.denoiser import Denoiser
from latentdiff.errors import UserError
from latentdiff.likelihood import log_prob
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.codec import LatentCodec
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
from latentdiff.training import train
from latentdiff.training.images import Images
from latentdiff.utils.random import generators

PROMPTS = ["a picture of stripes", "blank"]
TOLERANCE = dict(rtol=0, atol=1e-4)
PNDM = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1)


@pytest.fixture(scope="module")
def stable(tmp_path_factory):
    return write_stable(tmp_path_factory.mktemp("stable") / "model", scheduler=PNDM)


@pytest.fixture
def copied(stable, tmp_path):
    return Path(shutil.copytree(stable, tmp_path / "model"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_captioned(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def fitting(tmp_path_factory, data):
    """Such a folder whose scaling_factor is right for the data, as SD's 0.18215 is for photographs."""
    folder = write_stable(tmp_path_factory.mktemp("fitting") / "model", scheduler=PNDM)
    mean, std = raw_moments(folder, data)
    change_json(folder / "vae" / "config.json", scaling_factor=float((mean.square() + std.square()).mean().rsqrt()))
    return folder


def raw_moments(folder, data):
    return LatentCodec(load_autoencoder(str(folder))).moments(pictures(data))


def pictures(data):
    images = Images(parse_config(diffusion_tree(data, data, data, data__channels=3)).data, 2)
    return images.train.batch(torch.arange(16))[0]


def latents(pipe, scale=7.5, steps=5, **changes):
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    call = dict(prompt=PROMPTS, guidance_scale=scale, num_inference_steps=steps, output_type="latent", latents=x)
    return pipe(**{**call, **changes}).images


def refusal(action):
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("kind", ["pndm", "ddim"])
def test_the_image_is_diffusers_own(stable, kind):
    ours, stock = checkpoints.load(stable), open_stock(stable)
    assert type(ours) is LatentDiffusionPipeline and ours.vae.config.scaling_factor == 0.18215
    if kind == "ddim":
        for pipe in (ours, stock):
            pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    assert type(ours.scheduler) is type(stock.scheduler)
    expected = latents(stock)
    torch.testing.assert_close(latents(ours), expected, **TOLERANCE)
    torch.testing.assert_close(latents(LatentDiffusionPipeline.from_pretrained(stable)), latents(checkpoints.load(stable)))
    assert (latents(ours, scale=5.0) - expected).abs().max() > 1e-2
    assert (latents(ours, negative_prompt="blank") - expected).abs().max() > 1e-2
    pictures = [latents(pipe, output_type="np") for pipe in (ours, stock)]
    assert pictures[0].shape == (2, 16, 16, 3) and abs(pictures[0] - pictures[1]).max() < 1e-4
    # what a call does that says nothing: stock's own defaults
    assert ours.config.default_guidance_scale == 7.5 and ours.config.default_num_inference_steps == 50


@pytest.mark.parametrize("name", samplers.names())
def test_every_sampler_runs_on_it(stable, name):
    pipe = checkpoints.load(stable)
    call = dict(sampler=name, steps=6, generator=generators(0, range(2)))
    both = latents(pipe, **call)
    assert both.shape == (2, 4, 8, 8) and bool(both.isfinite().all())
    swapped = latents(pipe, prompt=PROMPTS[::-1], **{**call, "generator": generators(0, range(2))})
    assert (both - swapped).abs().max() > 1e-3


def test_the_log_density_of_a_latent_depends_on_the_prompt(stable):
    pipe = checkpoints.load(stable)
    x0 = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    call = dict(rtol=1e-3, atol=1e-3)
    values = []
    for prompts in (PROMPTS, PROMPTS[::-1]):
        denoiser = Denoiser.from_pipeline(pipe, **pipe.conditioning(prompts, [None]))
        values.append(log_prob(denoiser, x0, generator=generators(0, range(2)), **call).log_prob)
    assert bool(values[0].isfinite().all()) and (values[0] - values[1]).abs().max() > 1e-2


def test_info_says_what_it_is_and_that_nothing_else_is_known(stable, run):
    facts = json.loads(run("info", stable))
    assert facts["made_by"] == "unknown: the folder has no latentdiff.json" and facts["steps_trained"] is None
    assert facts["text"] == {"encoder": "CLIPTextModel", "tokens": 8, "width": 8}
    assert set(facts["parameters"]) == {"unet", "vae", "text_encoder"}
    assert (facts["prediction"], facts["scheduler"]) == ("epsilon", "PNDMScheduler")


def test_what_nobody_prepared_images_for_is_not_measured(stable, refused, data):
    assert "was not trained here" in refused("likelihood", stable, "--data", data)


LAYOUTS = {
    "variant": {"variant": "fp16"},
    "shards": {"max_shard_size": "40KB"},
    "sharded variant": {"max_shard_size": "40KB", "variant": "fp16"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_way_of_keeping_weights_is_read(stable, tmp_path, layout):
    folder = write_stable(tmp_path / "model", LAYOUTS[layout], scheduler=PNDM)
    assert not (folder / "unet" / WEIGHTS).exists()
    ours, plain = checkpoints.load(folder), checkpoints.load(stable)
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(plain, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(ours, part).state_dict().items())
    assert LatentCodec(load_autoencoder(str(folder))).fingerprint() == LatentCodec(plain.vae).fingerprint()
    if "shards" in layout:
        next((folder / "unet").glob("*-00002-of-*")).unlink()
        assert "00002-of-" in refusal(lambda: checkpoints.load(folder))


def test_a_variant_stands_back_behind_plain_weights_and_one_part_may_have_its_own(copied):
    (copied / "unet" / "diffusion_pytorch_model.non_ema.safetensors").write_bytes(b"not looked at")
    (copied / "vae" / WEIGHTS).rename(copied / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    assert (latents(checkpoints.load(copied)) - latents(open_stock_with_variant(copied))).abs().max() < 1e-4


def open_stock_with_variant(folder):
    plain = folder / "vae" / WEIGHTS
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors", plain)
    return open_stock(folder)


def test_names_of_older_libraries_are_read(stable, copied):
    rename(copied / "text_encoder" / "model.safetensors", lambda key: "text_model." + key.removeprefix("text_model."))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        there = (f"attentions.0.{new}.", f"attentions.0.{name}.")
        rename(copied / "vae" / WEIGHTS, lambda key, there=there: key.replace(*there))
    assert any(".proj_attn." in key for key in load_file(copied / "vae" / WEIGHTS))
    words = json.loads((copied / "tokenizer" / "tokenizer.json").read_text())["model"]
    (copied / "tokenizer" / "tokenizer.json").unlink()
    (copied / "tokenizer" / "vocab.json").write_text(json.dumps(words["vocab"]))
    merges = ["#version: 0.2", *(" ".join(pair) for pair in words["merges"])]
    (copied / "tokenizer" / "merges.txt").write_text("\n".join(merges) + "\n")
    torch.testing.assert_close(latents(checkpoints.load(copied)), latents(checkpoints.load(stable)))
    images = [latents(checkpoints.load(folder), output_type="pt") for folder in (copied, stable)]
    torch.testing.assert_close(*images)


def rename(file, change):
    save_file({change(key): value for key, value in load_file(file).items()}, file, {"format": "pt"})


def test_pickles_are_refused_and_code_of_the_folder_is_never_run(copied, tmp_path):
    planted = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass UNet2DConditionModel: pass\n"
    (copied / "pipeline.py").write_text(planted)
    (copied / "unet" / "mine.py").write_text(planted)
    assert latents(checkpoints.load(copied)).shape == (2, 4, 8, 8)
    index = (copied / "model_index.json").read_text()
    change_json(copied / "model_index.json", unet=["mine", "UNet2DConditionModel"])
    assert 'unet: ["mine", "UNet2DConditionModel"] is not a [library, class] pair' in refusal(lambda: checkpoints.load(copied))
    change_json(copied / "model_index.json", unet=["diffusers", "UNetOfTomorrow"])
    assert "diffusers has no class UNetOfTomorrow" in refusal(lambda: checkpoints.load(copied))
    (copied / "model_index.json").write_text(index)
    (copied / "unet" / WEIGHTS).rename(copied / "unet" / "diffusion_pytorch_model.bin")
    assert f"{copied / 'unet'}: only pickled weights (diffusion_pytorch_model.bin)" in refusal(lambda: checkpoints.load(copied))
    assert not (tmp_path / "ran").exists()


def drop(file, ending):
    save_file({key: value for key, value in load_file(file).items() if not key.endswith(ending)}, file, {"format": "pt"})


def test_what_is_missing_is_named(copied):
    drop(copied / "text_encoder" / "model.safetensors", "final_layer_norm.bias")
    assert "model.safetensors: cannot read the weights: 1 weights missing, the first is final_layer_norm.bias" in refusal(
        lambda: checkpoints.load(copied)
    )
    shutil.rmtree(copied / "tokenizer")
    assert f"{copied / 'tokenizer'}: missing" in refusal(lambda: checkpoints.load(copied))
    change_json(copied / "model_index.json", text_encoder=[None, None])
    assert "text_encoder: [null, null] is not" in refusal(lambda: checkpoints.load(copied))


def test_an_old_scheduler_is_corrected_as_stock_corrects_it(tmp_path):
    folder = write_stable(tmp_path / "model")
    change_json(folder / "scheduler" / "scheduler_config.json", steps_offset=0, clip_sample=True)
    ours = checkpoints.load(folder)
    expected = latents(open_stock(folder))
    torch.testing.assert_close(latents(ours), expected, **TOLERANCE)
    ours.scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
    assert (latents(ours) - expected).abs().max() > 1e-2
    ours.save_pretrained(tmp_path / "again")  # not to be mistaken for what stock would run alike
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["_class_name"][0] == "pipeline"


def tuning(data, folder, output, **changes):
    start = {
        "model": {"pretrained": str(folder)},
        "data__channels": 3,
        "schedule": {"name": "ddpm-scaled-linear"},
        "condition": {"type": "text", "text": {"encoder": str(folder)}},
        "train__steps": 2,
    }
    return diffusion_tree(data, output, changes.pop("autoencoder", folder), **{**start, **changes})


def test_training_goes_on_from_it_and_what_comes_out_opens_in_stock(fitting, data, tmp_path, run):
    before = checkpoints.load(fitting)
    # so small a rate that the weights stay, to half precision, where they began
    tree = tuning(data, fitting, tmp_path / "still", optimizer__lr=1e-12)
    config = write_yaml(tmp_path / "config.yaml", tree)
    assert run("train", config).strip() == str(tmp_path / "still" / "model")
    still = checkpoints.load(tmp_path / "still" / "model")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(before, part).state_dict()
        for key, value in getattr(still, part).state_dict().items():
            torch.testing.assert_close(value, expected[key].half().float(), rtol=1e-3, atol=1e-7)
    assert still.vae.config.scaling_factor == before.vae.config.scaling_factor
    moved = train(parse_config(tuning(data, fitting, tmp_path / "moved", optimizer__lr=0.02)))
    ours, stock = checkpoints.load(moved), open_stock(moved)
    for part in ("vae", "text_encoder"):  # frozen
        expected = getattr(still, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(ours, part).state_dict().items())
    expected = latents(ours)
    assert (expected - latents(still)).abs().max() > 1e-2
    torch.testing.assert_close(latents(stock), expected, **TOLERANCE)
    assert checkpoints.read_meta(moved)["config"]["model"]["pretrained"] == str(fitting)
    unet_alone = tuning(data, fitting, tmp_path / "alone", optimizer__lr=0.02, model={"pretrained": str(fitting / "unet")})
    torch.testing.assert_close(latents(checkpoints.load(train(parse_config(unet_alone)))), expected)
    # and on from what came out, which states its schedule itself
    again = tuning(data, fitting, tmp_path / "again", model={"pretrained": str(moved)})
    assert (latents(checkpoints.load(train(parse_config(again)))) - expected).abs().max() > 1e-3
    with pytest.raises(UserError, match="schedule: vp, but .* was trained on ddpm-scaled-linear$"):
        train(parse_config({**again, "output": str(tmp_path / "refused"), "schedule": {"name": "vp"}}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model__type": "UNet2DConditionModel"}, "model.type and model.config: leave them out"),
        ({"model__config": {"layers_per_block": 2}}, "model.type and model.config: leave them out"),
        ({"prediction": "v_prediction"}, "prediction: v_prediction, but the U-Net of .* predicts epsilon"),
        (
            {"schedule": {"name": "ddpm-linear"}},
            r"schedule: ddpm-linear, but .* on ddpm-scaled-linear \(beta_start 0.00085, beta_end 0.012\)",
        ),
        (
            {"schedule": {"name": "ddpm-scaled-linear", "params": {"num_steps": 500}}},
            r"schedule: ddpm-scaled-linear \(num_steps 500\), but .* on ddpm-scaled-linear",
        ),
        ({"condition": {"type": "class+text", "text": {"encoder": "SAME"}}}, r"condition.type: class\+text, but .* take class"),
        ({"condition": {"type": "none"}}, "condition.type: none, but .* takes text"),
        (
            {"condition": {"type": "text", "text": {"width": 16, "heads": 4}}},
            "condition.text.width: gives states of width 16, but .* has cross_attention_dim 8",
        ),
        ({"condition": {"type": "text", "text": {"encoder": "WIDER"}}}, "condition.text.encoder .*: .* width 12, but"),
        ({"autoencoder": "NARROW"}, "autoencoder .*: gives latents of 3 channels, but .* has in_channels 4"),
        ({"model": {"pretrained": "NOWHERE"}}, "model.pretrained .*nowhere: no U-Net there"),
        ({"model": {"pretrained": "PICKLED"}}, "only pickled weights"),
    ],
)
def test_a_start_that_contradicts_the_config_is_refused_before_anything_is_encoded(fitting, data, tmp_path, changes, said):
    places = {name: str(tmp_path / name.lower()) for name in ("WIDER", "NARROW", "NOWHERE", "PICKLED")} | {"SAME": str(fitting)}
    change_json(Path(shutil.copytree(fitting, places["WIDER"])) / "text_encoder" / "config.json", hidden_size=12)
    tiny_vae(latent_channels=3, in_channels=3, out_channels=3).save_pretrained(places["NARROW"])
    unet = Path(shutil.copytree(fitting, places["PICKLED"])) / "unet"
    (unet / WEIGHTS).rename(unet / "diffusion_pytorch_model.bin")
    text = json.dumps(changes)
    for name, place in places.items():
        text = text.replace(f'"{name}"', json.dumps(place))
    config = parse_config(tuning(data, fitting, tmp_path / "run", **json.loads(text)))
    with pytest.raises(UserError, match=said) as error:
        train(config)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_classes_of_the_data_are_counted_against_the_start(fitting, data, tmp_path):
    parts = stable_parts()
    config = dict(parts["unet"].config) | {"num_class_embeds": 3}  # the data have three classes and dropout adds one
    (tmp_path / "unet").mkdir()
    type(parts["unet"])(**{k: v for k, v in config.items() if k[0] != "_"}).save_pretrained(tmp_path / "unet")
    condition = {"type": "class+text", "text": {"encoder": str(fitting)}}
    tree = tuning(data, fitting, tmp_path / "run", model={"pretrained": str(tmp_path / "unet")}, condition=condition)
    with pytest.raises(UserError, match="model.pretrained .*: its num_class_embeds is 3, and data.source .* needs 4"):
        train(parse_config(tree))
    tree["condition"]["dropout"] = 0
    assert checkpoints.load(train(parse_config(tree))).num_classes == 3


def test_a_first_stage_of_others_keeps_its_scale_and_shift(data, tmp_path):
    vae = tiny_vae(in_channels=3, out_channels=3, use_quant_conv=False, use_post_quant_conv=False)
    vae.save_pretrained(tmp_path / "vae")
    mean, std = raw_moments(tmp_path / "vae", data)
    shift = float(mean.mean())
    scale = float(((mean - shift).square() + std.square()).mean().rsqrt())
    change_json(tmp_path / "vae" / "config.json", scaling_factor=scale, shift_factor=shift)
    tree = diffusion_tree(data, tmp_path / "run", tmp_path / "vae", data__channels=3, train__steps=1)
    pipe = checkpoints.load(train(parse_config(tree)))
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (scale, shift)
    codec = LatentCodec(pipe.vae)
    raw = codec.moments(pictures(data))[0]
    torch.testing.assert_close(codec.normalise(raw), (raw - shift) * scale)
    for key, value in (("scaling_factor", 2 * scale), ("shift_factor", shift + 5 / scale)):
        change_json(tmp_path / "vae" / "config.json", **{"scaling_factor": scale, "shift_factor": shift, key: value})
        with pytest.raises(UserError, match="root mean square of .* instead of 1; set normaliser=measured"):
            train(parse_config({**tree, "output": str(tmp_path / key)}))


def test_a_first_stage_on_the_hub_alone_or_in_a_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, subfolder in (("vae", ""), ("pipe", "vae")):
        repository, commit = tmp_path / f"models--some--{name}", "a" * 40
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        tiny_vae(scaling_factor=0.25).save_pretrained(repository / "snapshots" / commit / subfolder)
        assert LatentCodec(load_autoencoder(f"some/{name}")).scale.tolist() == [0.25]
    assert "neither a folder nor a diffusers autoencoder on the Hub" in refusal(lambda: load_autoencoder("some/thing"))


@pytest.mark.parametrize("averaged", [False, True])
def test_an_original_single_file_becomes_a_checkpoint(stable, tmp_path, run, averaged):
    file = write_original(stable, tmp_path / "model.safetensors", averaged)
    out = tmp_path / "out"
    assert run("import", file, "--config", stable, "--out", out).strip() == str(out)
    ours, source = checkpoints.load(out), checkpoints.load(stable)
    for part in ("vae", "text_encoder"):
        expected = getattr(source, part).state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in getattr(ours, part).state_dict().items())
    expected = source.unet.state_dict()
    for key, value in ours.unet.state_dict().items():
        torch.testing.assert_close(value, expected[key] + 2 * averaged)
    if not averaged:
        torch.testing.assert_close(latents(ours), latents(open_stock(stable)), **TOLERANCE)
        torch.testing.assert_close(latents(open_stock(out)), latents(ours), **TOLERANCE)
    meta = checkpoints.read_meta(out)
    assert meta["imported"]["averaged"] is averaged and meta["weights_dtype"] == "float32"
    assert "imported from model.safetensors" in json.loads(run("info", out))["made_by"]


def test_halves_stay_halves(stable, tmp_path):
    from latentdiff.single_file import import_checkpoint

    file = write_original(stable, tmp_path / "model.safetensors")
    halves = {k: v.half() if v.is_floating_point() else v for k, v in load_file(file).items()}
    save_file(halves, file)
    out = import_checkpoint(file, stable, tmp_path / "out")
    assert {value.dtype for value in load_file(out / "unet" / WEIGHTS).values()} == {torch.float16}


def test_what_cannot_be_imported_is_one_line(stable, tmp_path, refused):
    file = write_original(stable, tmp_path / "model.safetensors")
    call = ("--config", stable, "--out", tmp_path / "out")
    for name in ("model.ckpt", "model.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
        assert f"{name}: is pickled" in refused("import", tmp_path / name, *call)
    assert "absent.safetensors: no such file" in refused("import", tmp_path / "absent.safetensors", *call)
    assert "not in the original Stable Diffusion layout" in refused("import", stable / "unet" / WEIGHTS, *call)
    assert "no model_index.json there" in refused("import", file, "--config", tmp_path, "--out", tmp_path / "out")
    assert "is there already" in refused("import", file, "--config", stable, "--out", stable)
    weights = load_file(file)
    for part, key in (
        ("unet", "model.diffusion_model.middle_block.0.in_layers.2.bias"),
        ("vae", "first_stage_model.decoder.conv_out.bias"),
        ("text_encoder", "cond_stage_model.transformer.text_model.final_layer_norm.bias"),
    ):
        save_file({name: value for name, value in weights.items() if name != key}, tmp_path / f"no-{part}.safetensors")
        assert "does not fit the config of" in refused("import", tmp_path / f"no-{part}.safetensors", *call)
    wider = Path(shutil.copytree(stable, tmp_path / "wider"))
    change_json(wider / "unet" / "config.json", block_out_channels=[8, 24])
    assert "does not fit the config of" in refused("import", file, "--config", wider, "--out", tmp_path / "out")
