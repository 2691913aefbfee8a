"""Tables: parquet files, folders of `datasets` and Hub names give the pixels, labels and captions of a folder."""

import io
import json
import logging.handlers
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import class_folder, one_line, write_image
from tiny_runs import autoencoder_config, write_stripes

from latentdiff.config import DataConfig
from latentdiff.data.image_source import Columns
from latentdiff.data.sources import open_source, splits
from latentdiff.errors import UserError
from latentdiff.training import train
from latentdiff.training.images import Images

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Whatever `datasets` converts lies under the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")


def plain(path: Path, **columns) -> str:
    """A parquet file of pyarrow's own, which knows of no images or classes."""
    pq.write_table(pa.table(columns), path)
    return str(path)


def png(level: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 6), (level,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def odd_images(root: Path) -> list[Path]:
    """What decoding rules are for: 16 bits, transparency, rotation, a JPEG, plain grey."""
    Image.fromarray(np.full((2, 2), 257 * 200, dtype=np.uint16)).save(root / "0.png")
    Image.new("RGBA", (2, 2), (9, 0, 0, 100)).save(root / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(root / "2.jpg", 50, size=(4, 8), exif=exif)
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "3.webp")
    return [root / "0.png", root / "1.png", root / "2.jpg", root / "3.webp", write_image(root / "4.png", 7, mode="L")]


@pytest.mark.parametrize("kind", ["features", "struct", "bytes"])
def test_parquet_gives_what_a_folder_of_the_same_files_gives(tmp_path, kind):
    (folder := tmp_path / "folder").mkdir()
    files = odd_images(folder)
    labels, texts = [3, 10, 3, 10, 4], [f"picture {i}" for i in range(5)]
    with open(folder / "metadata.jsonl", "w") as stream:
        for file, label, text in zip(files, labels, texts, strict=True):
            stream.write(json.dumps({"file_name": file.name, "label": label, "text": text}) + "\n")
    raw = [file.read_bytes() for file in files]
    images = raw if kind == "bytes" else [{"bytes": content, "path": None} for content in raw]
    if kind == "features":
        table = datasets.Dataset.from_dict({"image": images, "label": labels, "text": texts})
        table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "a.parquet")
    else:
        plain(tmp_path / "a.parquet", image=images, label=labels, text=texts)
    for channels in (None, 1):
        wanted, found = open_source(str(folder), channels=channels), open_source(str(tmp_path / "*.parquet"), channels=channels)
        assert found.channels == wanted.channels and found.sizes.tolist() == wanted.sizes.tolist()
        assert all(np.array_equal(found.read(i), wanted.read(i)) for i in range(5))
    assert found.class_names == wanted.class_names == ["3", "4", "10"]
    assert found.labels.tolist() == wanted.labels.tolist() and found.captions == wanted.captions
    assert splits(str(tmp_path / "*.parquet")) == ("train",)


def test_columns_may_be_named_and_captions_may_be_several(tmp_path):
    texts = [["a", "b"], ["c"], ["d"]]
    columns = {"image": [png(9)] * 3, "picture": [png(k) for k in (5, 6, 7)], "kind": ["x", "y", "x"], "said": texts}
    data = plain(tmp_path / "a.parquet", **columns)
    source = open_source(data, columns=Columns("picture", "kind", "said"))
    assert [int(source.read(i)[0, 0, 0]) for i in range(3)] == [5, 6, 7]
    assert source.class_names == ["x", "y"] and source.labels.tolist() == [0, 1, 0]
    assert source.captions == [("a", "b"), ("c",), ("d",)]
    bare = open_source(data)
    assert bare.labels is None and bare.captions is None and int(bare.read(0)[0, 0, 0]) == 9


def test_the_config_names_the_columns(tmp_path):
    data = plain(tmp_path / "a.parquet", picture=[png(k) for k in range(8)], kind=list("xyxyxyxy"), caption=list("abcdefgh"))
    config = DataConfig(source=data, image_column="picture", label_column="kind", held_out=0.25)
    images = Images(config, 2)
    assert images.class_names == ["x", "y"] and len(images.train) == 6 and len(images.held_out) == 2
    pixels, labels = images.train.batch([0])
    k = int(images.train.indices[0])
    assert labels.tolist() == [k % 2] and pixels.flatten()[0] == pytest.approx(k / 127.5 - 1)
    assert images.train.captions()[0] == ("abcdefgh"[k],)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (Columns(image="pic"), "image_column pic is not a column; the columns are image, label, n$"),
        (Columns(label="cls"), "label_column cls is not a column; the columns are image, label, n$"),
        (Columns(text="txt"), "text_column txt is not a column; the columns are image, label, n$"),
        (Columns(image="label"), "image_column label must hold images; the columns are image, label, n$"),
        (Columns(label="n"), "label_column n must hold classes, whole numbers or strings"),
        (Columns(text="label"), "text_column label must hold strings"),
    ],
)
def test_a_wrong_column_is_one_line_that_lists_them(tmp_path, columns, said):
    data = plain(tmp_path / "a.parquet", image=[png(), png()], label=[0, 1], n=[0.5, 1.5])
    with pytest.raises(UserError, match=said) as error:
        open_source(data, columns=columns)
    assert data in one_line(error)


