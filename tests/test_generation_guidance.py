"""`generate` with another rule of guidance, and with a weaker U-Net in the model's folder."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_checkpoints import publish
from tiny_models import tiny_unet

from latentdiff import checkpoints, generation
from latentdiff.cli.info import info
from latentdiff.editing import edit
from latentdiff.errors import UserError
from latentdiff.evaluation.records import sampling_protocol
from latentdiff.generation import generate
from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

CALL = {"num_images": 1, "steps": 2, "all_classes": True, "progress": False, "guidance": 4.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint with a weaker U-Net."""
    folder = publish(tmp_path_factory.mktemp("weak") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tiny_unet().save_pretrained(folder / "weak")
    return folder


def images(out, model, **call):
    return np.load(generate(model, out=out / "images.npz", **{**CALL, **call}))["arr_0"].astype(int)


def test_each_flag_changes_the_images(tmp_path, model):
    plain = images(tmp_path, model)
    for flags in (
        {"guidance_rule": "apg"},
        {"guidance_rule": "apg", "guidance_options": ["parallel=0.5"]},
        {"guidance_rule": "cfg_zero"},
        {"guidance_rescale": 0.9},
        {"weak": True},
        {"weak": True, "sampler": "euler"},
    ):
        assert (images(tmp_path, model, **flags) != plain).any(), flags
    off = images(tmp_path, model, guidance=1.0)
    assert (images(tmp_path, model, guidance=1.0, weak=True) == off).all()


def test_a_default_rule_of_the_checkpoint_is_used_shown_and_overridden(tmp_path, model):
    ruled = shutil.copytree(model, tmp_path / "ruled")
    index = json.loads((model / "model_index.json").read_text())
    rule = {"default_guidance_rule": "apg", "default_guidance_options": {"parallel": 0.5}, "default_guidance_rescale": 0.9}
    (ruled / "model_index.json").write_text(json.dumps(index | rule))
    asked = {"guidance_rule": "apg", "guidance_options": ["parallel=0.5"], "guidance_rescale": 0.9}
    plain, by_flags = images(tmp_path, model), images(tmp_path, model, **asked)
    assert (images(tmp_path, ruled) == by_flags).all() and (by_flags != plain).any()
    assert (images(tmp_path, ruled, guidance_rule="cfg", guidance_rescale=0.0) == plain).all()
    assert (images(tmp_path, ruled, guidance=1.0) == images(tmp_path, model, guidance=1.0, guidance_rule="cfg")).all()
    assert not set(rule) & set(info(model)["defaults"]) and rule.items() <= info(ruled)["defaults"].items()

    # What the flags leave of the defaults: nothing that the checkpoint does anyway, and no default option of a named rule
    opened, plain_opened = checkpoints.load(ruled), checkpoints.load(model)
    named = generation.guidance_call("apg", 0.9, [])
    assert generation.other_than_default(opened, named) == {"guidance_rule": "apg"}
    assert generation.other_than_default(plain_opened, generation.guidance_call("cfg", 0.0, [])) == {}
    with pytest.raises(UserError, match="--guidance-options: guidance rule: apg has no zero_init"):
        generation.other_than_default(opened, generation.guidance_call(None, None, ["zero_init=0.1"]))
    made = sampling_protocol(opened, "m", guidance_scale=2.0)
    assert made["guidance_rule"] == "apg" and made["guidance_options"] == {"parallel": 0.5}
    assert "guidance_rule" not in sampling_protocol(opened, "m", guidance_scale=1.0)
    assert "guidance_rule" not in sampling_protocol(plain_opened, "m", guidance_scale=2.0)


def test_edit_reads_the_same_flags(tmp_path, model, monkeypatch):
    seen, pixels = [], np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")

    def see(pipeline, **call):
        seen.append(call)
        return generated(pipeline, **call)

    generated = LatentDiffusionPipeline.__call__
    monkeypatch.setattr(LatentDiffusionPipeline, "__call__", see)
    call = {"to": [0], "steps": 3, "guidance": 4.0, "progress": False}

    def result(name, **flags):
        return np.asarray(Image.open(edit(model, [tmp_path / "a.png"], out=tmp_path / name, **{**call, **flags})))

    plain = result("plain.png")
    rule = {"guidance_rule": "apg", "guidance_options": ["parallel=0.5"], "guidance_rescale": 0.9}
    assert (result("rule.png", **rule) != plain).any() and (result("weak.png", weak=True) != plain).any()
    assert seen[1]["guidance_options"] == {"parallel": 0.5} and seen[1]["guidance_rescale"] == 0.9
    for flags, said in (
        ({"guidance": 1.0, "guidance_rule": "apg"}, "--guidance-rule: at guidance 1"),
        ({"to": None, "guidance": None, "guidance_rule": "apg"}, "--guidance-rule: (at guidance 1|there is no class)"),
        ({"to": None, "guidance_rule": "apg"}, "--guidance-rule: there is no class or prompt to guide to"),
        ({"task": "translate", "source": 1, "weak": True}, "--weak: has no part in --task translate"),
        ({"task": "translate", "source": 1, "guidance_rescale": 0.5}, "--guidance-rescale: has no part in --task translate"),
        ({"weak": True, "negative": "a cat"}, "--weak: stands in for the negative prompt"),
    ):
        with pytest.raises(UserError, match=said):
            result("refused.png", **flags)


def test_a_folder_goes_on_only_with_the_same_guidance(tmp_path, model):
    out = generate(model, out=tmp_path / "images", **CALL, guidance_rule="apg")
    generate(model, out=out, **CALL, guidance_rule="apg")
    with pytest.raises(UserError, match="guidance_rule"):
        generate(model, out=out, **CALL)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"guidance_rule": "pag"}, "--guidance-rule pag: unknown; valid: cfg, apg, cfg_zero"),
        ({"guidance_rescale": 2.0}, "--guidance-rescale 2: must be from 0"),
        ({"guidance_options": ["eta=1"]}, "--guidance-options eta=1: valid: parallel, threshold"),
        ({"guidance_options": ["parallel=x"]}, "--guidance-options parallel=x: valid"),
        ({"guidance_options": ["parallel=1"]}, "--guidance-options: guidance rule: cfg has no parallel"),
        (
            {"guidance_options": ["parallel"]},
            "--guidance-options 'parallel': write each as key=value, for example parallel=0.5",
        ),
        ({"guidance": 1.0, "guidance_rule": "apg"}, "--guidance-rule: at guidance 1, which is off, it changes nothing"),
        ({"guidance": 1.0, "guidance_rescale": 0.5, "weak": True}, "--guidance-rescale: at guidance 1, which is off"),
        ({"weak": True, "negative": "a cat"}, "--weak: stands in for the negative prompt"),
    ],
)
def test_mistakes_are_named(tmp_path, model, flags, said):
    with pytest.raises(UserError, match=said):
        images(tmp_path, model, **flags)
    assert not list(tmp_path.iterdir())


