"""Going on from an existing model: the settings that follow from it, in training; classes by name; refusals."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from tiny_lora import write_base, write_sidecars
from tiny_runs import write_stripes
from tiny_stable import BETAS, WEIGHTS, change_json, open_stock

from latentdiff import checkpoints, fit
from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.fitting.base import LORA_RATE, base_settings
from latentdiff.fitting.facts import look
from latentdiff.fitting.machine import Machine, Timing
from latentdiff.fitting.plan import make_plan
from latentdiff.training import train
from latentdiff.training.images import Images

TRAIN = {"steps": 2, "batch_size": 4, "precision": "float32", "threads": 1, "picture_every": 1000}


def facts(source, classes=(), captions=None):
    return SimpleNamespace(source=str(source), classes=dict.fromkeys(classes, 16), captions=captions)


def tree(settings, source, output, **train):
    """A stage-2 config of the settings alone, but for few steps of sampling."""
    data = {"source": str(source), "held_out": 0.34, **settings["data"]}
    sample = {**settings.get("sample", {}), "steps": 2, "per_class": 1}
    run = {"stage": "diffusion", "output": str(output), "data": data, "train": {**TRAIN, **train}, "sample": sample}
    return {key: value for key, value in (settings | run).items() if key != "notes"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures without captions."""
    return write_sidecars(tmp_path_factory.mktemp("data") / "striped_things", captions=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory, pictures):
    scheduler = DDIMScheduler(**BETAS, prediction_type="v_prediction", clip_sample=False, steps_offset=1)
    return write_base(tmp_path_factory.mktemp("base") / "model", pictures, scheduler=scheduler)


def test_a_lora_on_a_stable_diffusion_folder_trains_as_the_settings_say(base, pictures, tmp_path):
    settings = base_settings(str(base), 4, facts(pictures))
    assert settings["model"] == {"pretrained": str(base), "lora": {"rank": 4}}
    assert settings["schedule"] == {"name": "ddpm-scaled-linear", "params": {"beta_start": 0.00085, "beta_end": 0.012}}
    assert (settings["prediction"], settings["normaliser"]) == ("v_prediction", "stored")
    assert settings["data"] == {"size": [16, 16], "channels": 3, "caption": "striped things"}
    assert settings["sample"] == {"guidance": 7.5, "steps": 25}
    model = train(parse_config(tree(settings, pictures, tmp_path / "run")))
    stock = open_stock(base)
    stock.load_lora_weights(model)
    assert checkpoints.load(model).config.prediction == "v_prediction"
    assert len(load_file(tmp_path / "run" / "captions" / "shard-00000.safetensors")["states"]) == 2  # it and the empty one