def test_without_a_usual_image_column_the_columns_are_listed(tmp_path):
    with pytest.raises(UserError, match="image_column to one of left, right$"):
        open_source(plain(tmp_path / "a.parquet", left=[png()], right=[png()]))


def test_columns_of_a_folder_without_metadata_are_refused(tmp_path):
    with pytest.raises(UserError, match="has neither metadata.jsonl nor metadata.csv"):
        open_source(str(class_folder(tmp_path)), columns=Columns(label="kind"))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": [0, None, 1]}, "row 1: has no label although others do"),
        ({"text": ["a", "b", ""]}, "row 2: has no text although others do"),
        ({"text": ["a", " ", "c"]}, "row 1: text must be a caption"),
    ],
)
def test_a_gap_names_its_row(tmp_path, columns, said):
    with pytest.raises(UserError, match=said) as error:
        open_source(plain(tmp_path / "a.parquet", image=[png()] * 3, **columns))
    one_line(error)


def test_unreadable_rows_follow_the_rule_of_folders(tmp_path):
    data = plain(tmp_path / "a.parquet", image=[png(0), b"no image", png(2), None], label=[0, 1, 0, 1])
    with pytest.raises(UserError, match="2 of 4 images cannot be read, more than max_bad_share=0.01.*row 1 .*row 3 "):
        open_source(data)
    source = open_source(data, max_bad_share=0.5)
    assert len(source) == 2 and list(source.bad) == ["row 1", "row 3"] and source.labels.tolist() == [0, 0]
    assert int(source.read(1)[0, 0, 0]) == 2


def test_a_table_reads_no_file_that_was_not_fetched_with_it(tmp_path):
    outside = write_image(tmp_path / "outside.png", 5)
    inside = write_image(tmp_path / "converted" / "inside.png", 6)  # where the Hub's files are kept
    paths = [{"bytes": None, "path": str(path)} for path in (outside, inside)]
    data = plain(tmp_path / "a.parquet", image=paths)
    with pytest.raises(UserError, match="row 0 .the table has its path alone .*outside.png"):
        open_source(data, max_bad_share=0)
    source = open_source(data, max_bad_share=0.5)
    assert list(source.bad) == ["row 0"] and int(source.read(0)[0, 0, 0]) == 6


def saved_table(levels: list[int], labels: list[int]) -> "datasets.Dataset":
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat", "owl"])}
    images = [{"bytes": png(level), "path": None} for level in levels]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, datasets.Features(features))


def test_saved_splits_and_named_classes(tmp_path):
    both = datasets.DatasetDict(train=saved_table([1, 2], [1, 0]), test=saved_table([3], [1]))
    both.save_to_disk(tmp_path / "both")
    data = str(tmp_path / "both")
    assert splits(data) == ("train", "test")
    train_, test = open_source(data), open_source(data, "test")
    assert train_.class_names == test.class_names == ["dog", "cat", "owl"]  # of the feature: its order, and unused ones too
    assert train_.labels.tolist() == [1, 0] and test.labels.tolist() == [1] and int(test.read(0)[0, 0, 0]) == 3
    both["train"].save_to_disk(tmp_path / "one")
    assert splits(str(tmp_path / "one")) == ("train",)
    assert open_source(str(tmp_path / "one")).fingerprint() == train_.fingerprint() != test.fingerprint()
    with pytest.raises(UserError, match="no test split"):
        open_source(str(tmp_path / "one"), "test")


def test_a_shuffled_table_keeps_rows_together(tmp_path):
    saved_table(list(range(9)), [k % 3 for k in range(9)]).shuffle(seed=1).save_to_disk(tmp_path / "s")
    source = open_source(str(tmp_path / "s"))
    levels = [int(source.read(i)[0, 0, 0]) for i in range(9)]
    assert levels != list(range(9)) and source.labels.tolist() == [level % 3 for level in levels]


