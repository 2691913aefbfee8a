"""`latentdiff info CONFIG`: what a run will cost, held against what runs do cost, and what it warns of."""

import json
import mmap
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import autoencoder_tree, diffusion_tree, tree, write_yaml
from tiny_text import ENCODER, text_tree, write_bert, write_captioned

from latentdiff.cli.info import info
from latentdiff.config import LoopConfig
from latentdiff.models.text_encoder import build_text_encoder
from latentdiff.training import estimate
from latentdiff.training.dry_run import dry_run
from latentdiff.training.memory import Memory
from latentdiff.training.random_data import Vocabulary

CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path):
    """plan(tree of a config) of 60 steps -> the facts, having seen that nothing was written."""

    def call(config: dict, *overrides: str) -> dict:
        path = write_yaml(tmp_path / "config.yaml", config)
        before = tree(tmp_path)
        facts = info(str(path), ["train.steps=60", *overrides])
        assert tree(tmp_path) == before
        return facts

    return call


def of_the_config(facts: dict) -> list[str]:
    """The warnings but for those of the first stage's report: 60 steps make a poor one."""
    return [text for text in facts["warnings"] if not text.startswith("autoencoder ") or "normaliser=measured" in text]


# What it says


def test_stage_one_is_measured_and_nothing_is_written(run, stripe_folder, autoencoder_run, here):
    config = write_yaml(here.parent / "a.yaml", autoencoder_tree(stripe_folder, here / "run"))
    facts = json.loads(run("info", config, "train.batch_size=4", "train.steps=7200"))
    assert facts["file"] == str(config) and facts["stage"] == "autoencoder" and list(here.iterdir()) == []
    assert facts["config"]["train"]["batch_size"] == 4 and facts["warnings"] == [] and facts["unknown"] == {}
    assert facts["parameters"] == {"autoencoder": info(str(autoencoder_run))["parameters"]}
    assert facts["data"]["images"] == 36 and facts["data"]["held_out"] == 12 and facts["data"]["epochs"] == 800
    assert facts["data"]["tensor"] == [1, 16, 16] and facts["latent_shape"] == [2, 8, 8]
    step = facts["step"]
    assert (step["device"], step["precision"], step["threads"], step["batch_size"]) == ("cpu", "float32", 1, 4)
    (times,) = step["timed"].values()
    assert len(times) == 3 and step["seconds"] == sorted(times)[1] > 0
    assert facts["hours"]["training"] == pytest.approx(2 * step["seconds"], rel=0.01)  # 7200 steps


def test_operations_are_of_one_sample_forward_and_backward(plan, stripe_folder, tmp_path):
    config = autoencoder_tree(stripe_folder, tmp_path / "run")
    small = plan(config)["flops_per_sample"]
    assert plan(config, "train.batch_size=2")["flops_per_sample"] == small
    # Convolutions alone: four times the pixels, four times the work
    assert plan(config, "data.size=[32,32]", "data.framing=resize")["flops_per_sample"] == 4 * small
    vae = torch.nn.Conv2d(1, 8, 3, padding=1)  # the network's first layer: 2 x 9 x 8 operations a pixel, twice over at least
    assert small > 2 * 2 * 9 * vae.out_channels * 16 * 16


def test_the_adversarys_part_of_the_run_is_timed_apart(plan, stripe_folder, tmp_path):
    config = autoencoder_tree(stripe_folder, tmp_path / "run")
    without = plan(config)
    facts = plan(config, "loss.adversarial=0.5", "loss.adversarial_start=4")
    assert list(facts["step"]["timed"]) == ["step 0", "step 4"] and facts["parameters"]["discriminator"] > 1000
    assert facts["flops_per_sample"] > without["flops_per_sample"]
    assert facts["unknown"] == {}
    later = ("loss.adversarial=0.5", "loss.adversarial_start=400", "loss.adaptive=false", "train.compile=true")
    late = plan(config, *later)
    assert "without it" in late["unknown"]["compile"]
    assert list(late["step"]["timed"]) == ["step 0"] and late["flops_per_sample"] == without["flops_per_sample"]


