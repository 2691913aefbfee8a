"""What ships is what the repository says it is: the pipeline file of today, the recipe of the committed config."""

import json
from pathlib import Path

import pytest

from latentdiff.config import load_config, parse_config
from latentdiff.guidance import load_classifier

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "weights" / "fashion-mnist"


def test_the_shipped_pipeline_file_is_the_current_one():
    assert (MODEL / "pipeline.py").read_bytes() == (ROOT / "pipelines" / "latent_diffusion.py").read_bytes()


@pytest.mark.parametrize("key", ["model", "schedule", "prediction", "noise_levels", "condition", "optimizer", "ema", "data"])
def test_the_shipped_weights_were_made_by_the_committed_config(key):
    made_by = parse_config(json.loads((MODEL / "latentdiff.json").read_text())["config"]).model_dump(mode="json")
    committed = load_config(ROOT / "configs" / "fashion-mnist" / "diffusion.yaml").model_dump(mode="json")
    assert made_by[key] == committed[key]
    assert [made_by["train"][k] for k in ("steps", "batch_size")] == [committed["train"][k] for k in ("steps", "batch_size")]


def test_the_shipped_classifier_is_of_the_models_noise_and_classes():
    index, classifier = json.loads((MODEL / "model_index.json").read_text()), load_classifier(MODEL / "classifier")
    assert classifier.config["schedule"] == index["schedule"]
    assert classifier.config["classes"] == len(index["class_names"]) == index["null_class"]
    assert classifier.info["class_names"] == list(index["class_names"].values())
