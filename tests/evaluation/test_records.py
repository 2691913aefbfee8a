"""The report's further measures, the record with its page, records side by side, and what is kept of the reference."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stripes import CLASSES, stripe_pixels, stripes
from tiny_runs import write_stripes

from latentdiff.errors import UserError
from latentdiff.evaluation import feature_cache, sample_sets
from latentdiff.evaluation.html_report import page, write_page
from latentdiff.evaluation.markdown_report import report_markdown
from latentdiff.evaluation.metrics import evaluate_samples
from latentdiff.evaluation.records import EVALUATE_PROTOCOL, compare_records, make_record, read_record, write_record
from latentdiff.models.feature_net import FeatureNet, load_features
from latentdiff.utils import processes

NET = "[stripes-net]"
MEASURES = ["kid", "precision", "recall", "density", "coverage", "frechet_of_infinite", "penalised_frechet"]


@pytest.fixture(scope="module")
def net(feature_folder) -> FeatureNet:
    return load_features(feature_folder)


def evaluate(pixels, labels, net, **options):
    quiet = {"log": lambda line: None, "train": stripes(240, 1), "test": stripes(150, 2)}
    return evaluate_samples(pixels, None if labels is None else labels.numpy(), net=net, **quiet | options)


@pytest.fixture(scope="module")
def report(net) -> dict:
    return evaluate(*stripe_pixels(120, seed=3), net, protocol={"model": "a <model>", "seed": 0})


@pytest.fixture
def record(report) -> dict:
    return copy.deepcopy(make_record(report, {"weights": "EMA, decay 0.9"}, {"measuring": 1.234}))


# what the report says besides


def test_every_measure_has_its_number_of_images_and_its_floor(report):
    entries = report["distribution"]
    assert list(entries) == [name + NET for name in MEASURES] and report["left_out"] == {}
    assert all(entry["images"] == entry["floor_images"] == 120 for entry in entries.values())
    assert entries["kid" + NET].keys() >= {"spread", "floor_spread", "subset_size"}
    assert entries["frechet_of_infinite" + NET].keys() >= {"stderr", "floor_stderr", "sizes"}
    for name in ("precision", "recall", "coverage"):  # the samples are real images
        assert entries[name + NET]["value"] == pytest.approx(entries[name + NET]["floor"], abs=0.2)
    text = report_markdown(report)
    assert all(name + NET in text for name in MEASURES) and "±" in text and "closer than held-out" in text


def test_damage_collapse_and_copies_show_where_they_should(net, report):
    real = {name: entry["value"] for name, entry in report["distribution"].items()}
    pixels, labels = stripe_pixels(120, seed=3)
    collapsed = evaluate(pixels[np.arange(120) % 3], labels, net)["distribution"]  # one image a class, again and again
    assert collapsed["recall" + NET]["value"] < 0.2 < real["recall" + NET]
    assert collapsed["kid" + NET]["value"] > real["kid" + NET] + report["distribution"]["kid" + NET]["spread"]
    copied = evaluate(stripes(240, 1).source.images[:120], labels, net)
    assert copied["distribution"]["precision" + NET]["value"] >= real["precision" + NET]
    penalised, others = (each["distribution"]["penalised_frechet" + NET] for each in (copied, report))
    assert penalised["value"] > 50 * copied["metrics"]["frechet" + NET]["value"]
    assert others["value"] < 2 * report["metrics"]["frechet" + NET]["value"] and "2106.03062" in penalised["formula"]
    for space in ("features", "pixels"):
        assert [each["share"] for each in copied["memorisation"][space]["closer_than_held_out"]] == [1, 1, 1]
        assert report["memorisation"][space]["closer_than_held_out"][0]["share"] < 0.1
    assert copied["memorisation"]["closest"][0].items() >= {"sample": 0, "feature_neighbour": 0, "pixel_neighbour": 0}.items()


def test_values_do_not_depend_on_the_batch_size(net, report):
    again = evaluate(*stripe_pixels(120, seed=3), net, batch=7)
    for name, entry in report["distribution"].items():
        assert again["distribution"][name]["value"] == pytest.approx(entry["value"], rel=1e-3, abs=1e-5), name
    assert [e["sample"] for e in again["memorisation"]["closest"]] == [e["sample"] for e in report["memorisation"]["closest"]]


def test_classes_are_measured_alone_where_they_are_many_enough(net, report):
    table = report["per_class"]
    assert table["fewest_images"] == 32 and table["left_out"] == {}
    assert table["label_accuracy"].keys() == table["classes"].keys()
    mean = sum(each["value"] for each in table["label_accuracy"].values()) / 3  # as many of each
    assert mean == pytest.approx(report["metrics"]["label_accuracy" + NET]["value"], abs=1e-12)
    entry = report["per_class"]["classes"]["down"]
    assert entry["images"] == entry["floor_images"] == 40 and 0 < entry["value"] < 5 * entry["floor"]
    pixels, labels = stripe_pixels(120, seed=3)
    pixels[labels == 1] = pixels[labels == 0]  # one class is drawn as another
    few = np.concatenate([np.flatnonzero(labels < 2), np.flatnonzero(labels == 2)[:31]])
    wrong = evaluate(pixels[few], labels[few], net)["per_class"]
    assert wrong["left_out"] == {"blank": 31} and wrong["classes"].keys() == {"across", "down"}
    accuracies = wrong["label_accuracy"]
    assert accuracies["blank"]["images"] == 31 and accuracies["down"]["value"] < 0.2 < 0.8 < accuracies["across"]["value"]
    assert accuracies["down"]["floor"] > 0.8 and accuracies["down"]["floor_images"] > 0
    assert wrong["classes"]["down"]["value"] > 10 * entry["value"] > wrong["classes"]["across"]["value"]
    assert "per_class" not in evaluate(pixels, None, net)


def test_too_few_images_are_said_and_not_measured(net):
    result = evaluate(*stripe_pixels(5, seed=3), net)
    assert result["left_out"].keys() == {"precision", "recall", "density", "coverage", "frechet_of_infinite"}
    assert "needs more than 5" in result["left_out"]["recall"] and "Left out: recall" in report_markdown(result)
    assert result["distribution"].keys() == {"kid" + NET, "penalised_frechet" + NET}


def test_several_seeds_are_a_mean_and_a_spread(net, report):
    pixels, labels = stripe_pixels(120, seed=3)
    others = [stripe_pixels(120, seed=s)[0] for s in (30, 33)]
    joint = evaluate(pixels, labels, net, more=others)
    alone = [report, *(evaluate(each, labels, net) for each in others)]
    for section, name in (("metrics", "frechet" + NET), ("distribution", "recall" + NET), ("distribution", "kid" + NET)):
        entry, values = joint[section][name], [each[section][name]["value"] for each in alone]
        assert entry["by_seed"] == pytest.approx(values, rel=1e-9) and len(set(values)) > 1
        assert entry["value"] == pytest.approx(np.mean(values))
        assert entry["seed_spread"] == pytest.approx(np.std(values, ddof=1))
    assert joint["protocol"]["seeds"] == 3 and report["protocol"]["seeds"] == 1
    with pytest.raises(UserError, match=r"equally large, got \[120, 60\]"):
        evaluate(pixels, None, net, more=[pixels[:60]])


# the record and its page


def test_a_record_holds_every_value_with_its_protocol(record, report, tmp_path):
    path = write_record(record, tmp_path / "out")
    assert read_record(path) == read_record(path.parent) == json.loads(path.read_text()) == record
    assert list(record["protocol"]) == list(EVALUATE_PROTOCOL) and None not in record["protocol"].values()
    assert record["protocol"]["preparation"] == {"size": [18, 18], "channels": 1, "fit": "as they are", "resample": None}
    assert record["made"]["model"] == "a <model>" and record["made"]["versions"].keys() >= {"torch", "diffusers", "latentdiff"}
    assert record["values"]["recall" + NET] == report["distribution"]["recall" + NET]
    share = record["values"]["closer_to_training_than_1%_of_held_out[pixels]"]
    assert share["images"] == 120 and {"value", "floor"} <= share.keys()
    assert record["seconds"] == {"measuring": 1.2} and [p.name for p in path.parent.iterdir()] == ["metrics.json"]


class Page(HTMLParser):
    """What a page is made of; fails on a tag that is closed out of turn."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_shows_everything(record, tmp_path):
    pixels, labels = stripe_pixels(120, seed=3)
    write_page(record, tmp_path, pixels, labels.numpy(), stripes(240, 1, framing="pad", multiple_of=8))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["closest.png", "index.html", "samples.png"]
    text = (tmp_path / "index.html").read_text()
    parsed = Page(text)
    assert sorted(parsed.sources) == ["closest.png", "data:,", "samples.png"]
    assert "script" not in parsed.tags and "http" not in text
    assert parsed.tags.count("svg") == 3 and parsed.tags.count("rect") == 12 and parsed.tags.count("circle") == 2
    for part in ("a <model>", "recall" + NET, record["protocol"]["features_sha256"], "EMA, decay 0.9", *CLASSES):
        assert part in parsed.text
    with Image.open(tmp_path / "closest.png") as picture:
        assert picture.height == 8 * (18 * 2 + 2) and picture.width > 3 * (18 * 2 + 2)
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.height == 3 * (18 * 2 + 2)