def test_stage_two_agrees_with_the_run_it_plans(plan, stripe_folder, autoencoder_run, diffusion_run, tmp_path):
    config = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run)
    facts = plan(config)
    made = info(str(diffusion_run / "model"))
    assert facts["parameters"] == {
        "unet": made["parameters"]["unet"],
        "autoencoder_frozen": made["parameters"]["vae"],
    }
    assert facts["latent_shape"] == made["latent_shape"] and facts["autoencoder"] == str(autoencoder_run)
    assert of_the_config(facts) == [] and facts["unknown"] == {} and facts["data"]["classes"] == 3
    bytes_ = facts["latent_cache"]["bytes"]
    (shard,) = (diffusion_run / "latents").glob("*.safetensors")
    assert bytes_ == 36 * 2 * 8 * 8 * 2 * 2 and bytes_ < shard.stat().st_size < bytes_ + 4096
    assert not facts["latent_cache"]["finished"] and 0 < facts["hours"]["encoding"] and 0 < facts["hours"]["training"]
    assert plan(config, "data.flips=true")["latent_cache"]["bytes"] == 2 * bytes_
    finished = plan(config, f"cache.folder={diffusion_run / 'latents'}")
    assert finished["latent_cache"]["finished"] and finished["hours"]["encoding"] == 0


def test_a_text_encoder_of_ones_own_is_counted_with_its_whole_vocabulary(plan, autoencoder_run, tmp_path):
    data = write_captioned(tmp_path / "data")
    facts = plan(text_tree(data, tmp_path / "run", autoencoder_run), "condition.text.vocabulary=500")
    encoder = build_text_encoder(Vocabulary(500, ENCODER["max_length"]), ENCODER["width"], ENCODER["layers"], ENCODER["heads"])
    assert facts["parameters"]["text_encoder"] == sum(p.numel() for p in encoder.parameters())
    more = plan(text_tree(data, tmp_path / "run", autoencoder_run), "condition.text.vocabulary=600")
    assert more["parameters"]["text_encoder"] - facts["parameters"]["text_encoder"] == 100 * ENCODER["width"]
    assert more["parameters"]["unet"] == facts["parameters"]["unet"] and facts["step"]["seconds"] > 0


def test_a_frozen_text_encoder_gives_its_width(plan, autoencoder_run, tmp_path):
    data, bert = write_captioned(tmp_path / "data"), write_bert(tmp_path / "bert", "a picture of stripes")
    config = text_tree(data, tmp_path / "run", autoencoder_run, condition__text={"encoder": str(bert)})
    facts = plan(config)
    assert "text_encoder" not in facts["parameters"] and facts["step"]["seconds"] > 0
    own = plan(text_tree(data, tmp_path / "run", autoencoder_run))  # as wide
    assert facts["parameters"]["unet"] == own["parameters"]["unet"]
    short = plan(config, f"condition.text.max_length={ENCODER['max_length']}")
    assert short["flops_per_sample"] < own["flops_per_sample"]  # no encoder in the step
    assert short["flops_per_sample"] < facts["flops_per_sample"]  # by itself it reads 16 tokens


# What is not there yet


def test_the_autoencoder_may_be_yet_to_be_trained_by_a_config_beside_this_one(plan, stripe_folder, autoencoder_run, tmp_path):
    config = diffusion_tree(stripe_folder, tmp_path / "run", tmp_path / "first")
    facts = plan(config)
    assert f"{tmp_path / 'first'}: there is none yet" in facts["unknown"]["autoencoder"] and "step" in facts["unknown"]
    assert "parameters" not in facts and "step" not in facts and facts["data"]["images"] == 36
    write_yaml(tmp_path / "other.yaml", autoencoder_tree(stripe_folder, tmp_path / "second"))
    write_yaml(tmp_path / "broken.yaml", {"stage": "autoencoder"})
    assert "autoencoder" in plan(config)["unknown"]
    write_yaml(tmp_path.parent / "above.yaml", autoencoder_tree(stripe_folder, tmp_path / "first"))
    assert "above.yaml" in plan(config)["autoencoder"]
    (tmp_path.parent / "above.yaml").unlink()
    write_yaml(tmp_path / "beside.yaml", autoencoder_tree(stripe_folder, tmp_path / "first"))
    facts = plan(config)
    real = plan(diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run))
    assert str(tmp_path / "beside.yaml") in facts["autoencoder"] and facts["unknown"] == {} and facts["warnings"] == []
    for key in ("parameters", "latent_shape", "flops_per_sample", "latent_cache"):
        assert facts[key] == real[key]


def test_a_first_stage_in_training_says_its_shapes_itself(plan, stripe_folder, autoencoder_run, tmp_path):
    (tmp_path / "first").mkdir()
    shutil.copy(autoencoder_run / "run.json", tmp_path / "first")
    facts = plan(diffusion_tree(stripe_folder, tmp_path / "run", tmp_path / "first"))
    assert "run.json" in facts["autoencoder"] and facts["latent_shape"] == [2, 8, 8] and facts["step"]["seconds"] > 0


