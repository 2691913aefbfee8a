"""How images of many sizes come to one shape, under the new key and the old; what a run says of its data; held-out images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_sources import class_folder, write_image
from tiny_runs import autoencoder_tree, diffusion_tree, write_stripes, write_yaml

from latentdiff.cli import main
from latentdiff.config import load_config, parse_config
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.framing import framing_facts, framing_lines
from latentdiff.data.image_source import ImageSource
from latentdiff.data.sources import open_source
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation.reference_data import data_rule, reference_sets
from latentdiff.training.images import Images
from latentdiff.utils.images import to_uint8


def of_sizes(*sizes: tuple[int, int]) -> ImageSource:
    return ImageSource("x", 3, [], None, None, np.array(sizes))


# letterbox


def test_a_letterbox_keeps_the_whole_image_in_the_middle_of_the_background():
    image = np.zeros((10, 40, 3), np.uint8)
    image[:, :20] = (0, 0, 255)
    rule = Preprocess((20, 20), 3, "letterbox", background=(255, 128, 0))
    pixels = to_uint8(rule(image)[None])[0].astype(int)
    # 40 wide to 20, 10 high to 5: rows 7 to 11, (20 - 5) // 2 = 7 above and 8 below
    assert (pixels[:7] == (255, 128, 0)).all() and (pixels[12:] == (255, 128, 0)).all()
    assert abs(pixels[7:12, :8] - (0, 0, 255)).max() <= 1 and abs(pixels[7:12, 12:]).max() <= 1  # Lanczos rings a little
    mirrored = to_uint8(rule(image, flip=True)[None])[0].astype(int)
    assert np.array_equal(mirrored, pixels[:, ::-1])
    assert rule.content == (0, 0, 20, 20) and rule.padded_size == (20, 20)
    tall = to_uint8(rule(np.zeros((40, 10, 3), np.uint8))[None])[0].astype(int)
    assert (tall[:, :7] == (255, 128, 0)).all() and (tall[:, 7:12] == 0).all() and (tall[:, 12:] == (255, 128, 0)).all()


def test_a_letterbox_enlarges_and_takes_a_line_of_one_pixel():
    rule = Preprocess((8, 8), 1, "letterbox", background=(255, 0, 0))
    small = to_uint8(rule(np.full((2, 1, 1), 9, np.uint8))[None])[0, ..., 0]
    assert (small[:, 2:6] == 9).all() and (small[:, :2] == 76).all() and (small[:, 6:] == 76).all()  # the luma of red
    thin = to_uint8(rule(np.zeros((1, 1000, 1), np.uint8))[None])[0, ..., 0]
    assert (thin == 0).sum() == 8 and (thin[3] == 0).all()


def test_a_cache_tells_backgrounds_apart_and_keeps_what_it_said_of_older_framings():
    rules = [Preprocess((8, 8), 1, "letterbox", background=color) for color in ((255, 255, 255), (0, 0, 0))]
    assert rules[0].describe() != rules[1].describe() and rules[0].describe()["background"] == [255, 255, 255]
    assert Preprocess((8, 8), 1, "crop").describe() == {
        "padded_size": [8, 8],
        "content": [0, 0, 8, 8],
        "channels": 1,
        "fit": "crop",
        "pad_mode": None,
        "resample": "lanczos",
    }


@pytest.mark.parametrize(
    "framing, key, worst", [("crop", "cut", 0.75), ("letterbox", "filled", 0.75), ("resize", "stretched", 3.0)]
)
def test_what_framing_does_to_images_is_measured(framing, key, worst):
    source = of_sizes((64, 64), (64, 256), (128, 64), (16, 16), (64, 64))
    facts = framing_facts(source, Preprocess((64, 64), 3, framing))
    assert facts[key]["worst"] == worst and facts[key]["image"] == "image 1 (64x256)" and facts[key]["median"] == 0
    assert facts["enlarged"] == {"images": 1, "largest_factor": 4.0, "image": "image 3 (16x16)"}
    lines = framing_lines(facts)
    assert "image 1 (64x256)" in lines[0] and lines[1].endswith("enlarges 1 images, image 3 (16x16) the most, 4.0 times")
    assert framing_lines(framing_facts(of_sizes((64, 64), (128, 128)), Preprocess((64, 64), 3, framing))) == []


def test_the_share_that_crop_cuts_off_is_that_of_the_pixels():
    image = np.arange(40 * 90).reshape(40, 90, 1) % 251
    facts = framing_facts(ImageSource("x", 1, [], None, None, np.array([[40, 90]])), Preprocess((20, 30), 1, "crop"))
    kept = 40 * (40 * 30 / 20)  # pixels of the box of 20:30 that is cut out
    assert facts["cut"]["worst"] == pytest.approx(1 - kept / image.size, abs=1e-4)


# the key


@pytest.mark.parametrize("key", ["fit", "framing"])
def test_the_old_key_loads_with_one_line(tmp_path, capsys, key):
    tree = autoencoder_tree(tmp_path, tmp_path / "run", **{f"data__{key}": "crop"})
    config = load_config(write_yaml(tmp_path / "a.yaml", tree))
    said = capsys.readouterr().err
    assert config.data.framing == "crop" and "fit" not in config.model_dump()["data"]
    assert said == (
        ""
        if key == "framing"
        else f"warning: {tmp_path}/a.yaml: data.fit has a new name, data.framing; the old one still works\n"
    )
    with pytest.raises(UserError, match="data.fit is the old name of data.framing, and both are given; leave data.fit out"):
        load_config(tmp_path / "a.yaml", ["data.fit=pad", "data.framing=pad"])


def test_a_background_is_a_name_or_three_numbers(tmp_path):
    for value, expected in (("navy", (0, 0, 128)), ("#ff8000", (255, 128, 0)), ([1, 2, 3], (1, 2, 3))):
        assert parse_config(autoencoder_tree(tmp_path, tmp_path, data__background=value)).data.background == expected
    for value in ("nocolor", [1, 2], [1, 2, 256]):
        with pytest.raises(UserError, match="data.background"):
            parse_config(autoencoder_tree(tmp_path, tmp_path, data__background=value))


def test_no_shipped_config_has_the_old_key():
    files = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    trees = [yaml.safe_load(file.read_text()) for file in files]
    assert any("framing" in tree["data"] for tree in trees) and not any("fit" in tree["data"] for tree in trees)


class Codec:
    factor = 2


def test_a_checkpoint_of_an_earlier_version_is_read_as_it_was_made(tmp_path):
    data = {"size": [8, 8], "channels": 1, "fit": "pad", "multiple_of": 4, "held_out": 0.1}
    (tmp_path / "latentdiff.json").write_text(json.dumps({"config": {"data": data}}))
    rule, share, _, streaming, split, allowed = data_rule(tmp_path, Codec())
    assert (rule.framing, rule.background, share, streaming, split, allowed) == (
        "pad",
        (255, 255, 255),
        0.1,
        False,
        "random",
        0.01,
    )
    new = {**data, "framing": "letterbox", "background": [1, 2, 3], "held_out_rule": "per_class", "max_bad_share": 0.2}
    del new["fit"]
    (tmp_path / "latentdiff.json").write_text(json.dumps({"config": {"data": new}}))
    rule, _, _, _, split, allowed = data_rule(tmp_path, Codec())
    assert (rule.framing, rule.background, split, allowed) == ("letterbox", (1, 2, 3), "per_class", 0.2)


def test_evaluation_reads_the_images_that_training_read(tmp_path):
    class_folder(tmp_path, 10)
    Image.new("RGBA", (4, 6), (0, 0, 0, 0)).save(tmp_path / "a" / "clear.png")
    (tmp_path / "a" / "bad.png").write_bytes(b"x")
    (tmp_path / "b" / "bad.png").write_bytes(b"x")
    tree = autoencoder_tree(
        tmp_path,
        tmp_path,
        data__max_bad_share=0.2,
        data__background="red",
        data__channels=3,
        data__framing="letterbox",
        data__size=[8, 8],
    )
    images = Images(parse_config(tree).data, 2)
    meta = tmp_path / "model"
    meta.mkdir()
    (meta / "latentdiff.json").write_text(json.dumps({"config": parse_config(tree).model_dump(mode="json")}))
    train, test = reference_sets(str(tmp_path), *data_rule(meta, Codec()))
    assert train.fingerprint() == images.train.fingerprint() and test.fingerprint() == images.held_out.fingerprint()
    row = images.train.source.files.index("a/clear.png")
    whole = ImageDataset(train.source, train.preprocess)
    assert (whole.batch([row])[0][0].flatten(1).t() == torch.tensor([1.0, -1.0, -1.0])).all()


# what a run says


def test_a_run_says_what_it_does_with_the_data_at_its_start(tmp_path, capsys):
    data = write_stripes(tmp_path / "data", 12)
    write_image(data / "down" / "wide.png", size=(16, 64), mode="L")
    (data / "down" / "photo.svg").write_bytes(b"x")
    (data / "down" / "empty.png").write_bytes(b"")
    (data / "blank" / "x.txt").write_text("of nothing")
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(data, tmp_path / "run", train__steps=1, data__framing="crop"))
    capsys.readouterr()
    main(["train", str(config)])
    lines = [line.removeprefix(f"data {data}: ") for line in capsys.readouterr().err.splitlines() if line.startswith("data ")]
    assert lines == [
        "10 images to train on, 3 held out (drawn per class)",
        "not used, suffix .svg is not read (a drawing without pixels: export it as .png): 1 (down/photo.svg)",
        "not used, text beside no image: 1 (blank/x.txt)",
        "not used, cannot be read as an image: 1 (down/empty.png: an empty file (0 bytes))",
        "data.framing=crop to 16x16 cuts off 0% of the median image and 75% of down/wide.png (16x64)",
    ]


def test_info_says_the_same_of_a_folder_and_what_a_framing_would_do(run, tmp_path):
    data = write_stripes(tmp_path / "data", 12)
    write_image(data / "down" / "wide.png", size=(16, 64), mode="L")
    (data / "down" / "photo.svg").write_bytes(b"x")
    facts = json.loads(run("info", data))["train"]
    (reason,) = facts["files"]["left_out"]
    assert reason.startswith("suffix .svg") and facts["files"]["left_out"][reason] == {"count": 1, "names": ["down/photo.svg"]}
    assert facts["framing"]["size"] == [64, 64] and facts["framing"]["framing"] == "crop"
    assert facts["framing"]["cut"]["worst"] == 0.75 and facts["framing"]["enlarged"]["images"] == 13
    facts = json.loads(run("info", data, "data.size=[16,16]", "data.framing=letterbox"))["train"]["framing"]
    assert facts["filled"]["worst"] == 0.75 and "enlarged" not in facts
    facts = json.loads(run("info", data, "data.size=[22,22]", "data.framing=pad"))["train"]["framing"]
    assert "16x64 does not fit" in facts["refused"] and "letterbox" in facts["refused"]


def test_names_of_a_reason_are_bounded(tmp_path):
    write_image(tmp_path / "a.png")
    for k in range(150):
        (tmp_path / f"{k:03}.dat").write_bytes(b"x")
    source = open_source(str(tmp_path))
    entry = source.report.as_json()["left_out"]["suffix .dat is not read"]
    assert entry["count"] == 150 and len(entry["names"]) == 100
    assert source.report.lines() == ["not used, suffix .dat is not read: 150 (000.dat, 001.dat, 002.dat, …)"]
    for k in range(20):
        (tmp_path / f"b.{k}").write_bytes(b"x")
    lines = open_source(str(tmp_path)).report.lines()
    assert len(lines) == 13 and ".dat" in lines[0] and lines[-1].startswith("not used, for 9 other reasons: 9 (")


# held-out images


def test_classes_of_one_image_are_all_trained_on_and_that_is_said(tmp_path, capsys):
    data = tmp_path / "data"
    for k in range(4):
        write_image(data / str(k) / "0.png", 60 * k, size=(16, 16), mode="L")
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(data, tmp_path / "run", train__steps=1, train__batch_size=4))
    images = Images(load_config(config).data, 2)
    assert len(images.train) == 4 and images.nothing_held_out and images.facts()["held_out"] == 0
    capsys.readouterr()
    main(["train", str(config)])
    assert "4 images to train on, none held out, because each class has one image" in capsys.readouterr().err
    assert any(
        "measured on the training images" in line
        for line in json.loads((tmp_path / "run" / "report.json").read_text())["lines"]
    )
    with pytest.raises(UserError, match="each class has one image, so none was held out"):
        reference_sets(str(data))
    write_image(data / "0" / "1.png", 5, size=(16, 16), mode="L")
    images = Images(load_config(config).data, 2)
    assert len(images.held_out) == 1 and images.report_lines()[0].endswith(
        "(drawn per class); 3 classes have one image, which is trained on"
    )


def test_a_run_of_an_earlier_version_goes_on_with_the_images_that_it_held_out(run, refused, tmp_path):
    data = write_stripes(tmp_path / "data", 24)
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(data, tmp_path / "run", train__steps=2))
    run("train", config, "data.held_out_rule=random")
    record = tmp_path / "run" / "run.json"
    tree = json.loads(record.read_text())
    assert tree["data"].pop("held_out_rule") == "random"
    tree["data"]["fit"] = tree["data"].pop("framing")
    del tree["data"]["background"]
    record.write_text(json.dumps(tree))
    run("train", config, "train.steps=3", "--resume")
    assert json.loads(record.read_text())["data"]["held_out_rule"] == "random"
    assert "data.held_out_rule differs" in refused("train", config, "train.steps=4", "--resume")


def test_latents_of_another_held_out_rule_are_refused_by_its_name(run, refused, tmp_path, autoencoder_run):
    data = write_stripes(tmp_path / "data", 24)
    tree = diffusion_tree(data, tmp_path / "run", autoencoder_run, normaliser="measured", train__steps=1)
    config = write_yaml(tmp_path / "d.yaml", tree)
    run("encode", config, "data.held_out_rule=random")
    assert "data.held_out_rule" in refused("encode", config)


def test_loose_images_are_trained_on_without_classes_and_refused_with_them(run, refused, tmp_path, autoencoder_run):
    data = write_stripes(tmp_path / "data", 24)
    write_image(data / "loose.png", size=(16, 16), mode="L")
    config = write_yaml(
        tmp_path / "d.yaml", diffusion_tree(data, tmp_path / "run", autoencoder_run, normaliser="measured", train__steps=1)
    )
    said = refused("train", config)
    assert "1 images lie beside its sub-folders (loose.png)" in said and "condition.type=none" in said
    run("train", config, "condition.type=none")
    assert json.loads((tmp_path / "run" / "model" / "latentdiff.json").read_text())["steps"] == 1
