"""Parquet read where it lies: what the downloaded table gives, an epoch for about its bytes, and a run that goes on."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import autoencoder_config, diffusion_config, write_stripes

from latentdiff.checkpoints import load
from latentdiff.data import parquet_stream
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.shuffling import WINDOW, Batches, stream
from latentdiff.data.sources import open_source, splits
from latentdiff.data.splits import held_out
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.evaluation.reference_data import data_rule, reference_sets
from latentdiff.models.codec import LatentCodec
from latentdiff.training import state, train

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
datasets = pytest.importorskip("datasets")

EACH, GROUP = 24, 4  # rows of a file and of a row group


@pytest.fixture(autouse=True)
def own_caches(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("converted"))


def noise(row: int, side: int = 24) -> bytes:
    """A PNG that does not compress, whose first pixel is its row's number."""
    pixels = np.random.default_rng(row).integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[0, 0] = row
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_files(root, files: int = 2, prefix: str = "part", typed: bool = True, side: int = 24):
    """Row k is image k of class k % 3, with one caption or two; files of six row groups."""
    root.mkdir(exist_ok=True)
    for number in range(files):
        rows = range(EACH * number, EACH * (number + 1))
        table = pa.table(
            {
                "image": [{"bytes": noise(k, side), "path": None} for k in rows],
                "label": [k % 3 for k in rows],
                "text": [[f"number {k}"] if k % 2 else [f"number {k}", "even"] for k in rows],
            }
        )
        if typed:
            features = datasets.Features(
                {
                    "image": datasets.Image(),
                    "label": datasets.ClassLabel(names=["a", "b", "c"]),
                    "text": datasets.Sequence(datasets.Value("string")),
                }
            )
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features.to_dict()}})})
        pq.write_table(table, root / f"{prefix}-{number}.parquet", row_group_size=GROUP)
    return str(root / f"{prefix}-*.parquet")


def first(images: torch.Tensor) -> list[int]:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


