"""What a data string opens: folders in all their forms, idx files, and what happens to files that cannot be read."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource, open_source, splits
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


def write_image(path: Path, level: int = 0, size: tuple[int, int] = (6, 4), mode: str = "RGB", **options) -> Path:
    """A picture of one level, (height, width) = size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (size[1], size[0]), level if mode == "L" else (level,) * len(mode)).save(path, **options)
    return path


def class_folder(root: Path, per_class: int = 3, classes: tuple[str, ...] = ("b", "a")) -> Path:
    for k, name in enumerate(classes):
        for i in range(per_class):
            write_image(root / name / f"{i}.png", level=10 * k + i)
    return root


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_class_folders_give_sorted_classes_and_files(tmp_path):
    source = open_source(str(class_folder(tmp_path)))
    assert source.class_names == ["a", "b"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [int(source.read(i)[0, 0, 0]) for i in range(6)] == [10, 11, 12, 0, 1, 2]  # class a was written second
    assert source.read(0).shape == (6, 4, 3) and source.read(0).dtype == np.uint8 and source.sizes.tolist()[0] == [6, 4]
    assert source.captions is None and source.bad == {}


def test_numbered_classes_sort_as_numbers(tmp_path):
    assert open_source(str(class_folder(tmp_path, 1, ("10", "9")))).class_names == ["9", "10"]


def test_flat_folder_is_unlabelled(tmp_path):
    write_image(tmp_path / "x.png")
    source = open_source(str(tmp_path))
    assert source.labels is None and source.class_names == [] and len(source) == 1


def test_images_beside_class_folders_are_used_without_classes(tmp_path):
    write_image(class_folder(tmp_path) / "stray.png")
    source = open_source(str(tmp_path))
    assert len(source) == 7 and source.labels is None and source.class_names == []
    assert source.unlabelled.startswith("1 images lie beside its sub-folders (stray.png)")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_metadata_gives_labels_and_captions(tmp_path, kind):
    rows = [{"file_name": f"{i}.png", "label": "xy"[i % 2], "text": f"picture {i}"} for i in (2, 0, 1)]
    for i in range(3):
        write_image(tmp_path / f"{i}.png", level=i)
    with open(tmp_path / f"metadata.{kind}", "w", newline="") as stream:
        if kind == "jsonl":
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    source = open_source(str(tmp_path))
    assert source.class_names == ["x", "y"] and source.labels.tolist() == [0, 1, 0]
    assert source.captions == [("picture 0",), ("picture 1",), ("picture 2",)]


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"file_name": "0.png", "label": 1}\n{"file_name": "1.png"}\n', "line 2: has no label"),
        ('{"file_name": "0.png", "label": 1}\n{"label": 1}\n', "line 2: needs file_name"),
        ("{oops\n", "line 1: not JSON"),
        ("\n", "no rows"),
    ],
)
def test_bad_metadata_names_its_line(tmp_path, text, said):
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        open_source(str(tmp_path))
    assert "metadata.jsonl" in one_line(error)


def test_splits_share_the_training_classes(tmp_path):
    class_folder(tmp_path / "train", 2, ("a", "b", "c"))
    class_folder(tmp_path / "test", 1, ("c", "b"))
    assert splits(str(tmp_path)) == ("train", "test")
    test = open_source(str(tmp_path), "test")
    assert test.class_names == ["a", "b", "c"] and test.labels.tolist() == [1, 2]
    write_image(tmp_path / "test" / "d" / "0.png")
    with pytest.raises(UserError, match="'d' is not a class of train/; valid are a, b, c"):
        open_source(str(tmp_path), "test")


