"""Distances in feature spaces that others trained: vision encoders of transformers, and torch-fidelity's Inception."""

import hashlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from stripes import stripe_pixels, stripes
from tiny_runs import write_stripes

from latentdiff.errors import UserError
from latentdiff.evaluation import default_features, feature_spaces
from latentdiff.evaluation.feature_cache import reference_statistics
from latentdiff.evaluation.feature_spaces import open_inception, open_space
from latentdiff.evaluation.metrics import evaluate_samples
from latentdiff.evaluation.records import make_record, read_record
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.models.feature_net import extract

SIDE = 16
VISION = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 8}
TEXT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}


def save(folder: Path, model, **constants) -> Path:
    model.save_pretrained(folder)
    written = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "do_center_crop": True} | constants
    (folder / "preprocessor_config.json").write_text(json.dumps(written))
    return folder


def dinov2():
    torch.manual_seed(0)
    return transformers.Dinov2Model(transformers.Dinov2Config(**VISION, mlp_ratio=2)).eval()


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> Path:
    crop = {"height": SIDE, "width": SIDE}
    return save(tmp_path_factory.mktemp("spaces") / "dino", dinov2(), crop_size=crop, size={"shortest_edge": 20})


def test_features_are_the_encoders_own_of_the_processors_pixels(dino):
    space = open_space(dino)
    pixels = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    features, classes = extract(space, x)
    processor = transformers.BitImageProcessorPil if hasattr(transformers, "BitImageProcessorPil") else None
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
    fed = torch.from_numpy((pixels / 255 - mean) / std).permute(0, 3, 1, 2).float()
    if processor is not None:
        made = processor.from_pretrained(dino, do_resize=False)([Image.fromarray(each) for each in pixels], return_tensors="pt")
        torch.testing.assert_close(made["pixel_values"], fed, atol=1e-5, rtol=0)
    torch.testing.assert_close(features, dinov2()(fed).pooler_output, atol=1e-5, rtol=0)
    assert classes is None and space.dim == features.shape[1] == 8 and space.name == "dino"


def test_another_size_is_scaled_as_pillow_does(dino):
    pixels = np.random.default_rng(1).integers(0, 256, (1, 40, 40, 3), dtype=np.uint8)
    small = np.asarray(Image.fromarray(pixels[0]).resize((SIDE, SIDE), Image.Resampling.BICUBIC))[None]
    space = open_space(dino)
    both = (torch.from_numpy(p.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for p in (pixels, small))
    large, made = (extract(space, x)[0] for x in both)
    torch.testing.assert_close(large, made, atol=0.02, rtol=0)  # a level of rounding in some pixels
    other = torch.nn.functional.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), (SIDE, SIDE))
    assert (extract(space, other / 127.5 - 1)[0] - made).abs().max() > 0.05


def test_of_clip_the_vision_tower_is_taken(tmp_path):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION | {"intermediate_size": 8})
    model = transformers.CLIPModel(config).eval()
    space = open_space(save(tmp_path / "clip", model, crop_size=SIDE))
    x = torch.rand(2, 1, SIDE, SIDE) * 2 - 1  # grey is repeated
    fed = (((x + 1) * 127.5).round() / 255 - space.mean) / space.std
    torch.testing.assert_close(extract(space, x)[0], model.vision_model(fed).pooler_output, atol=1e-5, rtol=0)
    assert not any("text" in name for name, _ in space.named_parameters())


def test_a_report_in_such_a_space_says_which(dino, tmp_path):
    space = open_space(dino)
    pixels, labels = stripe_pixels(60, seed=3)
    quiet = {"log": lambda line: None, "train": stripes(90, 1), "test": stripes(60, 2)}
    report = evaluate_samples(pixels, labels.numpy(), net=space, **quiet)
    entry = report["metrics"]["frechet[dino]"]
    assert 0 <= entry["value"] < 3 * entry["floor"] and [*report["metrics"]][1] == "label_accuracy[linear probe on dino]"
    protocol = make_record(report, {}, {})["protocol"]
    assert protocol["features"] == "dino" and protocol["features_sha256"] == space.fingerprint()
    kept = [reference_statistics(space, without_padding(quiet["train"]), 250, tmp_path, quiet["log"]) for _ in range(2)]
    again = evaluate_samples(pixels, labels.numpy(), net=space, reference=kept[1], **quiet)
    assert again["metrics"] == report["metrics"]  # by way of the cached reference
    with torch.no_grad():
        space.encoder.layernorm.weight.add_(1e-3)
    assert space.fingerprint() != protocol["features_sha256"]


def test_evaluate_takes_a_folder_and_compare_refuses_another_space(run, refused, here, dino, tmp_path):
    data = write_stripes(tmp_path / "data" / "train").parent
    pictures = sorted(write_stripes(data / "test", 30, seed=1).rglob("*.png"))
    np.savez(here / "s.npz", np.stack([np.asarray(Image.open(p).convert("RGB")) for p in pictures]))
    ask = ("evaluate", "--samples", "s.npz", "--data", data, "--out")
    run(*ask, "one", "--features", dino)
    assert "frechet[dino]" in read_record("one")["values"]
    run(*ask, "two", "--features", shutil.copytree(dino, tmp_path / "other"))
    assert "compare: features is" in refused("compare", "one", "two")


def test_what_is_no_space_is_one_line(tmp_path, dino):
    bert = transformers.BertModel(transformers.BertConfig(**TEXT | {"max_position_embeddings": 8}))
    with pytest.raises(UserError, match="BertModel is no encoder of RGB images"):
        open_space(save(tmp_path / "bert", bert))
    bare = dinov2()
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="bare: not a transformers vision encoder .*image processor"):
        open_space(tmp_path / "bare")
    with pytest.raises(UserError, match="no such folder; give one of a feature network"):
        open_space(tmp_path / "nothing")
    (tmp_path / "some.pth").write_bytes(b"other")
    with pytest.raises(UserError, match="its sha256 begins .{8}, that of weights-inception-2015-12-05-6726825d.pth 6726825d"):
        open_space(tmp_path / "some.pth")


def test_inception_is_torch_fidelitys_with_2048_features(tmp_path, monkeypatch):
    if find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    module = feature_spaces._fidelity()
    with monkeypatch.context() as patch:  # its own first weights instead of a download
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        made = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    path = tmp_path / "weights.pth"
    torch.save(made.state_dict(), path)
    space = open_inception(path, hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    levels = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    features = extract(space, levels.float() / 127.5 - 1)[0]
    assert features.shape == (2, 2048) and torch.equal(features, made(levels)[0]) and space.dim == 2048
    torch.save({"weights": Path("anything")}, path)  # an object, where tensors belong
    with pytest.raises(UserError, match="weights.pth: cannot be read as Inception's weights"):
        open_inception(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_the_default_follows_the_channels(tmp_path, monkeypatch):
    monkeypatch.setattr("latentdiff.utils.shipped.shipped_folder", lambda kind: tmp_path)
    assert {default_features(1), default_features(3)} == {"weights/fashion-mnist-features"}  # nothing for colour is there
    (tmp_path / "rgb-features").mkdir()
    (tmp_path / "rgb-features" / "model.safetensors").touch()
    assert [default_features(channels) for channels in (1, 3)] == ["weights/fashion-mnist-features", "weights/rgb-features"]