def test_the_picture_of_the_worst_shows_the_neighbours_that_are_named(record, tmp_path):
    train = stripes(240, 1)
    pixels, labels = stripe_pixels(120, seed=3)
    record["memorisation"]["closest"] = [
        {"sample": 5, "feature_distance": 0.1, "feature_neighbour": 17, "pixel_distance": 0.2, "pixel_neighbour": 99}
    ]
    write_page(record, tmp_path, pixels, labels.numpy(), train)
    shown = np.asarray(Image.open(tmp_path / "closest.png"))[..., 0][:36:2]
    cells = [shown[:, shown.shape[1] - 38 * (3 - k) :][:, :36:2] for k in range(3)]
    expected = (pixels[5], train.source.images[17], train.source.images[99])
    assert all(np.array_equal(cell, image[..., 0]) for cell, image in zip(cells, expected, strict=True))


def test_the_plots_hold_the_values(record):
    record["values"]["recall" + NET] |= {"value": 0.5, "floor": 1.0, "by_seed": [0.25, 0.75]}
    record["values"]["precision" + NET] |= {"value": 0.5, "floor": 0.0, "by_seed": [1.0, 0.0]}
    record["per_class"]["classes"] = {"a & b": {"value": 4.0, "floor": 1.0}, "c": {"value": 2.0, "floor": None}}
    del record["per_class"]["label_accuracy"]
    text = page(record)
    places = [tuple(map(float, each)) for each in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)]
    assert places == [(45 + 75, 10), (45 + 225, 310), (345, 310)]
    long = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', text)]
    assert long == [400, 100, 200] and "a &amp; b" in text
    record["per_class"]["label_accuracy"] = {"b": {"value": 0.5, "floor": 1.0}}
    assert 'width="200.0"' in page(record) and "Label accuracy of each class" in page(record)
    record["per_class"] = None
    del record["values"]["recall" + NET]
    assert "<svg" not in page(record)


