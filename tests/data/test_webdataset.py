"""WebDataset shards: local or behind HTTP, what a folder of the same images gives; and what is wrong is named."""

import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_sources import one_line, write_image
from tiny_runs import write_stripes

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import Columns
from latentdiff.data.range_files import RangeFile, expand
from latentdiff.data.shuffling import Batches
from latentdiff.data.sources import open_source, splits
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "latentdiff" / "shards"


def png(level: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 6), (level,) * 3).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes | str | int], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            raw = content if isinstance(content, bytes) else str(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    return path


def numbered_shards(root: Path, shards: int = 3, each: int = 4) -> Path:
    """Sample k is of level k and class k % 3, in shards-000.tar, shards-001.tar, …"""
    for shard in range(shards):
        ids = range(shard * each, (shard + 1) * each)
        parts = [{f"{k:04d}.png": png(k), f"{k:04d}.cls": k % 3, f"{k:04d}.txt": f"picture {k}\n"} for k in ids]
        write_tar(root / f"shards-{shard:03d}.tar", {name: content for part in parts for name, content in part.items()})
    return root


def levels(source, count: int | None = None) -> list[int]:
    return [int(source.read(i)[0, 0, 0]) for i in range(count or len(source))]


def test_shards_give_what_a_folder_of_the_same_files_gives(tmp_path):
    (folder := tmp_path / "folder").mkdir()
    Image.fromarray(np.full((2, 2), 257 * 200, dtype=np.uint16)).save(folder / "0.png")
    Image.new("RGBA", (2, 2), (9, 0, 0, 100)).save(folder / "1.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(folder / "2.jpg", 50, size=(4, 8), exif=exif)
    noise = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "3.webp")
    files, labels = sorted(folder.iterdir()), [3, 10, 3, 4]
    rows = [{"file_name": f.name, "label": k, "text": f"of {f.name}"} for f, k in zip(files, labels, strict=True)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    members: dict[str, bytes | str | int] = {"note.md": "of no sample"}
    for file, label in zip(files, labels, strict=True):
        members |= {f"./set/{file.name}": file.read_bytes(), f"./set/{file.stem}.txt": f"of {file.name}"}
        members |= {f"./set/{file.stem}.cls": label}
    write_tar(tmp_path / "a.tar", members)
    for channels in (None, 1):
        wanted, found = open_source(str(folder), channels=channels), open_source(str(tmp_path / "a.tar"), channels=channels)
        assert found.channels == wanted.channels and found.sizes.tolist() == wanted.sizes.tolist()
        assert all(np.array_equal(found.read(i), wanted.read(i)) for i in range(4))
    assert found.class_names == wanted.class_names == ["3", "4", "10"]
    assert found.labels.tolist() == wanted.labels.tolist() and found.captions == wanted.captions


def test_braces_globs_and_http_name_the_same_samples(tmp_path, served):
    numbered_shards(tmp_path)
    address, asked = served()
    names = ("shards-{000..002}.tar", "shards-*.tar", "shards-{000,001,002}.tar")
    sources = [open_source(f"{tmp_path}/{name}") for name in names]
    sources += [open_source(address + "/shards-{000..002}.tar"), open_source("file://" + f"{tmp_path}/shards-*.tar")]
    del asked[:]
    for source in sources:
        assert levels(source) == list(range(12)) and source.labels.tolist() == [k % 3 for k in range(12)]
        assert source.captions[7] == ("picture 7",) and source.files[5] == "shards-001.tar/0005.png"
    assert len(asked) == 12  # an image is one range, and no more of its shard
    assert len({source.fingerprint() for source in sources}) == 1
    assert splits(address + "/shards-{000..002}.tar") == ("train",)


def test_a_shard_is_read_through_once_and_again_when_it_changes(tmp_path, served, own_cache):
    numbered_shards(tmp_path, 2)
    address, asked = served()
    open_source(address + "/shards-{000..001}.tar")
    assert asked and len(list(own_cache.iterdir())) == 2
    del asked[:]
    assert len(open_source(address + "/shards-{000..001}.tar")) == 8 and asked == []
    write_tar(tmp_path / "shards-001.tar", {"9.png": png(99), "9.cls": 1, "9.txt": "other"})
    for name in (f"{address}/shards-{{000..001}}.tar", f"{tmp_path}/shards-*.tar"):
        source = open_source(name)
        assert levels(source) == [0, 1, 2, 3, 99] and source.captions[4] == ("other",)
    for kept in own_cache.iterdir():
        kept.write_text(kept.read_text()[:-20])  # damaged: made again
    assert levels(open_source(f"{tmp_path}/shards-*.tar")) == [0, 1, 2, 3, 99]
    os.truncate(tmp_path / "shards-001.tar", 540)
    with pytest.raises(UserError, match="shards-001.tar: cannot be read .asked for"):
        source.read(4)
    assert source.bad == {}


def test_fingerprint_follows_the_content(tmp_path):
    prints = []
    for level, label, text in [(1, 0, "a"), (1, 0, "a"), (2, 0, "a"), (1, 1, "a"), (1, 0, "b")]:
        (folder := tmp_path / str(len(prints))).mkdir()
        first, second = {"0.png": png(level), "0.cls": label, "0.txt": text}, {"1.png": png(9), "1.cls": 0, "1.txt": "z"}
        write_tar(folder / "a.tar", first | second)
        prints.append(open_source(str(folder / "a.tar")).fingerprint())
    assert prints[0] == prints[1] and len(set(prints)) == 4


def test_an_index_that_cannot_be_kept_costs_time_alone(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert levels(open_source(str(numbered_shards(tmp_path, 1) / "*.tar"))) == [0, 1, 2, 3]


def test_json_columns_and_the_image_among_several(tmp_path):
    members: dict[str, bytes | str] = {}
    for k, (kind, said) in enumerate([("x", ["a", "b"]), ("y", "c")]):
        row = json.dumps({"kind": kind, "said": said, "label": 7, "caption": f"usual {k}"})
        members |= {f"{k}.in.png": png(k), f"{k}.out.png": png(k + 50), f"{k}.json": row}
    data = str(write_tar(tmp_path / "a.tar", members))
    source = open_source(data, columns=Columns("out.png", "kind", "said"))
    assert levels(source) == [50, 51] and source.class_names == ["x", "y"] and source.labels.tolist() == [0, 1]
    assert source.captions == [("a", "b"), ("c",)]
    usual = open_source(data, columns=Columns("in.png"))
    assert levels(usual) == [0, 1] and usual.class_names == ["7"] and usual.captions == [("usual 0",), ("usual 1",)]
    for columns, said in [
        (Columns(), r"sample 0 has several images \(in.png, out.png\): name one of these as image_column"),
        (Columns("both.png"), "sample 0 has no both.png, its images are in.png, out.png"),
        (Columns("in.png", label="cls"), "no sample has cls in its json"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            open_source(data, columns=columns)
        assert "a.tar" in one_line(error)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"0005.cls": None}, "shards-001.tar: sample 0005: has no label although others do"),
        ({"0006.txt": None}, "shards-001.tar: sample 0006: has no caption although others do"),
        ({"0004.png": None}, "shards-001.tar: sample 0004 has no image"),
        ({"0005.cls": "cat"}, "shards-001.tar: sample 0005: its cls must be a whole number, not 'cat'"),
        ({"0005.txt": b"\xff\xfe"}, "shards-001.tar: sample 0005: its txt is not UTF-8"),
        ({"0005.json": "{oops"}, "shards-001.tar: sample 0005: its json cannot be read"),
        ({"0005.json": "[1]"}, "shards-001.tar: sample 0005: its json must be an object"),
    ],
)
def test_a_gap_or_a_wrong_member_names_its_shard_and_sample(tmp_path, change, said):
    numbered_shards(tmp_path)
    members: dict = {}
    for k in range(4, 8):
        members |= {f"{k:04d}.png": png(k), f"{k:04d}.cls": k % 3, f"{k:04d}.txt": "words"}
    members = {name: content for name, content in {**members, **change}.items() if content is not None}
    write_tar(tmp_path / "shards-001.tar", members)
    with pytest.raises(UserError, match=said) as error:
        open_source(str(tmp_path / "shards-{000..002}.tar"))
    one_line(error)


@pytest.mark.parametrize("kept", [-9000, -10240, 700, 512 + 60, 1024 + 100, 200])
def test_a_truncated_shard_is_named(tmp_path, kept):
    whole = (numbered_shards(tmp_path) / "shards-001.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # of the last member: nothing but the end mark comes after it
    (tmp_path / "shards-001.tar").write_bytes(whole[: end if kept == -9000 else kept % len(whole)])
    with pytest.raises(UserError, match="shards-001.tar: (cut short|damaged)") as error:
        open_source(str(tmp_path / "shards-{000..002}.tar"))
    one_line(error)


def test_a_damaged_header_is_no_early_end(tmp_path):
    path = numbered_shards(tmp_path, 1) / "shards-000.tar"
    raw = bytearray(path.read_bytes())
    place = raw.index(b"0002.png")
    raw[place + 1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match=f"shards-000.tar: damaged, no member begins at byte {place}"):
        open_source(str(path))


def test_what_cannot_be_read_by_ranges_is_refused(tmp_path, served):
    write_tar(tmp_path / "a.tar.gz", {"0.png": png()}, "w:gz")
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar.gz").read_bytes())
    write_tar(tmp_path / "c.tgz", {"0.png": png()}, "w:gz")
    (tmp_path / "d.tar").write_bytes(b"no archive at all" * 100)
    write_tar(tmp_path / "e.tar", {})
    numbered_shards(tmp_path, 1)
    address, _ = served(ranges=False)
    for data, said in [
        (f"{tmp_path}/a.tar.gz", "is compressed \\(gzip\\)"),
        (f"{tmp_path}/b.tar", "is compressed \\(gzip\\)"),
        (f"{tmp_path}/c.tgz", "is compressed \\(gzip\\)"),
        (f"{tmp_path}/d.tar", "cut short, or not a tar archive"),
        (f"{tmp_path}/e.tar", "the shards have no samples"),
        (f"{tmp_path}/none.tar", "none.tar: no such shard"),
        (f"{tmp_path}/none-*.tar", "no such shard"),
        (f"{tmp_path}/shards-{{000..001}}.tar", "shards-001.tar: no such shard"),
        (f"{address}/shards-000.tar", "does not serve ranges"),
        (f"{address}/none.tar", "none.tar: no such shard"),
        (f"{address}/*.tar", "\\* finds nothing at an http address"),
        ("nowhere://bucket/a.tar", "cannot be reached"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            open_source(data)
        one_line(error)
    with pytest.raises(UserError, match="no test split"):
        open_source(f"{tmp_path}/shards-000.tar", "test")


def test_unreadable_members_follow_the_rule_of_folders(tmp_path):
    data = str(write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.jpg": png(1, "JPEG")[:-300], "2.png": png(2)}))
    for _ in range(2):  # the second time from the kept index
        with pytest.raises(UserError, match="1 of 3 images cannot be read.*a.tar/1.jpg"):
            open_source(data, max_bad_share=0)
        source = open_source(data, max_bad_share=0.4)
        assert levels(source) == [0, 2] and list(source.bad) == ["a.tar/1.jpg"]


def test_a_server_that_goes_away_is_no_bad_image(tmp_path, served, monkeypatch):
    numbered_shards(tmp_path, 1)
    address, asked = served()
    dataset = ImageDataset(open_source(address + "/shards-000.tar", max_bad_share=0.9), Preprocess())
    monkeypatch.setattr("latentdiff.data.range_files.time.sleep", lambda _: None)
    (tmp_path / "shards-000.tar").rename(tmp_path / "away")
    with pytest.raises(UserError, match="shards-000.tar: cannot be read") as error:
        dataset.batch([1])
    one_line(error)
    assert dataset.source.bad == {}
    (tmp_path / "away").rename(tmp_path / "shards-000.tar")
    assert dataset.batch([1])[1].tolist() == [1]


def test_a_read_over_the_net_is_tried_again(monkeypatch):
    waits, failures = [], [OSError("reset"), OSError("reset")]
    monkeypatch.setattr("latentdiff.data.range_files.time.sleep", waits.append)

    class Storage:
        def info(self, name):
            return {"size": 4}

        def cat_file(self, name, start, end):
            if failures:
                raise failures.pop()
            return b"abcd"[start:end]

    assert RangeFile("s3://bucket/a.tar", Storage()).read(1, 2) == b"bc" and waits == [0.25, 1.0]


def test_a_link_is_not_followed_and_names_never_leave_the_archive(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("../../0.png", "../../0.cls"):
            raw = png(5) if name.endswith("png") else b"1"
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
        for name in ("../../0.txt", "../../0.json"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.txt")
            archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    source = open_source(str(tmp_path / "a.tar"))
    assert levels(source) == [5] and source.captions is None and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_an_epoch_and_resume_at_the_right_sample(tmp_path, world):
    data = str(numbered_shards(tmp_path, 3, 8) / "shards-{000..002}.tar")

    def seen(start: int, steps: int, workers: int = 0) -> list[list[int]]:
        """The levels of each step's global batch of 8, from as many processes as `world`, each with its own source."""
        ranks = []
        for rank in range(world):
            batches = Batches(ImageDataset(open_source(data), Preprocess()), 8, 5, start, rank, world, workers)
            parts = list(itertools.islice(batches, steps))
            batches.close()
            assert all(torch.equal(labels, images_to_levels(images) % 3) for images, labels in parts)
            ranks.append([images_to_levels(images).tolist() for images, _ in parts])
        return [sum((ranks[rank][step] for rank in range(world)), []) for step in range(steps)]

    whole = seen(0, 6)
    for epoch in (whole[:3], whole[3:]):
        assert sorted(sum(epoch, [])) == list(range(24))
    assert whole[:3] != whole[3:]
    assert seen(2 * 8, 4, workers=2) == whole[2:]  # a run that stopped after step 2, prepared ahead by threads


def images_to_levels(images: torch.Tensor) -> torch.Tensor:
    return ((images[:, 0, 0, 0] + 1) * 127.5).round().long()


def test_real_pictures_keep_their_labels_across_shards(tmp_path):
    folder = write_stripes(tmp_path / "folder", 12)
    wanted = open_source(str(folder))
    for shard in range(2):
        files = wanted.files[shard * 6 : shard * 6 + 6]
        members = {f"{k}.png": (folder / file).read_bytes() for k, file in enumerate(files)}
        rows = {f"{k}.json": json.dumps({"label": file.split("/")[0]}) for k, file in enumerate(files)}
        write_tar(tmp_path / f"{shard}.tar", members | rows)  # a sample's members need not stand side by side
    found = open_source(str(tmp_path / "{0..1}.tar"))
    assert found.class_names == wanted.class_names and torch.equal(found.labels, wanted.labels)
    assert all(np.array_equal(found.read(i), wanted.read(i)) for i in range(12))


def test_patterns():
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"] and expand("plain") == ["plain"]
    for pattern in ("{3..1}", "{a}", "{a..b}", "{0..99999999}", "{0..9999}{0..9999}"):
        with pytest.raises(UserError) as error:
            expand(pattern)
        assert pattern in one_line(error)
