"""Evaluating models that read text: which captions they draw, under which classes, and what the record says of that."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import autoencoder_config
from tiny_text import text_tree, write_captioned

from latentdiff import checkpoints
from latentdiff.config import parse_config
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation import evaluate
from latentdiff.evaluation.records import read_record
from latentdiff.evaluation.reference_data import reference_sets
from latentdiff.evaluation.sample_sets import draw_prompts
from latentdiff.generation import Numbered, image_generators
from latentdiff.training import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path, Path]:
    """(captioned images with classes, a model told their text, a model told text and class)."""
    root = tmp_path_factory.mktemp("prompts")
    data = write_captioned(root / "data")
    first = train(autoencoder_config(data, root / "first"))
    changes = ({"train__steps": 2}, {"train__steps": 2, "condition__type": "class+text"})
    text, both = (train(parse_config(text_tree(data, root / str(k), first, **each))) for k, each in enumerate(changes))
    return data, text, both


def drawn(model: Path, text: str, row: int | None, number: int) -> np.ndarray:
    """[H, W, C] from 0 to 255: what that prompt (and class) gives under seed 3, drawn alone."""
    call = {"generator": image_generators(3, text, number, 1), "num_inference_steps": 2, "output_type": "np"}
    return checkpoints.load(model)([text], None if row is None else [row], **call).images[0] * 255


@pytest.fixture(scope="module")
def images(runs) -> ImageDataset:
    return ImageDataset(open_source(str(runs[0])), Preprocess())


# which captions


def test_each_image_gives_one_of_its_captions_and_then_another(images):
    few, all_of, many = (draw_prompts(images, count, "train", "d") for count in (20, 48, 120))
    captions, names = images.captions(), images.class_names
    assert [text in captions[i] for i, text in enumerate(all_of.texts)] == [True] * 48
    assert all_of.labels.tolist() == images.labels.tolist() and len(few.texts) == len(few.labels) == 20
    for prompts in (few, many):
        with_class = [text for text in zip(prompts.texts, prompts.labels.tolist(), strict=True) if text[0] != "stripes"]
        assert with_class and all(names[label] in text for text, label in with_class)
    assert many.texts[:48] == all_of.texts != many.texts[48:96]  # the same images, their captions drawn anew
    assert many.labels[:48].tolist() == many.labels[48:96].tolist()
    assert 0.15 < all_of.texts.count("stripes") / 48 < 0.55  # a third of the captions
    assert all_of.facts.items() >= {"captions_of": "training images", "captioned_images": 48, "different": 7}.items()
    assert few.facts["captioned_images"] == 20 and len({p.facts["sha256"] for p in (few, all_of, many)}) == 3
    assert draw_prompts(images, 20, "train", "d").texts == few.texts != draw_prompts(images, 20, "train", "d", seed=1).texts


def test_images_without_captions_are_refused(stripe_folder):
    plain = ImageDataset(open_source(str(stripe_folder)), Preprocess())
    with pytest.raises(UserError, match="--data here: its held-out images have no captions.*metadata.jsonl"):
        draw_prompts(plain, 4, "test", "here")


def test_a_subject_named_again_counts_on():
    assert list(Numbered(["a", 1, "a"], 2)) == [("a", 0, 0), ("a", 1, 0), (1, 0, 1), (1, 1, 1), ("a", 2, 2), ("a", 3, 2)]


def test_no_image_comes_twice_where_a_prompt_does(run, here, runs):
    ask = ("generate", "--model", runs[1], "--steps", 1, "--guidance", 1, "--out")
    run(*ask, "twice.npz", "stripes", "stripes", "--num-images", 2)
    run(*ask, "once.npz", "stripes", "--num-images", 4)
    twice, once = (np.load(f"{name}.npz")["arr_0"] for name in ("twice", "once"))
    assert np.array_equal(twice, once) and len(np.unique(once.reshape(4, -1), axis=0)) == 4


# in evaluate


def test_a_text_model_draws_the_held_out_captions(run, refused, here, runs, feature_folder, monkeypatch):
    data, model, _ = runs
    ask = ("evaluate", model, "--data", data, "--features", feature_folder, "--cas-seeds", 0, "--steps", 2, "--seed", 3)
    kept = {}
    monkeypatch.setattr(
        "latentdiff.evaluation.html_report.write_page", lambda *arguments: kept.update(images=arguments[2], said=arguments[5])
    )
    report = json.loads(run(*ask, "--num-images", 14, "--guidance-curve", 1, 3, "--curve-images", 6, "--out", "one"))
    _, held_out = reference_sets(str(data), Preprocess(), 0.25)
    expected = draw_prompts(held_out, 14, "test", "d")
    record = read_record("one")
    assert len(held_out) == 12 and kept["said"] == expected.texts and record["protocol"]["prompts"] == expected.facts
    assert expected.facts["captions_of"] == "held-out images" and report["reference"]["held_out_images"] == 12
    assert "label_accuracy[stripes-net]" not in report["metrics"] and record["protocol"]["class_counts"] is None
    assert record["guidance_curve"]["images"] == 6 and len(record["guidance_curve"]["points"]) == 2
    assert record["left_out"].items() >= {"bits_per_dim": "without --bits-images", "cas": "--cas-seeds 0"}.items()
    assert "guidance_curve" not in record["left_out"]
    *before, last = expected.texts
    assert np.abs(kept["images"][13] - drawn(model, last, None, before.count(last))).max() <= 1
    monkeypatch.undo()
    monkeypatch.chdir(here)
    run(*ask, "--num-images", 14, "--prompts", "train", "--bits-images", 2, "--out", "two")
    assert read_record("two")["protocol"]["prompts"]["captions_of"] == "training images"
    assert "'captions_of': 'training images'" in Path("two/evaluation.md").read_text()
    assert read_record("two")["values"]["bits_per_dim"]["images"] == 2
    assert "compare: prompts.captions_of is " in refused("compare", "one", "two")
    assert "Samples with their prompts." in Path("two/index.html").read_text()
    with Image.open("two/samples.png") as grid:
        assert grid.height > 3 * (2 * 16 + 24)  # 14 images in three rows, each with room for its prompt


def test_a_model_told_both_draws_each_caption_under_its_images_class(run, here, runs, feature_folder, monkeypatch):
    data, _, model = runs
    ask = ("--data", data, "--features", feature_folder, "--cas-seeds", 0, "--steps", 2, "--seed", 3, "--num-images", 12)
    kept = {}
    monkeypatch.setattr(
        "latentdiff.evaluation.html_report.write_page", lambda *arguments: kept.update(images=arguments[2], labels=arguments[3])
    )
    report = json.loads(run("evaluate", model, *ask, "--batch-size", 5, "--out", "one"))
    _, held_out = reference_sets(str(data), Preprocess(), 0.25)
    expected = draw_prompts(held_out, 12, "test", "d")
    assert kept["labels"].tolist() == held_out.labels.tolist() == expected.labels.tolist()
    assert report["protocol"]["class_counts"] == torch.bincount(held_out.labels, minlength=3).tolist()
    *before, last = expected.texts
    row = int(expected.labels[-1])
    alone, other = (drawn(model, last, each, before.count(last)) for each in (row, (row + 1) % 3))
    assert np.abs(kept["images"][-1] - alone).max() <= 1 < np.abs(kept["images"][-1] - other).max()


def test_what_goes_with_no_prompts_is_refused(refused, model, runs, stripe_folder, feature_folder):
    ask = ("--data", stripe_folder, "--features", feature_folder)
    assert "--prompts train: this model reads no text" in refused("evaluate", model, *ask, "--prompts", "train")
    assert "--prompts other: valid are test and train" in refused("evaluate", model, *ask, "--prompts", "other")
    assert "--prompts cannot be combined with --samples" in refused("evaluate", "--samples", "x.npz", *ask, "--prompts", "test")
    assert "its held-out images have no captions" in refused("evaluate", runs[1], *ask, "--num-images", 4)
    both = "measure it by latentdiff evaluate or judge"
    assert both in refused("compare", runs[1], "--data", runs[0], "--samplers", "euler", "--features", feature_folder)


@pytest.mark.parametrize(
    ("classes", "null_class", "text", "null_prompt", "guided"),
    [
        (3, 3, False, "", True),
        (3, None, False, "", False),
        (0, None, False, "", False),
        (0, None, True, "", True),
        (0, None, True, None, False),
        (3, 3, True, None, False),
        (3, None, True, "", False),
        (3, 3, True, "", True),
    ],
)
def test_what_was_dropped_in_training_can_be_guided(classes, null_class, text, null_prompt, guided):
    config = SimpleNamespace(null_class=null_class, null_prompt=null_prompt)
    pipeline = SimpleNamespace(num_classes=classes, text_encoder=object() if text else None, config=config)
    assert evaluate._can_be_guided(pipeline) is guided
    for count, images in ((5000, 999 if classes and not text else 1000), (20, 18 if classes and not text else 20)):
        assert evaluate._curve_images(pipeline, None, count) == images
        assert evaluate._curve_images(pipeline, 7, count) == 7


def test_a_bound_that_cannot_be_made_is_refused_before_anything_is_drawn(refused, runs, feature_folder, tmp_path, monkeypatch):
    data, model, _ = runs
    shutil.copytree(model, tmp_path / "undropped")
    index = tmp_path / "undropped" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"null_prompt": None}))
    monkeypatch.setattr(evaluate, "_make", None)  # would fail otherwise than by one line
    ask = ("evaluate", tmp_path / "undropped", "--data", data, "--features", feature_folder, "--num-images", 4)
    assert "trained without text dropout, so it has no likelihood" in refused(*ask, "--bits-images", 2)
    assert "--guidance-curve: this model has no guidance" in refused(*ask, "--guidance-curve", 1, 2)