def test_hostile_names_stay_text_and_the_bytes_are_the_same_every_time(record):
    evil = "</text><script>alert('1')</script>\"&{{ 7 * 7 }}"
    record["per_class"]["classes"] = {evil: {"value": 1.0, "floor": None}}
    record["per_class"]["left_out"] = {evil: 3}
    record["made"] |= {"model": evil, evil: evil}
    record["left_out"] = {evil: evil}
    text = page(record)
    parsed = Page(text)
    assert "script" not in parsed.tags and parsed.text.count(evil) >= 5 and evil[:20] in parsed.text
    assert page(copy.deepcopy(record)) == text


# side by side


def two(tmp_path, record, change) -> tuple[Path, Path]:
    other = copy.deepcopy(record)
    change(other)
    return write_record(record, tmp_path / "a").parent, write_record(other, tmp_path / "b").parent


def test_records_of_one_protocol_stand_side_by_side(run, record, tmp_path):
    def change(other):
        other["made"] |= {"sampler": "heun", "model": "b", "steps": 9, "versions": {"torch": "9"}, "precision": "bfloat16"}
        other["values"]["recall" + NET]["value"] = 0.12345
        other["values"]["cas"] = {"value": 0.5, "floor": 0.6}
        other["protocol"]["cas_seeds"] = 2  # of what the other record has not measured
        other["seconds"] = {"measuring": 7.5}

    a, b = two(tmp_path, record, change)
    text = run("compare", a, b / "metrics.json")
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.count("|") == 5]
    rows = {name: cells for name, *cells in table}
    recall = record["values"]["recall" + NET]
    assert rows["recall" + NET] == [f"{recall['value']:.4f}", "0.1235", f"{recall['floor']:.4f}"]
    assert rows["sampler"] == ["not stated", "heun", "–"] and rows["cas"] == ["–", "0.5000", "0.6000"]
    assert rows["precision"] == ["not stated", "bfloat16", "–"] and rows["seconds"][1] == "measuring 7.5"
    assert "One protocol: images 120;" in text


