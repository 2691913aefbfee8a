"""The command line: what it makes, and that a user's mistake is exit status 2, one line, and nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_runs import autoencoder_tree, diffusion_tree, tree, write_stripes, write_yaml

from latentdiff import samplers
from latentdiff.cli import main

WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASSES = ["across", "blank", "down"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="session")
def samples(model, tmp_path_factory) -> Path:
    """Five images a class as npz."""
    path = tmp_path_factory.mktemp("samples") / "s.npz"
    main(["generate", "--all-classes", "--model", str(model), "--num-images", "5", "--steps", "3", "--out", str(path)])
    return path


# generate


def test_generate_writes_a_labelled_grid_by_default(run, here, model):
    out = run("generate", "down", "0", "--model", model, "--num-images", 3, "--steps", 2)
    assert out.strip() == "samples.png" and [p.name for p in here.iterdir()] == ["samples.png"]
    picture = Image.open(here / "samples.png")
    assert picture.height == 2 * (2 * 16 + 2) and picture.width > 3 * (2 * 16 + 2) and picture.mode == "RGB"
    names = np.asarray(picture.convert("L"))[:, :40]
    assert all(half.min() < 128 for half in (names[:34], names[34:]))  # a name beside each row


def test_generate_npz_has_the_evaluation_format(samples):
    with np.load(samples) as file:
        assert file.files == ["arr_0", "arr_1"]
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (15, 16, 16, 3)
    assert labels.dtype == np.int64 and labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert (images[..., 0] == images[..., 2]).all()  # grey repeated
    assert len({image.tobytes() for image in images}) == 15


def test_the_same_seed_gives_the_same_bytes_at_any_batch_size(run, here, model, samples):
    base = ("generate", "--all-classes", "--model", model, "--num-images", 5, "--steps", 3)
    run(*base, "--out", "again.npz")
    assert (here / "again.npz").read_bytes() == samples.read_bytes()
    run(*base, "--out", "small.npz", "--batch-size", 2)
    run(*base, "--out", "other.npz", "--seed", 1)
    first, small, other = (np.load(p)["arr_0"].astype(int) for p in (samples, here / "small.npz", here / "other.npz"))
    assert np.abs(first - small).max() <= 1 and np.abs(first - other).max() > 20
    run("generate", "down", "--model", model, "--num-images", 2, "--steps", 3, "--out", "few.npz")
    few = np.load(here / "few.npz")["arr_0"].astype(int)
    assert np.abs(few - first[10:12]).max() <= 1  # nor on how many, or on which other classes


def test_generate_into_a_folder_writes_an_image_a_file(run, here, model, samples):
    run("generate", "blank", "--model", model, "--num-images", 2, "--steps", 3, "--out", "images")
    files = sorted((here / "images").iterdir())
    assert [p.name for p in files] == ["00000-blank.png", "00001-blank.png"]
    image = np.asarray(Image.open(files[0])).astype(int)
    assert image.shape == (16, 16) and np.abs(image - np.load(samples)["arr_0"][5, ..., 0]).max() <= 1


@pytest.mark.parametrize(
    "options",
    [("--sampler", "heun"), ("--guidance", "3"), ("--steps", "5"), ("--guidance", "1"), ("--guidance-interval", "0.4", "0.6")],
)
def test_every_option_of_generate_changes_the_images(run, here, model, samples, options):
    run("generate", "--all-classes", "--model", model, "--num-images", 5, "--steps", 3, *options, "--out", "x.npz")
    assert np.abs(np.load(here / "x.npz")["arr_0"].astype(int) - np.load(samples)["arr_0"]).max() > 2


def test_bfloat16_gives_nearly_the_same_images(run, here, model, samples):
    ask = ("generate", "--all-classes", "--model", model, "--num-images", 5, "--steps", 3)
    run(*ask, "--precision", "bfloat16", "--out", "x.npz")
    error = np.abs(np.load(here / "x.npz")["arr_0"].astype(int) - np.load(samples)["arr_0"])
    assert 0 < error.mean() < 3


@pytest.mark.parametrize("name", samplers.names())
def test_generate_takes_every_sampler(run, here, model, name):
    run("generate", "0", "--model", model, "--num-images", 1, "--steps", 2, "--sampler", name, "--out", "x.npz")
    assert np.load(here / "x.npz")["arr_0"].shape == (1, 16, 16, 3)


def test_generate_refuses_what_it_cannot_make(refused, model, tmp_path):
    ask = ("generate", "--model", model, "--steps", 2)
    assert "unknown class 'acros'; the classes are: 0 across, 1 blank, 2 down" in refused(*ask, "acros")
    assert "unknown class '3'" in refused(*ask, "3")
    assert "the classes are: 0 across, 1 blank, 2 down" in refused(*ask)
    assert "--all-classes" in refused(*ask, "down", "--all-classes")
    assert f"--sampler eular: unknown; valid: {', '.join(samplers.names())}" in refused(*ask, "down", "--sampler", "eular")
    assert "--num-images" in refused(*ask, "down", "--num-images", 0)
    assert "--steps: must be at least 1" in refused("generate", "--model", model, "down", "--steps", 0)
    assert "--num-images" in refused(*ask, "down", "--num-images", "many")
    assert "--stpes" in refused(*ask, "down", "--stpes", 3)


@pytest.mark.parametrize("out", ["x.jpg", "nowhere/x.png", "nowhere/x.npz", "taken", "folder.png"])
def test_generate_refuses_an_output_it_cannot_write(refused, model, here, out):
    (here / "taken").write_text("a file")
    (here / "folder.png").mkdir()
    assert f"--out {out}: " in refused("generate", "down", "--model", model, "--out", out)


def test_generate_refuses_a_grid_of_thousands(refused, model):
    assert "use .npz or a folder" in refused("generate", "down", "--model", model, "--num-images", 2000)


# damaged and missing files


def test_a_missing_model_folder_is_named(refused):
    for command in (["generate", "0", "--model"], ["info"], ["evaluate", "--data", ".", "--features", "x"]):
        assert "nowhere" in refused(*command, "nowhere") or command[0] == "evaluate"
    assert "model 'nowhere'" in refused("reconstruct", "nowhere", "a.png")


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_truncated_weights_are_named(refused, model, tmp_path, part):
    shutil.copytree(model, tmp_path / "model")
    truncate(tmp_path / "model" / part / WEIGHTS)
    file = str(tmp_path / "model" / part / WEIGHTS)
    for command in (["generate", "down", "--model"], ["info"]):
        message = refused(*command, tmp_path / "model")
        assert f"{file}: truncated" in message


def test_a_truncated_first_stage_is_named(refused, autoencoder_run, stripe_folder, tmp_path):
    shutil.copytree(autoencoder_run / "autoencoder", tmp_path / "stage1")
    truncate(tmp_path / "stage1" / WEIGHTS)
    config = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", tmp_path / "stage1"))
    for command in (["train", config], ["encode", config], ["info", tmp_path / "stage1"]):
        assert f"{tmp_path / 'stage1' / WEIGHTS}: truncated" in refused(*command)
    (tmp_path / "stage1" / WEIGHTS).unlink()
    assert f"{tmp_path / 'stage1' / WEIGHTS}: missing" in refused("info", tmp_path / "stage1")


def test_a_truncated_feature_network_is_named(refused, feature_folder, samples, stripe_folder, tmp_path):
    shutil.copytree(feature_folder, tmp_path / "net")
    truncate(tmp_path / "net" / "model.safetensors")
    said = f"{tmp_path / 'net' / 'model.safetensors'}: has "
    command = ("evaluate", "--samples", samples, "--data", stripe_folder, "--features", tmp_path / "net", "--out", "report")
    assert said in refused(*command)
    loss = {"loss__perceptual": 1.0, "loss__perceptual_network": str(tmp_path / "net")}
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", **loss))
    assert said in refused("train", config)


def test_a_truncated_cache_shard_is_made_again(run, diffusion_run, autoencoder_run, stripe_folder, tmp_path):
    shutil.copytree(diffusion_run / "latents", tmp_path / "latents")
    whole = tree(tmp_path / "latents")
    truncate(tmp_path / "latents" / "shard-00000.safetensors")
    tree_ = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, cache__folder=str(tmp_path / "latents"))
    assert run("encode", write_yaml(tmp_path / "d.yaml", tree_)).strip() == str(tmp_path / "latents")
    assert tree(tmp_path / "latents") == whole


def test_a_damaged_manifest_is_named(refused, diffusion_run, autoencoder_run, stripe_folder, tmp_path):
    shutil.copytree(diffusion_run / "latents", tmp_path / "latents")
    truncate(tmp_path / "latents" / "manifest.json")
    tree_ = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, cache__folder=str(tmp_path / "latents"))
    assert "manifest.json: not the manifest" in refused("encode", write_yaml(tmp_path / "d.yaml", tree_))


def test_a_truncated_training_state_is_named(refused, diffusion_run, autoencoder_run, stripe_folder, tmp_path):
    shutil.copytree(diffusion_run, tmp_path / "run")
    truncate(tmp_path / "run" / "state" / "step-60" / "model.safetensors")
    config = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run))
    assert f"{tmp_path / 'run' / 'state' / 'step-60'}: damaged training state" in refused(
        "train", config, "train.steps=70", "--resume"
    )


def test_a_cache_of_another_autoencoder_is_refused(refused, diffusion_run, autoencoder_run, stripe_folder, tmp_path):
    shutil.copytree(diffusion_run / "latents", tmp_path / "latents")
    shutil.copytree(autoencoder_run / "autoencoder", tmp_path / "other")
    path = tmp_path / "other" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "encoder.conv_in.bias": weights["encoder.conv_in.bias"] + 0.01}, path)
    (tmp_path / "other" / "hashes.json").unlink()
    tree_ = diffusion_tree(stripe_folder, tmp_path / "run", tmp_path / "other", cache__folder=str(tmp_path / "latents"))
    config = write_yaml(tmp_path / "d.yaml", tree_)
    for command in ("train", "encode"):
        message = refused(command, config)
        assert str(tmp_path / "latents") in message and "other autoencoder weights" in message


# configs and data


def test_mistakes_in_a_config_are_named(refused, stripe_folder, tmp_path):
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run"))
    assert "train.stpes: unknown key; did you mean 'steps'?" in refused("train", config, "train.stpes=3")
    bad = write_yaml(tmp_path / "bad.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", los={"l1": 1}))
    assert f"{bad}: los: unknown key; did you mean 'loss'?" in refused("train", bad)
    for command in ("train", "encode"):
        assert "nothing.yaml: no such config file" in refused(command, "nothing.yaml")
    assert "encode takes a config whose stage is diffusion" in refused("encode", config)
    assert "data 'nowhere': no such folder" in refused("train", config, "data.source=nowhere")
    assert "there is no run to resume" in refused("train", config, "--resume")
    assert "write it as key=value" in refused("train", config, "steps")


def test_corrupt_images_are_skipped_up_to_the_share_and_refused_above_it(refused, run, tmp_path):
    data = write_stripes(tmp_path / "data")
    bad, worse = sorted(data.rglob("*.png"))[3:5]
    for path in (bad, worse):
        path.write_bytes(b"not a picture")
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(data, tmp_path / "run", train__steps=1))
    message = refused("train", config)
    assert str(bad) in message and "2 of 48 images cannot be read" in message and "max_bad_share" in message
    run("train", config, "data.max_bad_share=0.05")
    assert (tmp_path / "run" / "report.json").is_file()


def test_an_image_that_proves_corrupt_while_training_ends_the_run_in_one_line(refused, run, tmp_path, capsys):
    data = write_stripes(tmp_path / "data")
    for path in sorted(data.rglob("*.png")):  # JPEG has no checksum: the header is whole, so the source opens
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
        path.with_suffix(".jpg").write_bytes(path.with_suffix(".jpg").read_bytes()[:-150])
    tree_ = autoencoder_tree(data, tmp_path / "run")
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(["train", str(write_yaml(tmp_path / "a.yaml", tree_))])
    last = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2 and last.startswith("latentdiff: data ") and "cannot be read" in last
    assert not (tmp_path / "run" / "autoencoder").exists()


# reconstruct, info, evaluate


@pytest.mark.parametrize("which", ["checkpoint", "run"])
def test_reconstruct_writes_pairs_and_scores(run, here, model, autoencoder_run, stripe_folder, which):
    images = sorted((stripe_folder / "down").glob("*.png"))[:3]
    report = json.loads(run("reconstruct", model if which == "checkpoint" else autoencoder_run, *images))
    assert [row["image"] for row in report["images"]] == [str(p) for p in images]
    assert all(10 < row["psnr_db"] < 60 and 0 < row["ssim"] <= 1 for row in report["images"])
    picture = np.asarray(Image.open(here / report["out"])).astype(int)
    assert picture.shape == (3 * 18, 32 + 2)
    assert (picture[:16, :16] == np.asarray(Image.open(images[0]))).all()  # the input on the left
    psnr = 10 * np.log10(255**2 / ((picture[:16, :16] - picture[:16, 16:32]) ** 2).mean())
    assert psnr == pytest.approx(report["images"][0]["psnr_db"], abs=0.1)


def test_reconstruct_refuses_what_is_not_an_image(refused, model, stripe_folder, here):
    good = next((stripe_folder / "down").glob("*.png"))
    (here / "bad.png").write_bytes(b"nothing")
    assert "bad.png: cannot be read as an image (not a known image format)" in refused("reconstruct", model, good, "bad.png")
    assert "missing.png: cannot be read as an image (no such file)" in refused("reconstruct", model, good, "missing.png")
    assert "must end in .png" in refused("reconstruct", model, good, "--out", "x.npz")


def test_info_says_what_a_thing_is(run, model, autoencoder_run, stripe_folder, tmp_path, feature_folder):
    facts = json.loads(run("info", model))
    assert facts["classes"] == CLASSES and facts["null_class"] == 3 and facts["latent_shape"] == [2, 8, 8]
    assert facts["parameters"]["unet"] > 1000 and facts["steps_trained"] == 60 and facts["prediction"] == "epsilon"
    assert facts["bytes_on_disk"] == sum(len(content) for content in tree(model).values())
    facts = json.loads(run("info", feature_folder))
    assert facts["name"] == "stripes-net" and facts["dimensions"] == 16 and facts["parameters"] > 100
    facts = json.loads(run("info", model.parent / "latents"))
    assert facts["images"] == 36 and facts["shape"] == [2, 8, 8] and sum(facts["classes"].values()) == 36
    facts = json.loads(run("info", autoencoder_run))
    assert facts["class"] == "AutoencoderKL" and facts["factor"] == 2 and facts["latent_channels"] == 2
    facts = json.loads(run("info", stripe_folder))
    assert facts["train"]["images"] == 48 and facts["train"]["classes"] == dict.fromkeys(CLASSES, 16)
    config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run"))
    assert json.loads(run("info", config))["config"]["train"]["steps"] == 6


def test_info_reports_on_data(run, tmp_path, monkeypatch):
    data = write_stripes(tmp_path / "data", 6)
    first, second, third = sorted(path.relative_to(data) for path in data.rglob("*.png"))[:3]
    shutil.copy(data / first, data / "down" / "copy.png")
    with Image.open(data / first) as image:
        image.save(data / "down" / "again.bmp")  # the same pixels in another file
        image.resize((8, 4)).save(data / "down" / "wide.png")
    (data / "down" / "bad.png").write_bytes(b"nothing")
    broken = (data / second).with_name("broken.jpg")  # its header and its end are whole
    Image.effect_noise((64, 64), 50).save(broken)
    content = bytearray(broken.read_bytes())
    content[-900:-2] = bytes(898)
    broken.write_bytes(content[:20] + content[300:])
    facts = json.loads(run("info", data))
    assert "in_both_splits" not in facts
    facts = facts["train"]
    assert set(facts["unreadable"]) == {"down/bad.png", str(broken.relative_to(data))} and all(facts["unreadable"].values())
    assert facts["sizes"] == 2 and facts["smallest"] == [4, 8] and facts["captions"] is None and facts["channels"] == 1
    assert facts["most_common_sizes"] == [{"size": [16, 16], "images": 8}, {"size": [4, 8], "images": 1}]
    alike = {"images": 2, "groups": 1, "first": [sorted([str(first), "down/again.bmp", "down/copy.png"])], "compared": "pixels"}
    assert facts["duplicates"] == alike
    monkeypatch.setattr("latentdiff.data.summary.MANY_PIXELS", 100)  # then only files are compared
    of_files = json.loads(run("info", data))["train"]["duplicates"]
    assert of_files == {"images": 1, "groups": 1, "first": [sorted([str(first), "down/copy.png"])], "compared": "files"}


def test_info_reports_on_captions_and_on_what_both_splits_have(run, tmp_path):
    for split, texts in (("train", ["one", "a longer caption of five", ["one", "two words"]]), ("test", ["one"])):
        folder = write_stripes(tmp_path / "data" / split, len(texts), seed=len(texts))
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
        rows = [{"file_name": file, "text": text} for file, text in zip(files, texts, strict=True)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if split == "train":
            leaked = folder / files[0]
    shutil.copy(leaked, folder / files[0])
    facts = json.loads(run("info", tmp_path / "data"))
    tokens = facts["train"]["captions"].pop("tokens")
    assert facts["train"]["captions"] == {"captions": 4, "distinct": 3, "words": {"min": 1, "median": 1.5, "max": 5}}
    assert tokens == {"captions": 4, "longest": 7, "limit": 32, "cut": 0, "longest_caption": "a longer caption of five"}
    assert facts["test"]["captions"]["words"] == {"min": 1, "median": 1, "max": 1}
    both = {"train": [leaked.relative_to(tmp_path / "data" / "train").as_posix()], "test": [files[0]]}
    assert facts["in_both_splits"] == {"images": 1, "groups": 1, "first": [both], "compared": "pixels"}
    assert facts["train"]["duplicates"]["images"] == 0


def test_protocols_say_the_checkpoints_interval_and_the_steps_a_sampler_takes(run, model, feature_folder, stripe_folder, here):
    other = shutil.copytree(model, here / "other")
    index = json.loads((other / "model_index.json").read_text())
    (other / "model_index.json").write_text(json.dumps({**index, "default_guidance_interval": [0.2, 0.8]}))
    assert json.loads(run("info", other))["defaults"]["default_guidance_interval"] == [0.2, 0.8]
    ask = (other, "--data", stripe_folder, "--features", feature_folder, "--num-images", 3)
    for more, steps in (((), 2), (("--sampler", "euler_maruyama"), 50), (("--sampler", "euler"), 2), (("--steps", 3), 3)):
        protocol = json.loads(run("evaluate", *ask, "--cas-seeds", 0, *more))["protocol"]
        assert protocol["guidance_interval"] == [0.2, 0.8] and protocol["steps"] == steps
    run("compare", *ask, "--samplers", "euler", "--steps", 2, "--out", "table")
    assert json.loads((here / "table" / "comparison.json").read_text())["protocol"]["guidance_interval"] == [0.2, 0.8]


def test_evaluate_refuses_data_of_other_classes(refused, model, feature_folder, tmp_path):
    data = write_stripes(tmp_path / "data")
    (data / "down").rename(data / "zigzag")
    message = refused("evaluate", model, "--data", data, "--features", feature_folder, "--num-images", 15, "--cas-seeds", 0)
    assert "zigzag" in message and "are not the model's" in message


def test_reconstruct_takes_images_of_several_sizes(run, here, model):
    for size in (24, 16):
        Image.fromarray(np.full((size, size, 3), 9 * size, np.uint8)).save(here / f"{size}.png")
    report = json.loads(run("reconstruct", model, "24.png", "16.png", "--own-size"))
    assert np.asarray(Image.open(here / report["out"])).shape[:2] == (2 * 26, 48 + 2)
    assert report["images"][0]["prepared"] == {"file_size": [24, 24], "size": [24, 24], "framing": "own size"}


def test_reconstruct_takes_a_folder_at_a_size(run, here, refused, model):
    (here / "pictures" / "inside").mkdir(parents=True)
    for k, size in enumerate(((24, 40), (16, 16))):
        Image.fromarray(np.full((*size, 3), 90 * k, np.uint8)).save(here / "pictures" / ("inside" if k else "") / f"{k}.png")
    (here / "pictures" / "broken.png").write_bytes(b"no image")
    report = json.loads(run("reconstruct", model, "pictures", "--size", 32, "--framing", "letterbox"))
    assert [each["image"] for each in report["images"]] == ["pictures/0.png", "pictures/inside/1.png"]
    assert report["unreadable"] == ["pictures/broken.png"]
    assert report["images"][0]["prepared"]["size"] == [32, 32]
    decibels = [each["psnr_db"] for each in report["images"]]
    assert report["mean"]["images"] == 2
    assert report["mean"]["psnr_db"] == pytest.approx(sum(decibels) / 2)
    assert np.asarray(Image.open(here / report["out"])).shape[:2] == (2 * 34, 64 + 2)
    assert "--size 31: must be a multiple of 2" in refused("reconstruct", model, "pictures", "--size", 31)
    assert "exclude each other" in refused("reconstruct", model, "pictures", "--size", 32, "--own-size")
    assert "broken.png: cannot be read" in refused("reconstruct", model, "pictures/broken.png")


def test_reconstruct_reads_images_as_training_does(run, here, model, autoencoder_run):
    wide = np.zeros((16, 32), np.uint16)
    wide[:, 8:24] = 65535 // 2  # 16 bit, and what matters in the middle
    Image.fromarray(wide).save(here / "wide.png")
    Image.new("LA", (16, 16), (0, 0)).save(here / "clear.png")
    turned = np.zeros((32, 16), np.uint8)
    turned[8:24] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(turned).save(here / "turned.jpg", exif=exif, quality=100)
    for what in (model, autoencoder_run, autoencoder_run / "autoencoder"):  # each says how it was trained
        report = json.loads(run("reconstruct", what, "wide.png", "clear.png", "turned.jpg"))
        picture = np.asarray(Image.open(here / report["out"])).astype(int)
        assert picture.shape[:2] == (3 * 18, 32 + 2)
        levels = picture[..., 0] if picture.ndim == 3 else picture
        assert levels[:16, :16].min() == levels[:16, :16].max() == 127
        assert (levels[18:34, :16] == 255).all() and abs(levels[36:52, :16] - 200).max() <= 3
        prepared = [row["prepared"] for row in report["images"]]
        assert prepared[0]["file_size"] == [16, 32] and prepared[0]["size"] == [16, 16] and prepared[0]["framing"] == "crop"
        assert prepared[0]["cut"]["worst"] == 0.5 and prepared[2]["file_size"] == [16, 32]
        assert prepared[1] == {"file_size": [16, 16], "size": [16, 16], "framing": "exact"}


def test_evaluate_measures_samples(run, here, samples, feature_folder, tmp_path):
    data = write_stripes(tmp_path / "data" / "train").parent
    write_stripes(data / "test", 30, seed=1)
    base = ("evaluate", "--samples", samples, "--data", data, "--features", feature_folder, "--cas-seeds", 0)
    report = json.loads(run(*base, "--out", "report"))
    entry = report["metrics"]["frechet[stripes-net]"]
    assert entry["value"] > 0 and entry["floor"] > 0 and report["protocol"]["class_counts"] == [5, 5, 5]
    assert json.loads((here / "report" / "evaluation.json").read_text()) == report
    assert "frechet[stripes-net]" in (here / "report" / "evaluation.md").read_text()
    assert report["reference"]["features"] == "stripes-net" and "fid" not in json.dumps(report).lower()
    assert "cas" not in report["metrics"] and str(samples) in report["protocol"]["model"]


def test_evaluate_measures_a_model_beside_its_reconstructions(run, model, stripe_folder, feature_folder):
    options = ("--data", stripe_folder, "--features", feature_folder, "--cas-seeds", 0, "--num-images", 15, "--steps", 3)
    report = json.loads(run("evaluate", model, *options, "--guidance", 2))
    assert report["metrics"]["frechet[stripes-net]"]["reconstruction"] > 0 and report["reconstruction"]["psnr"] > 10
    assert report["reference"]["images"] == 36  # the images held out from training are not part of the reference
    protocol = report["protocol"]
    assert (protocol["steps"], protocol["guidance"], protocol["images"], protocol["seed"]) == (3, 2.0, 15, 0)
    assert protocol["class_counts"] == [5, 5, 5] and protocol["sampler"]


def test_evaluate_refuses_what_it_cannot_measure(refused, model, samples, stripe_folder, feature_folder, here):
    base = ("evaluate", "--data", stripe_folder, "--features", feature_folder)
    assert "give either MODEL or --samples" in refused(*base)
    assert "give either MODEL or --samples" in refused(*base, model, "--samples", samples)
    assert "multiple of the model's 3 classes" in refused(*base, model, "--num-images", 10)
    for flag in (("--num-images", 0), ("--batch-size", 0), ("--cas-seeds", -1)):
        assert "must be at least" in refused(*base, model, *flag)
    (here / "file").write_text("kept")
    assert "--out file: is a file" in refused(*base, model, "--out", "file") and (here / "file").read_text() == "kept"
    assert "cannot be made" in refused(*base, model, "--out", "file/below")
    assert "--samples missing.npz: no such file" in refused(*base, "--samples", "missing.npz")
    whole = samples.read_bytes()
    (here / "cut.npz").write_bytes(whole[: len(whole) // 2])
    assert "--samples cut.npz: not an npz" in refused(*base, "--samples", "cut.npz")
    np.savez(here / "float.npz", np.zeros((2, 16, 16, 3)))
    assert "arr_0 must be uint8" in refused(*base, "--samples", "float.npz")
    ask = ("evaluate", "--data", stripe_folder, "--features", "nothing-here", "--samples", samples)
    assert "--features 'nothing-here': no such folder" in refused(*ask)


# the process


def test_as_a_process_a_mistake_is_status_2_and_one_line(model, here):
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "latentdiff", "generate", "Sneakr", "--model", str(model)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and list(here.iterdir()) == []
    assert len(done.stderr.splitlines()) == 1
    assert "unknown class 'Sneakr'; the classes are: 0 across, 1 blank, 2 down" in done.stderr


def test_overrides_may_stand_on_either_side_of_an_option(refused, tmp_path):
    for words in (["seed=1", "--resume", "train.stpes=2"], ["--resume", "seed=1", "train.stpes=2"]):
        config = write_yaml(tmp_path / "a.yaml", autoencoder_tree(tmp_path, tmp_path / "run"))
        assert "train.stpes: unknown key; did you mean 'steps'?" in refused("train", config, *words)
    assert "--resum-e: unknown option; did you mean --resume?" in refused("train", "a.yaml", "--resum-e")
    assert "unrecognized arguments: b" in refused("info", "a", "b")


def test_a_folder_with_files_is_not_generated_into(refused, model, here):
    (here / "images").mkdir()
    (here / "images" / "old.png").write_bytes(b"kept")
    ask = ("generate", "0", "--model", model, "--num-images", 1, "--steps", 1, "--out")
    assert "--out images: the folder is not empty" in refused(*ask, "images")
    assert "--out '': give a file that ends in .png or .npz" in refused(*ask, "")
    assert "--out '.png': give a file" in refused(*ask, ".png")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("generate", "0", "--guidance", "nan"), "guidance_scale nan: must be a finite number"),
        (("generate", "0", "--guidance-interval", "0.8", "0.2"), "0 <= low <= high <= 1"),
        (("generate", "0", "--steps", "0"), "--steps: must be at least 1"),
        (("likelihood", "--data", "x", "--rtol", "0"), "--rtol must be finite and above 0"),
        (("compare", "--data", "x", "--samplers", "euler", "--batch-size", "0"), "--batch-size must be at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(refused, model, arguments, said):
    command, *rest = arguments
    assert said in refused(command, *(("--model", model) if command == "generate" else (model,)), *rest)


def test_help_and_bad_usage_are_quick(here, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0 and "generate" in capsys.readouterr().out
    for arguments in ([], ["generat"], ["train"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_waiting_threads_yield_to_other_programs_unless_the_user_says_how(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert os.environ.pop("GOMP_SPINCOUNT") == "10000"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert "GOMP_SPINCOUNT" not in os.environ