@pytest.mark.parametrize("typed", [True, False])
def test_a_streamed_table_is_the_downloaded_one(tmp_path, typed):
    data = write_files(tmp_path / "data", typed=typed)
    there, here = open_source(data, streaming=True), open_source(data)
    assert len(there) == len(here) == 2 * EACH and there.class_names == here.class_names
    assert torch.equal(there.labels, here.labels) and there.captions == here.captions
    for i in (0, 3, 4, EACH - 1, EACH, 2 * EACH - 1, 1):
        assert np.array_equal(there.read(i), here.read(i)) and int(there.read(i)[0, 0, 0]) == i
    assert there.fingerprint() == here.fingerprint()  # so a latent cache serves both
    assert there.blocks == (GROUP,) * (2 * EACH // GROUP) and here.blocks is None


def test_splits_are_told_by_the_names_of_files(tmp_path):
    write_files(tmp_path / "data", prefix="train")
    write_files(tmp_path / "data", 1, prefix="test")
    data = str(tmp_path / "data")
    assert splits(data, streaming=True) == ("train", "test")
    assert len(open_source(data, streaming=True)) == 2 * EACH and len(open_source(data, "test", streaming=True)) == EACH
    one = write_files(tmp_path / "one")
    assert splits(one, streaming=True) == ("train",)
    with pytest.raises(UserError, match="no test split"):
        open_source(one, "test", streaming=True)


def test_a_hub_name_is_its_parquet_files(tmp_path, monkeypatch):
    write_files(tmp_path / "data")
    asked, find = [], parquet_stream.find_files

    def listing(name, data):
        asked.append(name)
        return find(str(tmp_path / "data" / "*.parquet"), data)

    monkeypatch.setattr(parquet_stream, "find_files", listing)
    assert len(open_source("owner/name", streaming=True)) == 2 * EACH
    assert set(asked) == {"hf://datasets/owner/name/**/*.parquet"}


@pytest.mark.parametrize("blocks", [(4,) * 12, (1, 7, 0, 5, 30, 2, 2, 1)])
def test_an_epoch_holds_each_sample_once_and_keeps_to_a_window(blocks):
    n, epochs = sum(blocks), []
    for epoch in range(3):
        order = stream(n, 5, epoch * n, n, blocks)
        assert sorted(order.tolist()) == list(range(n))
        block = torch.repeat_interleave(torch.arange(len(blocks)), torch.tensor(blocks))[order].tolist()
        spans = [(block.index(b), len(block) - block[::-1].index(b)) for b in sorted(set(block))]
        open_at_once = max(sum(a <= place < b for a, b in spans) for place in range(n))
        assert open_at_once <= WINDOW
        epochs.append(order.tolist())
    assert epochs[0] != epochs[1] != epochs[2]
    whole = stream(n, 5, 0, 3 * n, blocks).tolist()
    assert whole == sum(epochs, []) and stream(n, 5, n - 3, 10, blocks).tolist() == whole[n - 3 : n + 7]
    changed = sum(a // 4 != b // 4 for a, b in zip(epochs[0], epochs[0][1:], strict=False))
    assert changed > n / 4  # within a window the blocks are mixed


@pytest.mark.parametrize("world", [1, 3])
def test_processes_share_an_epoch_and_resume_at_the_right_sample(tmp_path, world):
    source = open_source(write_files(tmp_path / "data"), streaming=True)
    kept, apart = held_out(source, 0.25, 0)
    dataset = ImageDataset(source, Preprocess((24, 24), 3), kept)
    assert sum(dataset.blocks) == len(kept) == 36 and len(dataset.blocks) == 12

    def seen(start: int, steps: int, workers: int = 0) -> list[list[int]]:
        parts = [Batches(dataset, 6, 1, start, rank, world, workers) for rank in range(world)]
        found = [sum((first(next(part)[0]) for part in parts), []) for _ in range(steps)]
        for part in parts:
            part.close()
        return found

    epoch = seen(0, 6)
    assert sorted(sum(epoch, [])) == sorted(kept.tolist())
    assert seen(18, 3, workers=2) == epoch[3:]
    one = Batches(dataset, 6, 1)
    assert [first(next(one)[0]) for _ in range(6)] == epoch


def bytes_of(asked: list[str]) -> int:
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", text) for text in asked]
    return sum(int(r[2]) - int(r[1]) + 1 for r in ranges)


def test_bytes_are_read_about_once_and_nothing_is_stored(tmp_path, served):
    write_files(tmp_path / "data", 3, side=96)  # large beside the 64 KiB from its end that a footer is looked for in
    size = sum(path.stat().st_size for path in (tmp_path / "data").iterdir())
    address, asked = served()
    data = address + "/data/part-{0..2}.parquet"
    before = set(tmp_path.rglob("*"))
    source = open_source(data, streaming=True)
    assert 0.9 * size < bytes_of(asked) < 1.25 * size  # the look at every image, columns and footers
    asked.clear()
    source = open_source(data, streaming=True)
    assert bytes_of(asked) < 0.2 * size  # known from the first time
    dataset = ImageDataset(source, Preprocess((96, 96), 3))
    asked.clear()
    assert first(dataset.batch(range(len(dataset)))[0]) == list(range(3 * EACH))
    assert bytes_of(asked) < 1.05 * size
    asked.clear()
    source._group_images.cache_clear()  # what that pass left in memory would not be read
    batches = Batches(dataset, 6, 0, workers=1)  # one thread, so that the same groups are read at each run of the test
    for _ in range(len(dataset) // 6):
        next(batches)
    batches.close()
    assert 0.9 * size < bytes_of(asked) < 1.3 * size  # all, and of the next epoch the window that is read ahead
    assert 0 < source._group_images.cache_info().currsize <= 2 * WINDOW
    assert set(tmp_path.rglob("*")) == before


def test_a_server_without_ranges_is_refused(tmp_path, served):
    write_files(tmp_path / "data", 1)
    address, _ = served(ranges=False)
    with pytest.raises(UserError, match="does not serve ranges"):
        open_source(f"{address}/data/part-0.parquet", streaming=True)


@pytest.mark.parametrize(
    "how, said",
    [
        ("cut", "cannot be read as parquet"),
        ("text", "cannot be read as parquet"),
        ("empty", "has no rows"),
        ("other", "has other columns than"),
        ("column", "image_column pixels is not a column; the columns are image, label, text"),
        ("nothing", "no such parquet file"),
        ("folder", "nothing to stream; data.streaming reads parquet files"),
        ("shards", "nothing to stream"),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tmp_path, how, said):
    from latentdiff.data.image_source import Columns

    data, path, columns = write_files(tmp_path / "data"), tmp_path / "data" / "part-1.parquet", Columns()
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "text":
        path.write_text("no table")
    elif how == "empty":
        pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
        data = str(path)
    elif how == "other":
        pq.write_table(pa.table({"image": [b"x"]}), path)
    elif how == "column":
        columns = Columns(image="pixels")
    elif how == "nothing":
        data = str(tmp_path / "none-*.parquet")
    elif how == "folder":
        data = str(write_stripes(tmp_path / "stripes", 4))
    elif how == "shards":
        data = str(tmp_path / "a-{0..3}.tar")
    with pytest.raises(UserError) as refused:
        open_source(data, streaming=True, columns=columns)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_damaged_rows_are_skipped_as_in_folders(tmp_path):
    table = pa.table({"image": [noise(0), b"not an image", noise(2), None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"), max_bad_share=0.5, streaming=True)
    assert [int(source.read(i)[0, 0, 0]) for i in range(2)] == [0, 2] and source.blocks == (1, 1)
    assert source.bad == {"row 1": "not a known image format", "row 3": "the table has no bytes of it"}
    with pytest.raises(UserError, match="2 of 4 images cannot be read"):
        open_source(str(tmp_path / "a.parquet"), streaming=True)


def striped_table(root):
    folder = write_stripes(root / "stripes", 16)
    files = sorted(folder.rglob("*.png"))
    table = pa.table({"image": [f.read_bytes() for f in files], "label": [f.parent.name for f in files]})
    pq.write_table(table, root / "a.parquet", row_group_size=2)
    return root / "a.parquet"


def test_both_stages_train_from_a_stream_and_go_on_bit_for_bit(tmp_path, monkeypatch):
    data, opened = striped_table(tmp_path), parquet_stream.open_streamed
    kept = {"data__streaming": True, "train__save_minutes": 1e-9, "train__keep": 100}
    for name, lengths in (("whole", [8]), ("broken", [3, 8])):
        for resume, steps in enumerate(lengths):
            config = autoencoder_config(data, tmp_path / name, train__steps=steps, optimizer__schedule="constant", **kept)
            train(config, resume=bool(resume))
    whole, broken = (state.load_state(tmp_path / name)[0] for name in ("whole", "broken"))
    assert all(torch.equal(value, broken[part][key]) for part in whole for key, value in whole[part].items())
    plain = train(autoencoder_config(data, tmp_path / "plain", train__steps=8, optimizer__schedule="constant"))
    assert plain.is_dir() and not torch.equal(  # another order, another run
        state.load_state(tmp_path / "plain")[0]["model"]["encoder.conv_in.weight"], whole["model"]["encoder.conv_in.weight"]
    )
    model = train(diffusion_config(data, tmp_path / "stage2", tmp_path / "whole", data__streaming=True, train__steps=3))
    assert (model / "model_index.json").is_file()
    seen = []
    monkeypatch.setattr(parquet_stream, "open_streamed", lambda *found: seen.append(found) or opened(*found))
    pipeline = load(model)
    held = reference_sets(str(data), *data_rule(model, LatentCodec(pipeline.vae)))[1]
    assert seen and type(held.source).__name__ == "StreamedTable"  # what measures the model streams as its training did
    assert reference_sets(str(tmp_path / "stripes"), *data_rule(model, LatentCodec(pipeline.vae)))  # a folder has no such thing


def test_a_run_of_before_this_key_is_taken_up(tmp_path, stripe_folder):
    config = autoencoder_config(stripe_folder, tmp_path / "run", train__steps=2)
    train(config)
    record = tmp_path / "run" / "run.json"
    tree = json.loads(record.read_text())
    del tree["data"]["streaming"]
    record.write_text(json.dumps(tree))
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=3), resume=True)
    with pytest.raises(UserError, match="data.streaming differs"):
        train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=4, data__streaming=True), resume=True)