@pytest.mark.parametrize("source", ["someone/pictures", "https://host/pictures-{00..09}.tar"])
def test_data_elsewhere_are_not_fetched(plan, tmp_path, monkeypatch, source):
    monkeypatch.setattr("latentdiff.training.estimate.Images", None)  # whatever would open them
    facts = plan(autoencoder_tree(source, tmp_path / "run"))
    assert "not fetched" in facts["unknown"]["data"] and facts["step"]["seconds"] > 0


def test_without_the_images_the_rest_is_planned(plan, autoencoder_run, tmp_path):
    nowhere = tmp_path / "nowhere"
    facts = plan(diffusion_tree(nowhere, tmp_path / "run", autoencoder_run))
    assert "no such folder" in facts["unknown"]["data"] and "one class" in facts["unknown"]["classes"]
    assert facts["parameters"]["unet"] > 1000 and facts["step"]["seconds"] > 0
    assert "images" not in facts["data"] and "latent_cache" not in facts and "encoding" not in facts["hours"]
    first = plan(autoencoder_tree(nowhere, tmp_path / "run"))
    assert first["step"]["seconds"] > 0 and "no such folder" in first["unknown"]["data"]
    sizeless = plan(autoencoder_tree(nowhere, tmp_path / "run", data__size=None))
    assert "data.size is not set" in sizeless["unknown"]["shapes"] and sizeless["parameters"] == first["parameters"]
    assert "step" not in sizeless


# What it warns of, and what it refuses


def test_an_average_longer_than_the_run_is_warned_of(plan, stripe_folder, tmp_path):
    config = autoencoder_tree(stripe_folder, tmp_path / "run")
    (warning,) = plan(config, "ema.decay=0.9", "train.steps=5")["warnings"]  # 0.9^6.6 = 1/2
    assert warning.startswith("ema.decay: 0.9 takes 7 steps")
    assert "ema.decay=0.25 takes" in warning  # forgets half in half a step
    warning = plan(config, "ema.decay=0.99999", "train.steps=50000")["warnings"][0]
    assert "ema.decay=0.999861 takes" in warning
    assert plan(config, "ema.decay=0.9", "train.steps=7")["warnings"] == []


def test_minutes_are_planned_as_the_steps_they_allow(monkeypatch, stripe_folder, autoencoder_run, tmp_path):
    step = {"device": "cpu", "threads": 1, "precision": "float32", "seconds": 2.0}
    monkeypatch.setattr(estimate, "dry_run", lambda *arguments: {"step": step, "hours": {"training": 99.0}})
    monkeypatch.setattr(estimate, "_encode_some", lambda codec, images: (1.0, 60 / 36))  # a minute for all images
    many = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=10**6, train__minutes=3.0)
    facts = info(str(write_yaml(tmp_path / "a.yaml", many)), ["ema.decay=0.999"])
    assert facts["steps"] == pytest.approx(60, abs=1) and facts["hours"]["training"] == pytest.approx(2 / 60, rel=0.01)
    assert facts["data"]["epochs"] == pytest.approx(60 * 8 / 36, rel=0.03)
    assert of_the_config(facts)[0].startswith("ema.decay: 0.999 takes 693 steps to forget half of the old weights, and the run")
    few = info(str(tmp_path / "a.yaml"), ["train.steps=10", "ema.decay=0.5"])
    assert few["steps"] == 10 and of_the_config(few) == []


def test_guidance_that_is_not_trained_is_warned_of(plan, stripe_folder, autoencoder_run, tmp_path):
    config = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, condition__dropout=0, sample__guidance=3.0)
    facts = plan(config)
    (warning,) = of_the_config(facts)
    assert warning.startswith("sample.guidance: 3 ") and facts["step"]["seconds"] > 0
    assert facts["config"]["sample"]["guidance"] == 3.0


def test_shapes_that_disagree_are_warned_of(plan, stripe_folder, autoencoder_run, diffusion_run, tmp_path):
    config = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run)
    facts = plan(config, "data.size=[18,18]", "data.framing=resize")  # latents 9x9 for two levels
    assert any(w.startswith("model.config.block_out_channels") and "9x9" in w for w in facts["warnings"])
    assert "disagree" in facts["unknown"]["step"] and "step" not in facts
    start = shutil.copytree(diffusion_run / "model" / "unet", tmp_path / "start")
    written = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps({**written, "in_channels": 3}))
    facts = plan({**config, "model": {"pretrained": str(start)}})
    assert any("latents of 2 channels" in w and "in_channels 3" in w for w in facts["warnings"]) and "step" not in facts
    facts = plan(config, "data.channels=3")
    assert any(w.startswith("data.channels: 3, but the autoencoder") for w in facts["warnings"])