def test_splits_of_other_names(tmp_path):
    table = saved_table([1, 2], [0, 1])
    datasets.DatasetDict(all=table).save_to_disk(tmp_path / "one")
    assert len(open_source(str(tmp_path / "one"))) == 2  # the only split is the train split
    datasets.DatasetDict(first=table, second=table).save_to_disk(tmp_path / "two")
    assert splits(str(tmp_path / "two")) == ("train",)
    with pytest.raises(UserError, match="has no train split; it has first, second"):
        open_source(str(tmp_path / "two"))


def test_missing_labels_of_a_test_split_are_no_class(tmp_path):
    datasets.DatasetDict(train=saved_table([1], [2]), test=saved_table([3, 4], [-1, -1])).save_to_disk(tmp_path / "s")
    assert open_source(str(tmp_path / "s"), "test").labels is None


def test_a_folder_laid_out_as_on_the_hub_has_its_splits(tmp_path):
    (tmp_path / "d" / "data").mkdir(parents=True)
    for part, levels, labels in (("train", [1, 2], ["b", "c"]), ("test", [3], ["c"])):
        plain(tmp_path / "d" / "data" / f"{part}-00000-of-00001.parquet", image=[png(k) for k in levels], label=labels)
    data = str(tmp_path / "d")
    assert splits(data) == ("train", "test")
    test = open_source(data, "test")
    assert test.class_names == ["b", "c"] and test.labels.tolist() == [1] and int(test.read(0)[0, 0, 0]) == 3


def test_files_come_in_the_order_of_their_names_and_braces(tmp_path):
    for k in (2, 0, 1):
        plain(tmp_path / f"{k}.parquet", image=[png(k)])
    levels = {}
    for pattern in ("*.parquet", "{2,0}.parquet", "{1..2}.parquet"):
        source = open_source(str(tmp_path / pattern))
        levels[pattern] = [int(source.read(i)[0, 0, 0]) for i in range(len(source))]
    assert levels == {"*.parquet": [0, 1, 2], "{2,0}.parquet": [2, 0], "{1..2}.parquet": [1, 2]}


def test_fingerprint_follows_the_content(tmp_path):
    prints = []
    for k, (level, label, text) in enumerate([(1, 0, "a"), (1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")]):
        data = plain(tmp_path / f"{k}.parquet", image=[png(level), png(0)], label=[label, 0], text=[text, "z"])
        prints.append(open_source(data).fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 4


@pytest.mark.parametrize("how", ["missing", "damaged", "empty"])
def test_files_that_cannot_be_read_are_one_line(tmp_path, capfd, how):
    data = str(tmp_path / "a.parquet")
    if how == "damaged":
        Path(data).write_bytes(b"PAR1 and no more")
    elif how == "empty":
        datasets.Dataset.from_dict({"image": []}).save_to_disk(data := str(tmp_path / "saved"))
    capfd.readouterr()
    datasets.logging.get_logger().addHandler(handler := logging.handlers.BufferingHandler(100))
    try:
        with pytest.raises(UserError) as error:
            open_source(data)
    finally:
        datasets.logging.get_logger().removeHandler(handler)
    said = {"missing": "no such parquet file", "damaged": "cannot be read \\(", "empty": "no rows|cannot be read \\("}[how]
    assert re.search(said, one_line(error)) and data in str(error.value)
    assert capfd.readouterr().err == "" and handler.buffer == []


def test_a_hub_name_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for data in ("nobody/nothing", "nobody/nothing:config"):
        said = f"data '{data}': no such folder, and as a name of the Hub it cannot be read"
        with pytest.raises(UserError, match=said) as error:
            open_source(data)
        one_line(error)


def test_without_the_library_what_to_install_is_said(tmp_path, monkeypatch):
    data = plain(tmp_path / "a.parquet", image=[png()])
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install latentdiff\[data\]") as error:
        open_source(data)
    one_line(error)


def test_stage_1_trains_from_parquet_as_from_the_folder(tmp_path, curves):
    folder = write_stripes(tmp_path / "stripes", 16)
    files = sorted(folder.rglob("*.png"))
    plain(tmp_path / "a.parquet", image=[f.read_bytes() for f in files], label=[f.parent.name for f in files])
    losses = []
    for data in (folder, tmp_path / "a.parquet"):
        train(autoencoder_config(data, output := tmp_path / f"out-{data.name}", train__steps=2))
        losses.append(curves(output)["train/total"])
    assert losses[0] == losses[1] and len(losses[0]) == 2
