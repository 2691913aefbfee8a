"""What ships is what the repository says it is: the pipeline file of today, the recipe of the committed config."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from latentdiff import checkpoints
from latentdiff.config import load_config, parse_config
from latentdiff.guidance import load_classifier

ROOT = Path(__file__).parent.parent
MODEL, EMOJI = ROOT / "weights" / "fashion-mnist", ROOT / "weights" / "emoji"
MODELS = sorted(path.parent for path in (ROOT / "weights").glob("*/model_index.json"))


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.name)
def test_the_shipped_pipeline_file_is_the_current_one(model):
    assert (model / "pipeline.py").read_bytes() == (ROOT / "pipelines" / "latent_diffusion.py").read_bytes()


def test_the_shipped_text_model_gives_the_same_latents_in_unmodified_stable_diffusion():
    stock = StableDiffusionPipeline.from_pretrained(EMOJI, torch_dtype=torch.float32)
    remote = DiffusionPipeline.from_pretrained(EMOJI, trust_remote_code=True, torch_dtype=torch.float32)
    ours = checkpoints.load(EMOJI)
    noise = torch.randn((2, *ours.latent_shape), generator=torch.Generator().manual_seed(0))
    call = dict(guidance_scale=4.0, num_inference_steps=4, latents=noise, output_type="latent")
    expected = ours(["a red apple", "twemoji style, dog"], **call).images
    for pipe in (stock, remote):
        pipe.set_progress_bar_config(disable=True)
        torch.testing.assert_close(pipe(["a red apple", "twemoji style, dog"], **call).images, expected, atol=1e-4, rtol=0)
    assert (ours(["a red apple", "twemoji style, cat"], **call).images - expected)[1].abs().max() > 1e-2


@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.name)
@pytest.mark.parametrize("key", ["model", "schedule", "prediction", "noise_levels", "condition", "optimizer", "ema", "data"])
def test_the_shipped_weights_were_made_by_the_committed_config(key, model):
    made_by = parse_config(json.loads((model / "latentdiff.json").read_text())["config"]).model_dump(mode="json")
    committed = load_config(ROOT / "configs" / model.name / "diffusion.yaml").model_dump(mode="json")
    assert made_by[key] == committed[key]
    assert [made_by["train"][k] for k in ("steps", "batch_size")] == [committed["train"][k] for k in ("steps", "batch_size")]


def test_the_shipped_classifier_is_of_the_models_noise_and_classes():
    index, classifier = json.loads((MODEL / "model_index.json").read_text()), load_classifier(MODEL / "classifier")
    assert classifier.config["schedule"] == index["schedule"]
    assert classifier.config["classes"] == len(index["class_names"]) == index["null_class"]
    assert classifier.info["class_names"] == list(index["class_names"].values())