def test_a_normaliser_that_is_missing_or_wrong_is_warned_of(plan, stripe_folder, autoencoder_run, tmp_path):
    first = shutil.copytree(autoencoder_run / "autoencoder", tmp_path / "first")
    written = json.loads((first / "config.json").read_text())
    config = diffusion_tree(stripe_folder, tmp_path / "run", first)
    none = dict.fromkeys(("latents_mean", "latents_std", "scaling_factor"))
    for changes, said in ((none, "has no normaliser"), ({"scaling_factor": 5.0}, "root mean square of ")):
        (first / "config.json").write_text(json.dumps({**written, **changes}))
        (warning,) = of_the_config(plan(config))
        assert str(first) in warning and said in warning and "normaliser=measured" in warning
        assert of_the_config(plan(config, "normaliser=measured")) == []


def test_mistakes_in_the_config_are_refused(refused, stripe_folder, autoencoder_run, tmp_path):
    first = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run"))
    second = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run))
    assert "train.stepz: unknown key; did you mean 'steps'?" in refused("info", first, "train.stepz=3")
    assert "model.config.layers_per_blok" in refused("info", second, "model.config.layers_per_blok=3")
    assert "sample.sampler: 'eular' is unknown" in refused("info", second, "sample.scheduler=null", "sample.sampler=eular")
    assert "schedule" in refused("info", second, "schedule=nothing")
    assert "does not fit" in refused("info", first, "data.size=[32,32]")
    assert "has no captions" in refused("info", second, "condition.type=text", "model.type=UNet2DConditionModel")
    assert "key=value overrides a CONFIG" in refused("info", stripe_folder, "train.steps=3")


# The dry run


def test_too_little_memory_is_said_and_other_errors_are_raised(plan, stripe_folder, tmp_path, monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("no memory for that")

    monkeypatch.setattr("latentdiff.training.train_autoencoder.AutoencoderTrainer.update", full)
    facts = plan(autoencoder_tree(stripe_folder, tmp_path / "run"))
    assert facts["warnings"] == ["train.batch_size 8: no memory for that"] and "memory" in facts["unknown"]["step"]
    assert facts["parameters"]["autoencoder"] > 1000 and "hours" not in facts

    def wrong(*arguments):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        dry_run(wrong, [(0, 1)], LoopConfig(steps=1), Memory(CPU))


def test_a_run_of_two_phases_takes_the_hours_of_both(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("latentdiff.training.dry_run.time.perf_counter", lambda: clock[0])
    batches = []

    def step(number: int, batch: int) -> None:
        clock[0] += 1.0 if number < 100 else 3.0
        batches.append(batch)

    facts = dry_run(step, [(0, 100), (100, 300)], LoopConfig(steps=400, batch_size=8), Memory(CPU))
    assert facts["hours"]["training"] == pytest.approx((100 + 900) / 3600, rel=0.01)
    assert facts["step"]["seconds"] == 2.5 and facts["step"]["samples_per_second"] == 3.2
    assert facts["step"]["timed"] == {"step 0": [1.0] * 3, "step 100": [3.0] * 3}
    assert batches == [8] * 8 + [1]  # each phase warms up; operations are counted on one sample


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel's mark cannot be moved here")
def test_memory_is_what_was_added_since_the_start():
    size = 96 * 2**20
    before = Memory(CPU)
    # Pages of its own: what a tensor held may stay with the allocator, depending on what came before
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    assert size * 0.9 < before.facts()["step_bytes"] < size * 1.5
    held = before.facts()["peak_bytes"]
    del block
    pages.close()
    after = Memory(CPU)
    assert after.facts()["step_bytes"] < size * 0.2 and after.facts()["peak_bytes"] < held


def test_planning_leaves_threads_and_random_numbers_alone(plan, stripe_folder, tmp_path):
    config = autoencoder_tree(stripe_folder, tmp_path / "run", train__threads=2)
    before = torch.get_num_threads()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_num_threads(1)
    try:
        assert plan(config)["step"]["threads"] == 2 and torch.get_num_threads() == 1
        assert torch.equal(torch.rand(3), expected)
    finally:
        torch.set_num_threads(before)


def test_a_config_that_ships_can_be_planned_before_anything_is_trained(monkeypatch):
    """Shapes and parameters; the steps themselves are too long for a test."""
    monkeypatch.setattr("latentdiff.training.estimate.dry_run", lambda *arguments: {})
    monkeypatch.chdir(Path(__file__).parents[2] / "configs" / "emoji")
    facts = info("diffusion.yaml")
    assert facts["latent_shape"] == [8, 8, 8] and "autoencoder-kl.yaml" in facts["autoencoder"] and facts["warnings"] == []
    assert facts["parameters"]["unet"] == 25024872 and list(facts["unknown"]) == ["data"]
