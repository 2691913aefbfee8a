"""What evaluate measures when asked: the guidance curve and bits per dimension; and the card that a record fills."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from stripes import stripe_pixels, stripes
from tiny_runs import write_stripes

from latentdiff.checkpoints import weights_of
from latentdiff.evaluation.feature_statistics import feature_statistics, read_batches
from latentdiff.evaluation.frechet import frechet_distance
from latentdiff.evaluation.guidance_curve import guidance_curve
from latentdiff.evaluation.html_report import guidance_plots
from latentdiff.evaluation.precision_recall import precision_recall
from latentdiff.evaluation.records import read_record
from latentdiff.evaluation.sample_sets import matching_rows, sample_set
from latentdiff.models.feature_net import load_features


def test_a_point_of_the_curve_is_what_its_samples_score_alone(feature_folder):
    net, train, test = load_features(feature_folder), stripes(90, 1), stripes(60, 2)
    reference = feature_statistics(net, read_batches(train), keep_features=True)
    (good, labels), (other, _) = stripe_pixels(60, seed=3), stripe_pixels(60, seed=4)
    damaged = np.where(np.random.default_rng(0).random(other.shape) < 0.5, 255 - other, other)
    result = guidance_curve(net, reference, train, test, {4.0: damaged, 1.5: good}, labels.numpy())
    assert result["images"] == result["floor_images"] == 60 and [p["guidance"] for p in result["points"]] == [1.5, 4.0]
    first, second = result["points"]
    statistics = feature_statistics(net, read_batches(sample_set(good, labels.numpy(), train)), keep_features=True)
    assert first["frechet"] == pytest.approx(frechet_distance(statistics.moments, reference.moments), rel=1e-9)
    assert first["label_accuracy"] == statistics.accuracy and second["frechet"] > 3 * first["frechet"]
    assert second["precision"] < first["precision"] and first["recall"] > 0.5
    same = guidance_curve(net, reference, train, test, {1.0: good}, None)["points"][0]
    assert (
        same["precision"]
        == precision_recall(reference.features[matching_rows(train, None, 60, 0)], statistics.features).precision
    )
    drawn = guidance_plots(result)
    assert drawn.count("<circle") == 2 * 4 and "4: " in drawn and guidance_plots(None) == ""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("striped")
    write_stripes(folder / "train")
    write_stripes(folder / "test", 30, seed=1)
    return folder


def test_evaluate_adds_the_curve_and_the_bound(run, refused, here, model, feature_folder, data):
    ask = ("evaluate", model, "--data", data, "--features", feature_folder, "--cas-seeds", 0, "--num-images", 12, "--steps", 2)
    more = ("--guidance-curve", 1, 3, "--curve-images", 9, "--bits-images", 4, "--out", "one")
    report = json.loads(run(*ask, *more))
    bound = json.loads(run("likelihood", model, "--data", data, "--num-images", 4))
    record = read_record("one")
    entry = record["values"]["bits_per_dim"]
    assert entry == {"value": bound["bits_per_dim"], "stderr": bound["stderr"], "images": 4} and report["likelihood"] == bound
    curve = record["guidance_curve"]
    assert curve["images"] == 9 and [p["guidance"] for p in curve["points"]] == [1.0, 3.0]
    assert curve["points"][0]["frechet"] != curve["points"][1]["frechet"]
    text, page = Path("one/evaluation.md").read_text(), Path("one/index.html").read_text()
    assert "| guidance, 9 images |" in text and "bits per dimension" in text and "By guidance scale, 9 images" in page
    run(*ask, "--out", "two")  # without either: comparable in all else
    assert "bits_per_dim" in run("compare", "one", "two")
    run(*ask, "--bits-images", 3, "--out", "three")
    assert "compare: likelihood.images is 4 in one and 3 in three" in refused("compare", "one", "three")
    assert "--curve-images 10: must be a multiple of the model's 3" in refused(*ask, *more[:3], "--curve-images", 10)
    assert "--guidance-curve 2 2: give different numbers" in refused(*ask, "--guidance-curve", 2, 2)
    without = ("evaluate", "--samples", "s.npz", "--data", data)
    assert "--bits-images cannot be combined with --samples" in refused(*without, "--bits-images", 3)
    assert "--guidance-curve cannot be combined with --samples" in refused(*without, "--guidance-curve", 3)


def test_a_card_is_filled_from_the_record_of_its_own_weights(run, refused, here, model, feature_folder, data):
    shutil.copytree(model, "mine")
    card = Path("mine/README.md")
    card.write_text("# Mine\n\nBefore.\n\n<!-- evaluation -->\nold 0.123\n<!-- /evaluation -->\n\nAfter.\n")
    ask = ("--data", data, "--features", feature_folder, "--cas-seeds", 0, "--num-images", 12, "--steps", 2)
    run("evaluate", "mine", *ask, "--guidance-curve", 1, 3, "--curve-images", 6, "--out", "one")
    assert run("card", "mine", "--record", "one").strip() == "mine/README.md"
    text, record = card.read_text(), read_record("one")
    assert text.startswith("# Mine\n\nBefore.") and text.endswith("\n\nAfter.\n") and "old 0.123" not in text
    for name, entry in record["values"].items():
        assert re.search(rf"^\| {re.escape(name)} \| {entry['value']:.4f}", text, re.M)
    assert "steps 2;" in text and "images 12;" in text and "| guidance, 6 images |" in text and "None" not in text
    run("card", "mine", "--record", "one/metrics.json")
    assert card.read_text() == text
    card.unlink()
    run("card", "mine", "--record", "one")
    assert card.read_text().count("<!-- evaluation -->") == 1 and "frechet[" in card.read_text()
    card.write_text("<!-- /evaluation --><!-- evaluation -->")
    assert "README.md: needs <!-- evaluation --> and after it" in refused("card", "mine", "--record", "one")
    weights = Path("mine/unet/diffusion_pytorch_model.safetensors")
    before = weights_of(Path("mine"))["weights_sha256"]
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert weights_of(Path("mine"))["weights_sha256"] != before
    assert "--record one: is of other weights" in refused("card", "mine", "--record", "one")
    run("generate", "--all-classes", "--model", model, "--num-images", 4, "--steps", 2, "--out", "s.npz")
    run("evaluate", "--samples", "s.npz", *ask[:6], "--out", "file")
    assert "--record file: names no weights" in refused("card", "mine", "--record", "file")