@pytest.mark.parametrize("field", EVALUATE_PROTOCOL)
def test_another_protocol_is_refused_and_the_field_named(refused, record, tmp_path, field):
    def change(other):
        value = other["protocol"][field]
        other["protocol"][field] = {**value, next(iter(value)): 77} if isinstance(value, dict) else [value, 1]

    record["protocol"] |= {"cas_seeds": 1, "likelihood": {"images": 20}, "prompts": {"sha256": "a"}}
    a, b = two(tmp_path, record, change)
    message = refused("compare", a, b)
    assert f"compare: {field}" in message and f"in {a}" in message and f"in {b}" in message and "unlike protocols" in message
    assert f"compare: {field}" in refused("compare", a, a, b)


def test_a_part_of_a_field_is_named_with_its_values(record, tmp_path):
    a, b = two(tmp_path, record, lambda other: other["protocol"]["settings"].update(neighbours=3))
    with pytest.raises(UserError, match="compare: settings.neighbours is 5 in .*a and 3 in .*b:"):
        compare_records([a, b])
    a, b = two(tmp_path, record, lambda other: other["protocol"].update(images=999))
    with pytest.raises(UserError, match="compare: images is 120 in .*a and 999 in .*b:"):
        compare_records([a, b])


def test_what_is_no_record_is_refused(refused, record, model, tmp_path):
    a, b = two(tmp_path, record, lambda other: other["protocol"].pop("seeds"))
    assert "protocol.seeds is missing" in refused("compare", a, b)
    for change, message in (
        (lambda other: other.update(format=2), "not a record of format 1"),
        (lambda other: other.update(values=[]), "values is missing"),
        (lambda other: other["values"]["recall" + NET].update(value=float("nan")), "values.recall.* finite"),
        (lambda other: other["values"]["recall" + NET].update(floor="x"), "values.recall.* finite"),
    ):
        a, b = two(tmp_path, record, change)
        assert re.search(message, refused("compare", a, b))
    (b / "metrics.json").write_text("{")
    assert f"{b / 'metrics.json'}: not JSON" in refused("compare", a, b)
    assert "nowhere.json: No such file" in refused("compare", a, "nowhere.json")
    assert f"{model} holds no metrics.json" in refused("compare", a, model)
    assert "is one record; give two or more" in refused("compare", a)
    assert "is one argument too many" in refused("compare", model, model, "--data", "x", "--samplers", "euler")
    assert "needs --data and --samplers" in refused("compare", model)


# samples and what is kept


def write_images(root: Path, pixels: np.ndarray, labels: torch.Tensor | None) -> Path:
    for k, image in enumerate(pixels):
        path = root / (CLASSES[int(labels[k])] if labels is not None else ".") / f"{k:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(path)
    return root