def test_a_fit_of_three_captioned_pictures_gives_a_lora_for_stock_diffusers(tmp_path):
    three = write_sidecars(tmp_path / "three")
    base = write_base(tmp_path / "base", three)
    few = ["train.steps=4", "train.batch_size=2", "train.threads=1", "optimizer.warmup_steps=0", "optimizer.lr=0.05"]
    few += ["ema.decay=0.5", "sample.steps=2", "train.precision=float32", "data.copies=1"]
    model = fit(three, 0.05, tmp_path / "out", base=str(base), lora=4, overrides=few)
    ours, stock, drawn = checkpoints.load(base), open_stock(base), []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        for loads in (False, True):
            if loads:
                pipe.load_lora_weights(model)
            call = dict(num_inference_steps=4, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
            drawn.append(torch.from_numpy(pipe("vertical stripes", output_type="np", **call).images))
    for before, after in zip(drawn[:2], drawn[2:], strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-4)
    assert (drawn[1] - drawn[0]).abs().max() > 0.01
    with pytest.raises(UserError, match="--lora 4: give --base too"):
        fit(three, 0.05, tmp_path / "other", lora=4)


def test_a_latent_of_another_scale_is_what_the_base_knows(base, pictures, tmp_path):
    other = shutil.copytree(base, tmp_path / "base")
    change_json(other / "vae" / "config.json", scaling_factor=0.1)
    train(parse_config(tree(base_settings(str(other), 4, facts(pictures)), pictures, tmp_path / "run", steps=1)))
    config = tree(base_settings(str(base), 4, facts(pictures)), pictures, tmp_path / "elsewhere", steps=1)
    with pytest.raises(UserError, match="its normaliser"):
        train(parse_config({**config, "autoencoder": str(other / "vae")}))


@pytest.mark.parametrize(
    ("classes", "captions", "overrides", "said"),
    [
        (("a", "b"), None, (), "each has the name of its class; data.caption"),
        ((), None, (), "each has 'striped things'; data.caption"),
        ((), None, ("data.caption=a thing",), None),
        (("a", "b"), {"captions": 3}, (), "are not used, as the base reads captions alone"),
    ],
)
def test_pictures_without_captions_get_one_and_a_line_says_so(base, pictures, classes, captions, overrides, said):
    first, *more = base_settings(str(base), None, facts(pictures, classes, captions), overrides)["notes"]
    assert first.startswith("goes on from") and "the whole U-Net; its autoencoder, its text encoder and its noise" in first
    assert len(more) == (said is not None) and all(said in line for line in more)


def test_the_caption_is_the_class_and_own_captions_stay(tmp_path):
    def captions(folder, caption):
        data = {"source": str(folder), "size": [16, 16], "caption": caption}
        return Images(parse_config(tree({"data": data, "autoencoder": "x", "model": {}}, folder, "x")).data, 1).train.captions()

    classes = write_stripes(tmp_path / "classes", 6)
    assert {texts for texts in captions(classes, "a {class} one")} <= {(f"a {p.name} one",) for p in classes.iterdir()}
    some = write_sidecars(tmp_path / "some", 9)
    (some / "0.txt").unlink()
    texts = captions(some, "striped")
    assert texts.count(("striped",)) <= 1 and ("vertical stripes",) in texts
    with pytest.raises(UserError, match="data.caption: 'a {class}' names the class, and data '.*' has no classes"):
        captions(some, "a {class}")


def test_classes_are_matched_by_name_and_new_ones_start_without_a_class(diffusion_run, stripe_folder, tmp_path):
    folder = shutil.copytree(stripe_folder, tmp_path / "data")
    names = sorted(path.name for path in folder.iterdir())
    shutil.rmtree(folder / names[0])
    shutil.copytree(folder / names[1], folder / "one more")
    classes = [*names[1:], "one more"]  # so rows move
    model = diffusion_run / "model"
    settings = base_settings(str(model), None, facts(folder, classes))
    recorded = checkpoints.read_meta(model)["config"]
    assert settings["optimizer"]["lr"] == pytest.approx(0.2 * recorded["optimizer"]["lr"])
    assert settings["data"]["channels"] == 1 and settings["sample"]["guidance"] == 1.5
    settings["optimizer"]["lr"] = 1e-12
    moved = train(parse_config(tree(settings, folder, tmp_path / "run")))
    before, after = (load_file(each / "unet" / WEIGHTS)["class_embedding.weight"] for each in (model, moved))
    expected = torch.stack([before[1], before[2], before[3], before[3]])
    torch.testing.assert_close(after, expected, rtol=1e-3, atol=1e-4)
    assert checkpoints.load(moved).class_names == classes
    lines = settings["notes"]
    assert any(line.endswith("without a class: one more") for line in lines)
    assert any(line.endswith(f"are dropped: {names[0]}") for line in lines)


def test_a_plan_keeps_to_the_base_where_no_word_says_otherwise(base, pictures):
    seen = look(str(pictures))
    machine = Machine("cpu", "a processor", 2, 2, 8 << 30, False)

    def planned(*words):
        settings = base_settings(str(base), 4, seen, words)
        measure = lambda *_: Timing("float32", 0.1, 4)  # noqa: E731
        return make_plan(seen, machine, 0.1, None, words, settings, "runs/x", measure)

    made = planned()
    assert made.autoencoder is None and made.seconds["autoencoder"] == 0
    config = made.diffusion
    assert (config.data.size, config.data.caption) == ((16, 16), "striped things")
    assert (config.model.lora.rank, config.model.config, config.optimizer.lr) == (4, {}, LORA_RATE)
    assert (config.condition.type, config.sample.guidance, config.schedule.name) == ("text", 7.5, "ddpm-scaled-linear")
    assert made.notes[0].startswith("goes on from ") and "each has 'striped things'" in made.notes[1]
    assert "16x16 pixels, as the base draws" in made.reasons["pictures"]
    config = planned("data.size=[32,32]", "data.caption=things", "optimizer.lr=0.5", "model.lora.alpha=8").diffusion
    assert (config.data.size, config.data.caption) == ((32, 32), "things")
    assert (config.optimizer.lr, config.model.lora.alpha) == (0.5, 8)
    with pytest.raises(UserError, match="autoencoder=x: --base .* brings its own autoencoder and U-Net; leave it out"):
        planned("autoencoder=x")


def test_what_is_no_base_is_one_line(base, diffusion_run, pictures, tmp_path):
    flow = write_base(tmp_path / "flow", pictures)
    FlowMatchEulerDiscreteScheduler().save_pretrained(flow / "scheduler")
    index = json.loads((flow / "model_index.json").read_text())
    change_json(flow / "model_index.json", scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"])
    assert base_settings(str(flow), None, facts(pictures))["schedule"]["name"] == "flow" and index
    betas = shutil.copytree(base, tmp_path / "betas")
    change_json(betas / "scheduler" / "scheduler_config.json", trained_betas=[0.01] * 1000)
    model, classes = str(diffusion_run / "model"), facts(pictures, ("a", "b"))
    cases = [
        ((str(tmp_path / "nowhere"), None, classes), "--base '.*nowhere': no such folder"),
        ((str(diffusion_run), None, classes), "is the output folder of a training run, not a checkpoint; did you mean"),
        ((model, 4, classes), "--lora 4: the U-Net of --base .* is a UNet2DModel, and a LoRA is for a UNet2DConditionModel"),
        ((model, None, facts(pictures)), "--base .*: draws by class, and .* has no classes"),
        ((str(base), 0, classes), "--lora 0: must be a rank of at least 1"),
        ((str(betas), None, classes), "DDIMScheduler with its own trained_betas has noise that no schedule of a config gives"),
    ]
    for arguments, said in cases:
        with pytest.raises(UserError, match=said) as error:
            base_settings(*arguments)
        assert "\n" not in str(error.value)


def test_a_lora_needs_the_classes_of_its_base(base, pictures, tmp_path):
    own = shutil.copytree(base, tmp_path / "base")
    change_json(own / "unet" / "config.json", num_class_embeds=3)
    change_json(own / "model_index.json", _class_name="LatentDiffusionPipeline", class_names={"0": "a", "1": "b"}, null_class=2)
    assert "match_classes" not in base_settings(str(own), 4, facts(pictures, ("a", "b")))["model"]
    with pytest.raises(
        UserError, match="--lora 4: the classes of .* are not those of --base .*, and a LoRA learns no new ones"
    ):
        base_settings(str(own), 4, facts(pictures, ("b", "a")))
    config = tree(base_settings(str(base), 4, facts(pictures)), pictures, tmp_path / "run")
    config["model"]["match_classes"] = True
    with pytest.raises(UserError, match="model.match_classes: a LoRA holds no class embedding"):
        train(parse_config(config))
    config["model"] = {"pretrained": str(base), "match_classes": True}
    with pytest.raises(UserError, match="model.match_classes: model.pretrained .* names no classes; leave it out"):
        train(parse_config(config))
