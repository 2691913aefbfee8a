"""Small valid files, mutated: each loader returns or raises UserError, within its time, and nothing else comes out."""

import gzip
import io
import json
import struct
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import KINDS, packed, places, split_header, with_value, without_hashes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_emoji import package, tarball
from tiny_runs import diffusion_tree

from latentdiff import checkpoints
from latentdiff.config import load_config, parse_config
from latentdiff.data.image_files import DECODING_ERRORS, decode, inspect, read_idx
from latentdiff.data.pairs import read_pairs
from latentdiff.data.sources import open_source
from latentdiff.data.tensor_shards import read_manifest, stored_identity
from latentdiff.errors import UserError
from latentdiff.evaluation.sample_sets import read_npz
from latentdiff.models.loading import weight_files, weight_names
from latentdiff.recipes.emoji import prepare as emoji
from latentdiff.training import state
from latentdiff.utils.json_files import read_json

LIMIT = 10.0  # seconds of processor time a case may take: what other programs take does not count
ODD = [None, True, -1, 0, 3, 2**70, 1e308, float("nan"), "", "x", "../x", "\ud800", [], [1, 2], [[]], {}, {"a": None}]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw, raw: bytes) -> bytes:
    """Bytes flipped, cut out, put in, doubled or cut off, up to four times."""
    data = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "cut", "insert", "truncate", "double", "zero"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del data[at : at + draw(st.integers(1, 16))]
            case "insert":
                data[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "truncate":
                del data[at:]
            case "double":
                data[at:at] = data[at : at + 64]
            case "zero":
                data[at : at + 4] = draw(st.sampled_from([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"]))
    return bytes(data)


@st.composite
def other_json(draw, tree: Any) -> Any:
    """The tree with one to three of its values, keys or items replaced or left out."""
    for _ in range(draw(st.integers(1, 3))):
        every = list(places(tree, 4))
        if every:
            tree = with_value(tree, draw(st.sampled_from(every)), draw(st.just(KeyError) | VALUES))
    return tree


def json_bytes(raw: bytes) -> st.SearchStrategy[bytes]:
    return other_json(json.loads(raw)).map(lambda tree: json.dumps(tree).encode()) | damaged(raw)


def lines_bytes(raw: bytes) -> st.SearchStrategy[bytes]:
    rows = [json.loads(line) for line in raw.splitlines()]
    return other_json(rows).map(lambda rows: "".join(json.dumps(r) + "\n" for r in rows).encode()) | damaged(raw)


def shard_bytes(raw: bytes) -> st.SearchStrategy[bytes]:
    header, body = split_header(raw)
    return other_json(header).map(lambda changed: packed(changed, body)) | damaged(raw)


def yaml_bytes(raw: bytes) -> st.SearchStrategy[bytes]:
    signs = st.text(st.sampled_from("&a*b!<>:-[]{}|? \n\t'\"%@,#~0123e.+_x"), max_size=40)
    return json_bytes(raw) | signs.map(str.encode) | st.tuples(damaged(raw), signs).map(lambda p: p[0] + p[1].encode())


def holds(file: Path, load: Callable[[], Any], cases: st.SearchStrategy[bytes], count: int) -> dict[str, int]:
    """The property, over `count` cases put into file, which is as it was afterwards; how many were tried and refused."""
    raw, tried = file.read_bytes(), {"refused": 0, "all": 0}

    @settings(deadline=None, derandomize=True, max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def check(case: bytes) -> None:
        file.write_bytes(case)
        begun = time.process_time()
        try:
            load()
        except UserError as error:
            tried["refused"] += 1
            assert str(error) and "\n" not in str(error)
        assert time.process_time() - begun < LIMIT
        tried["all"] += 1

    try:
        check()
    finally:
        file.write_bytes(raw)
    load()
    return tried


def picture(kind: str) -> bytes:
    stream, pixels = io.BytesIO(), np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def seen(file: Path) -> None:
    """What a folder source does with a file: its header, then its pixels where that is one."""
    reason = inspect(file)
    try:
        assert decode(file, 3).dtype == np.uint8
    except DECODING_ERRORS:
        if isinstance(reason, str):
            raise UserError(reason) from None


def make(name: str, root: Path) -> tuple[Path, Callable[[], Any], Callable[[bytes], st.SearchStrategy[bytes]]]:
    """(file, loader, mutations) of a target; the file is valid."""
    if name.startswith("image "):
        file = root / f"a.{name.split()[1]}"
        file.write_bytes(picture(name.split()[1]))
        return file, lambda: seen(file), damaged
    if name in KINDS or name.endswith(".json"):
        kind = KINDS[name.split("/")[0]]
        kind.write(root / "it")
        without_hashes(root / "it")
        path = root / "it" / (name.split("/", 1)[1] if "/" in name else kind.weights)
        return path, lambda: kind.load(root / "it"), json_bytes if path.suffix == ".json" else shard_bytes
    return globals()["make_" + name.replace(" ", "_")](root)


def make_header(root):
    KINDS["features"].write(root / "it")
    file = root / "it" / "model.safetensors"
    return file, lambda: weight_names(file), shard_bytes


def make_shard(root):
    KINDS["cache"].write(root / "it")
    file = root / "it" / "shard-00000.safetensors"
    return file, lambda: stored_identity(file) or refuse(file), shard_bytes


def make_manifest(root):
    KINDS["cache"].write(root / "it")
    return root / "it" / "manifest.json", lambda: read_manifest(root / "it"), json_bytes


def make_index(root):
    KINDS["checkpoint"].write(root / "it")
    return root / "it" / "model_index.json", lambda: checkpoints.check(root / "it"), json_bytes


def make_record(root):
    KINDS["checkpoint"].write(root / "it")
    return root / "it" / "latentdiff.json", lambda: read_json(root / "it" / "latentdiff.json"), damaged


def make_weight_map(root):
    KINDS["autoencoder"].write(root / "it")
    (root / "it" / "diffusion_pytorch_model.safetensors").rename(root / "it" / "a.safetensors")
    file = root / "it" / "diffusion_pytorch_model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {"total_size": 9}, "weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}))
    return file, lambda: weight_files(root / "it"), json_bytes


def make_config(root):
    file = root / "run.yaml"
    file.write_text(json.dumps(diffusion_tree(Path("data"), Path("out"), Path("vae"))))
    return file, lambda: load_config(file), yaml_bytes


def make_idx(root, suffix=""):
    file = root / f"idx{suffix}"
    raw = bytes([0, 0, 8, 3]) + struct.pack(">III", 2, 3, 4) + bytes(24)
    file.write_bytes(gzip.compress(raw, mtime=0) if suffix else raw)
    return file, lambda: read_idx(file, 3), damaged


def make_idx_gz(root):
    return make_idx(root, ".gz")


def make_npz(root):
    np.savez(root / "s.npz", np.zeros((2, 4, 4, 3), np.uint8), np.arange(2))
    return root / "s.npz", lambda: read_npz(root / "s.npz"), damaged


def make_metadata(root):
    row = {"file_name": "a.png", "text": ["one", "two"], "label": "x", "style": "s", "identity": "i", "name": "n"}
    for part in ("train", "test"):
        (root / part).mkdir()
        for file in ("a.png", "b.png"):
            (root / part / file).write_bytes(picture("png"))
        rows = [row, {**row, "file_name": "b.png", "label": "y"}]
        (root / part / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "train" / "metadata.jsonl", lambda: open_source(str(root), max_bad_share=0.9).fingerprint(), lines_bytes


def make_table(root):
    file, load, _ = make_metadata(root)
    file.unlink()
    (root / "train" / "metadata.csv").write_text("file_name,label,text\na.png,1,one\nb.png,12,two\n")
    return root / "train" / "metadata.csv", load, damaged


def make_pairs(root):
    file, _, cases = make_metadata(root)
    return file, lambda: read_pairs(root), cases


def make_tarball(root):
    file = tarball(root / "a.tgz", {"package.json": package("emojibase-data")["package.json"]})

    def cases(raw: bytes) -> st.SearchStrategy[bytes]:
        return damaged(raw) | damaged(gzip.decompress(raw)).map(gzip.compress)  # of the archive, too

    return file, lambda: emoji._read(file, ["package/package.json"]), cases


def make_state(root, name="state.json"):
    state.save_state(root, 3, {"model": {"w": torch.arange(6.0).reshape(2, 3)}}, {"ema_updates": 3}, keep=1)
    cases = json_bytes if name.endswith(".json") else shard_bytes
    return root / "state" / "step-3" / name, lambda: state.load_state(root, warn=False), cases


def make_state_weights(root):
    return make_state(root, "model.safetensors")


def make_tar(root):
    rows = {"a.png": picture("png"), "a.txt": b"one", "b.png": picture("png"), "b.txt": b"two"}
    file = root / "a.tar"
    with tarfile.open(file, "w") as tar:
        for name, content in rows.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file, lambda: open_source(str(file), max_bad_share=0.9).read(0), damaged


def make_parquet(root):
    from datasets import Dataset

    file = root / "a.parquet"
    rows = {"image": [{"bytes": picture("png"), "path": None}] * 3, "text": ["one", "two", "three"]}
    Dataset.from_dict(rows).to_parquet(str(file))
    return file, lambda: open_source(str(file), max_bad_share=0.9).read(0), damaged


def refuse(file: Path) -> None:
    raise UserError(f"{file}: no shard")


@pytest.fixture(autouse=True)
def own_index(monkeypatch, tmp_path):
    """Indices of shards belong into the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "index"))


# Cases in the slow part
COUNTS = {
    "header": 900,
    "shard": 500,
    "manifest": 800,
    "index": 400,
    "record": 400,
    "weight map": 400,
    "config": 700,
    "idx": 700,
    "idx gz": 700,
    "npz": 450,
    "metadata": 400,
    "table": 400,
    "pairs": 400,
    "tarball": 400,
    "state": 400,
    "state weights": 400,
    "tar": 400,
    "image png": 500,
    "image jpeg": 400,
    "image gif": 400,
    "image bmp": 400,
    "image webp": 400,
    "image tiff": 400,
    "features": 100,
    "cache": 100,
    "features/config.json": 100,
    "judge/config.json": 60,
    "classifier/config.json": 40,
    "cache/manifest.json": 120,
    "autoencoder": 25,
    "autoencoder/config.json": 40,
    "checkpoint/unet/config.json": 20,
    "checkpoint/model_index.json": 20,
    "parquet": 30,
}
FAST = 100


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name, count in COUNTS.items() if count >= 400])
def test_damaged_files_load_or_are_refused(tmp_path, name):
    file, load, mutations = make(name, tmp_path)
    tried = holds(file, load, mutations(file.read_bytes()), FAST)
    assert tried["all"] >= FAST and tried["refused"] > FAST // 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COUNTS)
def test_many_damaged_files_load_or_are_refused(tmp_path, name):
    file, load, mutations = make(name, tmp_path)
    tried = holds(file, load, mutations(file.read_bytes()), COUNTS[name])
    assert tried["all"] >= COUNTS[name] and tried["refused"] > COUNTS[name] // 20


def test_the_slow_part_has_ten_thousand_cases():
    assert sum(COUNTS.values()) >= 10_000


@pytest.mark.parametrize("wrong", [KeyError("a"), RecursionError("deep"), SystemExit(1), struct.error("x")])
def test_the_property_sees_what_is_no_user_error(tmp_path, wrong):
    file = tmp_path / "a"
    file.write_bytes(b"right")

    def load():
        if file.read_bytes() != b"right":
            raise wrong

    with pytest.raises(type(wrong)):
        holds(file, load, damaged(b"right"), 20)
    assert file.read_bytes() == b"right"


@pytest.mark.parametrize("count", [200])
def test_parsed_configs_load_or_are_refused(count):
    tree = diffusion_tree(Path("data"), Path("out"), Path("vae"))

    @settings(deadline=None, derandomize=True, max_examples=count, database=None, suppress_health_check=list(HealthCheck))
    @given(other_json(tree))
    def check(changed):
        try:
            parse_config(changed)
        except UserError as error:
            assert "\n" not in str(error)

    check()