def test_a_folder_of_images_is_what_an_npz_of_them_is(tmp_path):
    pixels, labels = stripe_pixels(12, 3)
    names = sorted(CLASSES, reverse=True)  # numbered otherwise than the folders' names sort
    images, read = sample_sets.read_folder(write_images(tmp_path / "classes", pixels, labels), names)
    order = np.argsort([f"{CLASSES[int(c)]}/{k:03}" for k, c in enumerate(labels)])
    assert np.array_equal(images, pixels[order]) and [names[c] for c in read] == [CLASSES[int(labels[k])] for k in order]
    images, read = sample_sets.read_folder(write_images(tmp_path / "flat", pixels, None), names)
    assert np.array_equal(images, pixels) and read is None


def test_folders_that_are_no_samples_are_refused(tmp_path):
    pixels, labels = stripe_pixels(6, 3)
    folder = write_images(tmp_path / "s", pixels, labels)
    with pytest.raises(UserError, match="--samples .*s: sub-folder 'down' is no class of the data; valid are across, blank$"):
        sample_sets.read_folder(folder, ["across", "blank"])
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(folder / "down" / "small.png")
    with pytest.raises(UserError, match="--samples .*s: images of 2 sizes"):
        sample_sets.read_folder(folder, CLASSES)
    (folder / "down" / "small.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match="--samples .*s: .*small.png"):
        sample_sets.read_folder(folder, CLASSES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="--samples .*empty"):
        sample_sets.read_folder(tmp_path / "empty", CLASSES)


def test_the_reference_is_looked_at_once(net, tmp_path, monkeypatch):
    calls, original = [], feature_cache.feature_statistics
    monkeypatch.setattr(
        feature_cache, "feature_statistics", lambda *args, **options: calls.append(1) or original(*args, **options)
    )

    def statistics_of(net=net, **data):
        return feature_cache.reference_statistics(
            net, stripes(60, **{"seed": 1, **data}), 25, tmp_path / "kept", lambda line: None
        )

    first, again = statistics_of(), statistics_of()
    assert len(calls) == 1 and again.sha256 == first.sha256 and torch.equal(again.features, first.features)
    assert torch.equal(again.moments.covariance, first.moments.covariance) and again.moments.count == 60
    statistics_of(seed=2), statistics_of(net=FeatureNet(1, 3, (8, 8, 16)).eval()), statistics_of(channels=3)
    assert len(calls) == 4 and len(list((tmp_path / "kept").iterdir())) == 4
    assert all(re.fullmatch(r"reference-[0-9a-f]{24}\.safetensors", path.name) for path in (tmp_path / "kept").iterdir())


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_that_share_the_reference_see_what_one_sees(net, tmp_path, monkeypatch, world):
    images, sent = stripes(60, 1), {}
    alone = feature_cache.reference_statistics(net, images, 25, None, print)

    def gather(mine, total, batch):  # the others have sent theirs when the first one gathers
        sent.setdefault(place[0], []).append(mine)
        if place[0]:
            return None
        column = len(sent[0]) - 1
        return np.concatenate([sent[k][column] for k in range(world)])

    place = [0]
    monkeypatch.setattr(processes, "count", lambda: world)
    monkeypatch.setattr(processes, "rank", lambda: place[0])
    monkeypatch.setattr(processes, "agree", lambda value: value)
    monkeypatch.setattr(processes, "gather", gather)
    for place[0] in reversed(range(world)):
        result = feature_cache.reference_statistics(net, images, 25, tmp_path if place[0] == 0 else None, print, shared=True)
        assert (result is None) == (place[0] > 0)
    assert sum(len(each[0]) for each in sent.values()) == 60 and len(sent[0][0]) == 25 * (2 if world == 2 else 1)
    assert result.sha256 == alone.sha256 and torch.equal(result.features, alone.features)
    assert torch.equal(result.moments.covariance, alone.moments.covariance) and result.moments.count == 60
    assert (
        feature_cache.reference_statistics(net, images, 25, tmp_path, print, shared=True).sha256 == alone.sha256
    )  # as it was kept


@pytest.mark.parametrize("damage", ["truncated", "flipped", "renamed", "nonsense"])
def test_a_damaged_reference_is_made_again(net, tmp_path, damage):
    def statistics_of(seed):
        return feature_cache.reference_statistics(net, stripes(60, seed), 25, tmp_path, lines.append)

    lines: list[str] = []
    first = statistics_of(1)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    if damage == "renamed":  # the features of other images under this name
        statistics_of(2)
        next(p for p in tmp_path.iterdir() if p != path).replace(path)
    else:
        cut = {"truncated": whole[:-9], "flipped": whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], "nonsense": b"{}"}
        path.write_bytes(cut[damage])
    again = statistics_of(1)
    assert (
        any("damaged" in line for line in lines)
        and torch.equal(again.features, first.features)
        and again.sha256 == first.sha256
    )
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]