def test_wrong_names_are_one_line_errors(tmp_path):
    for call, said in [
        (lambda: open_source("fashion-mnits"), "fashion-mnist"),
        (lambda: open_source(str(tmp_path)), "no images"),
        (lambda: open_source(str(class_folder(tmp_path)), "test"), "no test/ folder"),
        (lambda: open_source(str(tmp_path), "validation"), "valid are train and test"),
        (lambda: open_source(str(tmp_path), channels=2), "channels=2"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            call()
        one_line(error)


def damage(folder: Path, how: str) -> Path:
    if how == "truncated jpeg":
        noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path := folder / "bad.jpg")
        path.write_bytes(path.read_bytes()[:-700])
    elif how == "truncated png":
        path = write_image(folder / "bad.png", size=(64, 64))
        path.write_bytes(path.read_bytes()[:-20])
    else:
        (path := folder / "bad.webp").write_text("not an image")
    return path


@pytest.mark.parametrize("how", ["truncated jpeg", "truncated png", "text"])
def test_unreadable_files_are_named_counted_and_skipped_up_to_a_share(tmp_path, how):
    bad = damage(class_folder(tmp_path) / "a", how)
    with pytest.raises(UserError, match="1 of 7 images cannot be read, more than max_bad_share=0 allows") as error:
        open_source(str(tmp_path), max_bad_share=0)
    assert str(bad) in one_line(error)
    source = open_source(str(tmp_path))  # one may be bad, however small the folder
    assert len(source) == 6 and list(source.bad) == [f"a/{bad.name}"] and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    shutil.copyfile(bad, tmp_path / "b" / bad.name)
    with pytest.raises(
        UserError, match="2 of 8 images cannot be read, more than max_bad_share=0.01 .*raise data.max_bad_share"
    ):
        open_source(str(tmp_path))
    assert len(open_source(str(tmp_path), max_bad_share=0.25)) == 6


def test_file_missing_from_metadata_counts_as_unreadable(tmp_path):
    write_image(tmp_path / "0.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png"}\n{"file_name": "1.png"}\n')
    assert open_source(str(tmp_path), max_bad_share=0.5).bad == {"1.png": "no such file"}


def test_file_that_goes_bad_later_is_replaced_by_the_next_with_its_label(tmp_path):
    source = open_source(str(class_folder(tmp_path)), max_bad_share=0.2)
    dataset = ImageDataset(source, Preprocess())
    (tmp_path / "a" / "2.png").write_bytes(b"gone")
    images, labels = dataset.batch([2, 3])
    assert torch.equal(images[0], images[1]) and labels.tolist() == [1, 1] and list(source.bad) == ["a/2.png"]
    (tmp_path / "b" / "0.png").write_bytes(b"gone")
    with pytest.raises(UserError, match="2 of 6 images"):
        dataset.batch([3])


def test_channels_follow_the_data_or_the_caller(tmp_path):
    write_image(tmp_path / "0.png", 7, mode="L")
    assert open_source(str(tmp_path)).read(0).shape == (6, 4, 1)
    assert open_source(str(tmp_path), channels=3).read(0).tolist()[0][0] == [7, 7, 7]
    write_image(tmp_path / "1.png", 7)
    assert open_source(str(tmp_path)).channels == 3


def test_sixteen_bit_is_scaled_transparency_is_white_and_rotation_applied(tmp_path):
    Image.fromarray(np.full((2, 2), 257 * 200, dtype=np.uint16)).save(tmp_path / "0.png")
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    write_image(tmp_path / "2.jpg", 50, size=(4, 8), exif=exif)
    source = open_source(str(tmp_path), channels=1)
    assert (source.read(0) == 200).all() and (source.read(1) == 255).all()
    assert source.read(2).shape == (8, 4, 1) and source.sizes[2].tolist() == [8, 4]


def test_fingerprint_follows_the_content_and_nothing_else(tmp_path):
    original = class_folder(tmp_path / "original")
    shutil.copytree(original, copy := tmp_path / "copy", copy_function=shutil.copyfile)  # new times, another place
    before = open_source(str(original)).fingerprint()
    assert open_source(str(copy)).fingerprint() == before
    write_image(copy / "a" / "0.png", level=99)
    edited = open_source(str(copy)).fingerprint()
    (copy / "a" / "0.png").rename(copy / "b" / "9.png")
    moved = open_source(str(copy)).fingerprint()
    assert len({before, edited, moved, open_source(str(original), channels=1).fingerprint()}) == 4


def test_fingerprint_follows_labels_and_captions(tmp_path):
    write_image(tmp_path / "0.png")
    write_image(tmp_path / "1.png")
    prints = set()
    for labels, texts in (("ab", "xy"), ("ba", "xy"), ("ab", "xz")):
        rows = [{"file_name": f"{i}.png", "label": labels[i], "text": texts[i]} for i in range(2)]
        (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prints.add(open_source(str(tmp_path)).fingerprint())
    assert len(prints) == 3


def write_idx(path: Path, values: np.ndarray) -> None:
    raw = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_fashion_mnist_reads_idx_files(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(tmp_path))
    images = np.random.default_rng(0).integers(0, 255, (3, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", images)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.array([9, 0, 5], dtype=np.uint8))
    source = open_source("fashion-mnist", "test")
    assert np.array_equal(source.read(1)[..., 0], images[1]) and source.labels.tolist() == [9, 0, 5]
    assert [source.class_names[k] for k in (0, 7, 9)] == ["T-shirt", "Sneaker", "Ankle boot"]
    assert open_source("fashion-mnist", "test", channels=3).read(0).shape == (28, 28, 3)
    with pytest.raises(UserError, match="dataset-fashion-mnist.*FASHION_MNIST_DIR"):
        open_source("fashion-mnist", "train")
    whole = (tmp_path / f"t10k-images-idx3-ubyte{suffix}").read_bytes()
    (tmp_path / f"t10k-images-idx3-ubyte{suffix}").write_bytes(whole[:-9])
    with pytest.raises(UserError, match="not a whole idx file") as error:
        open_source("fashion-mnist", "test")
    one_line(error)


def test_array_fingerprint_follows_pixels_and_labels():
    images = np.zeros((4, 2, 2, 1), np.uint8)
    prints = {ArraySource("x", images, labels).fingerprint() for labels in (None, torch.tensor([0, 0, 0, 1]))}
    other = images.copy()
    other[3, 1, 1, 0] = 1
    assert len(prints | {ArraySource("x", other, None).fingerprint()}) == 3


def of_classes(*sizes: int) -> ArraySource:
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return ArraySource("x", np.zeros((sum(sizes), 2, 2, 1), np.uint8), labels, [str(k) for k in range(len(sizes))])


def test_each_class_gives_its_share_and_never_its_only_image():
    source = of_classes(200, 100, 40, 1, 1, 2, 3)
    train, apart = held_out(source, 0.1, seed=0)
    assert sorted(torch.cat([train, apart]).tolist()) == list(range(347))
    assert torch.bincount(source.labels[train], minlength=7).min() >= 1
    counts = torch.bincount(source.labels[apart], minlength=7).tolist()
    assert counts[:3] == [20, 10, 4] and counts[3:5] == [0, 0] and sum(counts) == 35  # the rest by the largest remainder
    assert counts[6] == 1 and counts[5] == 0
    assert not torch.equal(held_out(source, 0.1, seed=1)[1], apart) and torch.equal(held_out(source, 0.1, 0)[1], apart)


def test_many_small_classes_keep_one_image_each_and_alone_give_none():
    pairs = of_classes(*[2] * 40)
    train, apart = held_out(pairs, 0.05, seed=0)
    assert len(apart) == 4 and len(set(pairs.labels[apart].tolist())) == 4 and len(set(pairs.labels[train].tolist())) == 40
    assert len(held_out(pairs, 0.9, seed=0)[1]) == 40  # one of each, however large the share
    train, apart = held_out(of_classes(*[1] * 40), 0.05, seed=0)
    assert len(apart) == 0 and train.tolist() == list(range(40))


def test_the_rule_of_earlier_versions_draws_the_images_it_drew():
    labelled, plain = of_classes(30, 20), ArraySource("x", np.zeros((50, 2, 2, 1), np.uint8), None)
    before = [4, 12, 27, 45, 46]
    for source, rule in ((labelled, "random"), (plain, "random"), (plain, "per_class")):
        assert held_out(source, 0.1, 0, rule)[1].tolist() == before
    with pytest.raises(UserError, match="held_out_rule 'x': valid are per_class, random"):
        held_out(plain, 0.1, 0, "x")


def test_held_out_is_a_fixed_disjoint_share():
    source = ArraySource("x", np.zeros((50, 2, 2, 1), np.uint8), None)
    train, kept = held_out(source, 0.1, seed=3)
    assert len(kept) == 5 and sorted(torch.cat([train, kept]).tolist()) == list(range(50))
    assert torch.equal(held_out(source, 0.1, seed=3)[1], kept) and not torch.equal(held_out(source, 0.1, 4)[1], kept)
    assert len(held_out(source, 1e-6, 0)[1]) == 1
    with pytest.raises(UserError, match="share"):
        held_out(source, 1.0, 0)
