"""What cannot be measured is refused before any image is generated, and the line names the way out."""

import pytest
from PIL import Image
from tiny_runs import write_stripes

from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation import evaluate
from latentdiff.evaluation.markdown_report import report_markdown
from latentdiff.evaluation.reference_data import reference_sets
from latentdiff.evaluation.sample_sets import subset


def test_a_class_without_held_out_images_is_refused_before_generating(feature_folder, model, monkeypatch, tmp_path):
    """Not after everything was drawn: twelve images of three classes, and a class of which none is held out."""
    data = write_stripes(tmp_path / "data", 48)
    sets = reference_sets(str(data), Preprocess((16, 16), 1), 0.25)
    train, test = sets
    test = subset(test, (test.labels != 1).nonzero().flatten())
    monkeypatch.setattr("latentdiff.evaluation.reference_data.reference_sets", lambda *arguments: (train, test))
    monkeypatch.setattr(evaluate, "_make", None)  # whatever would generate
    with pytest.raises(UserError) as error:
        evaluate.evaluate(model, str(data), 12, features=feature_folder)
    scarce = test.class_names[1]
    assert f"too few of {scarce} (0)" in str(error.value) and "a test/ folder beside train/" in str(error.value)


def test_a_floor_of_fewer_images_says_how_many():
    entry = {"value": 1.0, "floor": 2.0, "images": 12, "floor_images": 3}
    report = {"metrics": {"frechet[x]": entry, "kid[x]": entry | {"floor_images": 12}}, "distribution": {}}
    near = {"median": 0.0, "held_out_median": 0.0, "closer_than_held_out": []}
    report |= {"memorisation": {"features": near, "pixels": near}, "left_out": {}}
    text = report_markdown(report | {"protocol": {}, "reference": {}, "settings": {}})
    assert "| frechet[x] | 1.0000 | 2.0000 (3 images) |" in text and "| kid[x] | 1.0000 | 2.0000 |" in text


@pytest.mark.parametrize("command", ["compare", "tune", "likelihood", "gallery"])
def test_data_of_other_classes_are_refused_before_generating(refused, model, feature_folder, tmp_path, monkeypatch, command):
    for name in ("cats", "dogs"):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for k in range(8):
            Image.new("L", (16, 16), 20 * k).save(folder / f"{k}.png")
    monkeypatch.setattr("latentdiff.generation.generate_batches", None)
    own = {"compare": ("--samplers", "euler"), "tune": ("--budget", 30), "likelihood": (), "gallery": ("--out", "pictures")}
    features = ("--features", feature_folder) if command in ("compare", "tune") else ()
    images = ("--num-images", 12) if command in ("compare", "tune") else ()
    message = refused(command, model, "--data", tmp_path / "pets", *own[command], *features, *images)
    assert f"--data {tmp_path / 'pets'}: its classes" in message and "are not the model's" in message