def test_evaluate_writes_a_record_that_compares(run, refused, here, model, feature_folder, tmp_path):
    data = write_stripes(tmp_path / "data" / "train").parent
    write_stripes(data / "test", 30, seed=1)
    ask = ("--data", data, "--features", feature_folder, "--cas-seeds", 0)
    run("generate", "--all-classes", "--model", model, "--num-images", 4, "--steps", 2, "--seed", 7, "--out", "s.npz")
    more = ("--num-images", 12, "--steps", 2, "--seed", 7, "--out", "one", "--reference-cache", "kept")
    report = json.loads(run("evaluate", model, *ask, *more))
    record = read_record("one")
    names = ["closest.png", "evaluation.json", "evaluation.md", "index.html", "metrics.json", "samples.png"]
    assert sorted(p.name for p in Path("one").iterdir()) == names and len(list(Path("kept").iterdir())) == 1
    assert record["values"]["kid" + NET] == report["distribution"]["kid" + NET]
    assert record["made"].items() >= {"weights": "EMA, decay 0.9", "device": "cpu", "precision": "float32", "steps": 2}.items()
    assert record["seconds"].keys() == {"loading_and_generating", "measuring"}
    assert "guidance_interval" in record["made"] and "psnr" in record["reconstruction"]
    run("evaluate", model, *ask, *more[:6], "--seed", 8, "--out", "two")
    assert "frechet" + NET in run("compare", "one", "two") and len(list(Path("reference-cache").iterdir())) == 1
    run("evaluate", model, *ask, *more[:4], "--seeds", 2, "--out", "three")
    assert len(read_record("three")["values"]["frechet" + NET]["by_seed"]) == 2
    assert "compare: seeds is 1 in one and 2 in three" in refused("compare", "one", "three")
    run("evaluate", "--samples", "s.npz", *ask, "--out", "file")  # the images of the model, from a file
    assert read_record("file")["made"]["samples_sha256"] == record["made"]["samples_sha256"]
    assert read_record("file")["protocol"] == record["protocol"] and "samples of s.npz" in run("compare", "one", "file")
    assert "--seeds 2: --samples are of one seed" in refused("evaluate", "--samples", "s.npz", *ask, "--seeds", 2)
    assert "--reference-cache s.npz: is a file" in refused("evaluate", model, *ask, "--reference-cache", "s.npz")
    with np.load("s.npz") as file:
        images = [Image.fromarray(image) for image in file["arr_0"]]
    for k, (image, label) in enumerate(zip(images, np.repeat(sorted(CLASSES), 4), strict=True)):
        (here / "pictures" / label).mkdir(parents=True, exist_ok=True)
        image.save(here / "pictures" / label / f"{k:02}.png")
    run("evaluate", "--samples", "pictures", *ask, "--out", "folder")
    assert read_record("folder")["made"]["samples_sha256"] == record["made"]["samples_sha256"]
    assert read_record("folder")["values"]["frechet" + NET] == read_record("file")["values"]["frechet" + NET]