def test_names_and_files_are_refused_before_the_model_is_opened(tmp_path, model, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    ask = {"model": model, "progress": False, "out": tmp_path / "x.png"}
    slow = {}
    with monkeypatch.context() as patch:  # the line is the one that the model itself gives
        patch.setattr(generation, "check_names", lambda *_: None)
        with pytest.raises(UserError) as slow["line"]:
            generate(what=["striped"], **ask)
    monkeypatch.setattr(checkpoints, "load", lambda folder: pytest.fail("the model was opened"))
    with pytest.raises(UserError) as found:
        generate(what=["striped"], **ask)
    assert str(found.value) == str(slow["line"].value)
    with pytest.raises(UserError, match="^--to: unknown class 'striped'; the classes are: 0 "):
        edit(images=[tmp_path / "a.png"], to=["striped"], **ask)
    with pytest.raises(UserError, match="--mask nowhere.png: cannot be read as a picture .no such file."):
        edit(images=[tmp_path / "a.png"], mask="nowhere.png", **ask)
    with pytest.raises(UserError, match="--condition nowhere.png: cannot be read as a picture .no such file."):
        generate(what=[0], condition="nowhere.png", **ask)


def test_a_weaker_network_that_is_missing_or_of_another_model_is_named(tmp_path):
    folder = publish(tmp_path / "model")
    with pytest.raises(UserError, match="--weak: .* has no weaker U-Net; copy the folder unet of an earlier checkpoint"):
        images(tmp_path, folder, weak=True)
    tiny_unet(num_class_embeds=7).save_pretrained(folder / "weak")
    with pytest.raises(UserError, match="weak: its num_class_embeds is 7, and that of the model 4; they must be equal"):
        checkpoints.load_weak(folder, checkpoints.load(folder))
