"""The report: numbers that move the right way, what stands beside them, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import CLASSES, stripe_pixels, stripes

from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.evaluation.feature_training import train_features
from latentdiff.evaluation.markdown_report import report_markdown, write_report
from latentdiff.evaluation.metrics import OWN_CLASSES, evaluate_samples
from latentdiff.evaluation.records import check_comparable, make_record
from latentdiff.evaluation.reference_data import reference_sets
from latentdiff.models.feature_net import FeatureNet, load_features
from latentdiff.training.train_feature_net import train_feature_network

KEY = "frechet[stripes-net]"
WIDTHS = (8, 8, 16)


@pytest.fixture(scope="module")
def net() -> FeatureNet:
    return train_features(stripes(240), steps=45, batch=32, widths=WIDTHS, name="stripes-net")


class Codec:
    """Stands for an autoencoder that gives images back blurred over `width` columns; records the shapes it is shown."""

    def __init__(self, width: int):
        self.width, self.shapes = width, []

    def moments(self, images):
        self.shapes.append(tuple(images.shape))
        return images, torch.zeros_like(images)

    def normalise(self, z):
        return z / 2

    def decode(self, z):
        kernel = torch.ones(1, 1, 1, self.width) / self.width
        return torch.nn.functional.conv2d(z * 2, kernel, padding=(0, self.width // 2))

    def fingerprint(self):
        return f"blur-{self.width}"


def evaluate(samples, labels, net, train=None, test=None, **options):
    quiet = {"log": lambda line: None}
    return evaluate_samples(samples, labels, train or stripes(150, 1), test or stripes(90, 2), net, **quiet | options)


def test_real_images_score_like_the_floor_and_damaged_ones_worse(net):
    pixels, labels = stripe_pixels(60, seed=3)
    good = evaluate(pixels, labels.numpy(), net)["metrics"]
    entry = good[KEY]
    assert entry["value"] < 3 * entry["floor"] and entry["floor_images"] == 60
    assert good["label_accuracy[stripes-net]"]["value"] > 0.95
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    bad = evaluate(noise, labels.numpy(), net)["metrics"]
    assert bad[KEY]["value"] > 20 * entry["value"] and bad[KEY]["floor"] == entry["floor"]
    assert bad["label_accuracy[stripes-net]"]["value"] < 0.6 < bad["label_accuracy[stripes-net]"]["real"]


def test_numbers_do_not_depend_on_the_batch_size_or_on_grey_written_as_rgb(net):
    pixels, labels = stripe_pixels(60, seed=3)
    whole = evaluate(pixels, labels.numpy(), net)
    parts = evaluate(np.repeat(pixels, 3, axis=3), labels.numpy(), net, batch=7)
    assert parts["metrics"][KEY]["value"] == pytest.approx(whole["metrics"][KEY]["value"], rel=1e-4)
    assert parts["protocol"]["samples_sha256"] == whole["protocol"]["samples_sha256"]
    assert parts["reference"]["sha256"] == whole["reference"]["sha256"]


def test_the_floor_has_the_samples_mix_of_classes_and_says_when_it_is_smaller(net):
    pixels, labels = stripe_pixels(60, seed=3)
    picked = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:10]])  # 20 + 10 + 0
    report = evaluate(pixels[picked], labels.numpy()[picked], net, test=stripes(30, 2))
    assert report["metrics"][KEY]["floor_images"] == 15  # 10 of class 0 are all there are, so 5 of class 1
    assert report["protocol"]["class_counts"] == [20, 10, 0] and not report["protocol"]["class_balanced"]
    # without class 2 both stand far from the reference, and alike
    assert report["metrics"][KEY]["value"] == pytest.approx(report["metrics"][KEY]["floor"], rel=0.3)


def test_reconstructions_stand_beside_the_floor(net):
    pixels, labels = stripe_pixels(60, seed=3)
    padded = {"framing": "pad", "multiple_of": 8}
    sets = {"train": stripes(150, 1, **padded), "test": stripes(90, 2, **padded)}
    codec = Codec(1)
    perfect = evaluate(pixels, labels.numpy(), net, codec=codec, **sets)
    entry = perfect["metrics"][KEY]
    assert entry["reconstruction"] == pytest.approx(entry["floor"], rel=1e-6)
    assert perfect["reconstruction"]["psnr"] == 100 and perfect["reconstruction"]["ssim"] == pytest.approx(1)
    assert codec.shapes == [(60, 1, 24, 24)]  # the codec meets what it was trained on, the numbers only the content
    blurred = evaluate(pixels, labels.numpy(), net, codec=Codec(5), **sets)
    assert blurred["metrics"][KEY]["reconstruction"] > 5 * entry["floor"]
    assert blurred["metrics"][KEY]["value"] == entry["value"] and blurred["reconstruction"]["psnr"] < 25
    unpadded = evaluate(pixels, labels.numpy(), net)
    assert unpadded["metrics"][KEY]["value"] == entry["value"]


def test_cas_uses_as_many_real_images_of_each_class(net):
    trainings = []

    def trainer(dataset, seed):
        trainings.append((dataset.source.name, torch.bincount(dataset.labels, minlength=3).tolist()))
        return net

    pixels, labels = stripe_pixels(60, seed=3)
    report = evaluate(pixels, labels.numpy(), net, train=stripes(45, 1), train_classifier=trainer, cas_seeds=(0, 1))
    assert trainings == [("samples", [15] * 3)] * 2 + [("stripes", [15] * 3)] * 2  # 15 a class is all that train has
    entry = report["metrics"]["cas"]
    assert entry["images"] == 45 and entry["seeds"] == [0, 1] and len(entry["values"]) == 2 and entry["ratio"] == 1


@pytest.mark.parametrize("info", [{"class_names": ["x", "y", "z"]}, {}])
def test_a_linear_probe_tells_the_classes_where_the_network_does_not_know_them(net, info):
    other = FeatureNet(1, 3, WIDTHS, "other", info).eval()
    other.load_state_dict(net.state_dict() | {name: 0 * value for name, value in other.head.state_dict(prefix="head.").items()})
    pixels, labels = stripe_pixels(60, seed=3)
    lines, key = [], "label_accuracy[linear probe on other]"
    report = evaluate(pixels, labels.numpy(), other, log=lines.append, guided=({1.0: pixels}, labels.numpy()))
    assert any("other" in line and "linear probe" in line for line in lines)
    assert list(report["metrics"]) == ["frechet[other]", key]
    assert report["metrics"][key]["value"] > 0.9 < report["metrics"][key]["real"]
    assert report["metrics"][key]["real_images"] == 90  # all that are held out
    assert report["reference"]["classifier"] == "linear probe 1 on the features of 150 training images"
    assert "linear probe 1" in report_markdown(report)
    assert report["guidance_curve"]["points"][0]["label_accuracy"] == report["metrics"][key]["value"]
    shares = report["per_class"]["label_accuracy"]
    assert sum(each["value"] * each["images"] for each in shares.values()) / 60 == pytest.approx(
        report["metrics"][key]["value"]
    )
    wrong = evaluate(pixels, (labels.numpy() + 1) % 3, other)["metrics"][key]
    assert wrong["value"] < 0.1 < 0.9 < wrong["real"]


def test_records_of_a_probe_and_of_a_network_with_classes_are_not_compared(net):
    pixels, labels = stripe_pixels(30)
    own = evaluate(pixels, labels.numpy(), net)
    record = make_record(own, {}, {})
    assert record["protocol"]["classifier"] == own["reference"]["classifier"] == OWN_CLASSES
    own["reference"]["classifier"] = "linear probe 1 on the features of 150 training images"
    with pytest.raises(UserError, match="classifier is"):
        check_comparable("a", record, "b", make_record(own, {}, {}))
    own["reference"]["classifier"] = None  # as in records of earlier versions
    check_comparable("a", record, "b", make_record(own, {}, {}))


def test_without_labels_there_is_no_label_accuracy(net):
    report = evaluate(stripe_pixels(30)[0], None, net)
    assert list(report["metrics"]) == [KEY]
    assert report["reference"]["classifier"] is None


def test_written_reports_carry_the_protocol_and_never_a_plain_fid(net, tmp_path):
    pixels, labels = stripe_pixels(30)
    protocol = {"sampler": "heun", "guidance": 1.5, "seed": 7}
    report = evaluate(pixels, labels.numpy(), net, protocol=protocol, codec=Codec(3))
    json_path, table_path = write_report(report, tmp_path / "out")
    assert json.loads(json_path.read_text()) == report
    table = table_path.read_text()
    for part in (KEY, "heun", "1.5", "not stated", report["reference"]["sha256"], "PSNR", "[10, 10, 10]"):
        assert part in table
    assert "fid" not in table.lower()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["evaluation.json", "evaluation.md"]


@pytest.mark.parametrize(
    "samples, labels, message",
    [
        (np.zeros((4, 20, 18, 1), np.uint8), None, "20x18.*18x18"),
        (np.zeros((4, 18, 18, 1), np.float32), None, "uint8"),
        (np.zeros((4, 18, 18, 1), np.uint8), np.array([0, 1, 2, 3]), "0 to 3.*0 to 2"),
        (np.zeros((4, 18, 18, 1), np.uint8), np.array([0, 1]), r"labels.*\[2\].*4"),
    ],
)
def test_samples_that_do_not_go_with_the_data_are_refused(net, samples, labels, message):
    with pytest.raises(UserError, match=message):
        evaluate(samples, labels, net)


def write_folder(root, n: int, seed: int) -> None:
    pixels, labels = stripe_pixels(n, seed)
    for k in range(n):
        path = root / CLASSES[int(labels[k])] / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[k, :, :, 0]).save(path)


def test_reference_sets_are_the_test_split_or_a_share_held_out(tmp_path):
    write_folder(tmp_path / "one", 30, 0)
    train, test = reference_sets(str(tmp_path / "one"), held_out_share=0.2)
    assert (len(train), len(test)) == (24, 6) and not set(train.indices.tolist()) & set(test.indices.tolist())
    write_folder(tmp_path / "two" / "train", 12, 0)
    write_folder(tmp_path / "two" / "test", 6, 1)
    train, test = reference_sets(str(tmp_path / "two"))
    assert (len(train), len(test)) == (12, 6) and test.class_names == sorted(CLASSES)


def config(tmp_path, **model):
    return parse_config(
        {
            "stage": "features",
            "output": str(tmp_path / "run"),
            "name": "my-features",
            "model": model,
            "data": {"source": str(tmp_path / "images"), "channels": 1},
            "train": {"steps": 3, "precision": "float32", "batch_size": 8},
        }
    )


def test_a_config_becomes_a_folder_that_loads(tmp_path):
    write_folder(tmp_path / "images", 30, 0)
    folder = train_feature_network(config(tmp_path, widths=WIDTHS))
    net = load_features(folder)
    assert net.name == "my-features" and net.widths == WIDTHS and net.channels == 1
    assert 0 <= net.info["test_accuracy"] <= 1 and net.info["training"]["images"] == 28


def test_an_unknown_model_key_is_named(tmp_path):
    with pytest.raises(UserError, match="model.width:.*widths"):
        train_feature_network(config(tmp_path, width=3))
