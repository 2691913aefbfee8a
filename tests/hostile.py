"""Files that lie: safetensors with false headers and JSON with wrong values, made of small valid ones; and their loaders."""

import copy
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file
from tiny_models import tiny_unet, tiny_vae

from latentdiff import checkpoints
from latentdiff.data.latent_cache import open_cache
from latentdiff.data.tensor_shards import shard_path, write_manifest, write_shard
from latentdiff.guidance import LatentClassifier, load_classifier
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.models.feature_net import FeatureNet, load_features
from latentdiff.models.judge_net import JudgeNet, load_judge

MADE_OF = {
    "format": 1,
    "autoencoder": "a",
    "preprocessing": {"size": [8, 8]},
    "data": "d",
    "count": 3,
    "flips": False,
    "dtype": "float16",
    "shard_size": 2,
}
VALUES = [None, True, -1, 0, 2**70, 10**12, 1e308, float("nan"), float("inf"), "", "../x", "\ud800", [], [None], {}, {"a": 1}]
DEEP = "[" * 100_000


@dataclass(frozen=True)
class Kind:
    """How one kind of folder is made and read; `weights` and `configs` are files in it."""

    write: Callable[[Path], Any]
    load: Callable[[Path], Any]
    weights: str
    configs: tuple[str, ...]


def write_checkpoint(folder: Path) -> None:
    torch.manual_seed(0)
    checkpoints.save(
        folder,
        unet=tiny_unet(),
        vae=tiny_vae(),
        scheduler=DDIMScheduler(),
        meta={"steps": 7},
        class_names=["a", "b", "c"],
        null_class=3,
    )


def without_hashes(folder: Path) -> None:
    """Take away what would refuse any change of the weights, so that what lies behind it is tried."""
    for file in folder.rglob("hashes.json"):
        file.unlink()


def write_cache(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, rows in ((0, 2), (1, 1)):
        moments = {name: torch.ones(rows, 2, 4, 4).half() for name in ("mean", "std")}
        write_shard(shard_path(folder, number), {**moments, "labels": torch.zeros(rows, dtype=torch.int64)}, MADE_OF)
    facts = {"latent_shape": [2, 4, 4], "labelled": True, "class_names": ["x"], "source": "s", "unreadable": {}}
    write_manifest(folder, {"identity": MADE_OF, **facts})


def use_cache(folder: Path) -> None:
    cache = open_cache(folder)
    cache.batch([0, 2])
    cache.statistics()


NET = dict(weights="model.safetensors", configs=("config.json",))
KINDS = {
    "checkpoint": Kind(
        write_checkpoint,
        checkpoints.load,
        "unet/diffusion_pytorch_model.safetensors",
        ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"),
    ),
    "autoencoder": Kind(
        lambda folder: tiny_vae().save_pretrained(folder),
        lambda folder: load_autoencoder(str(folder)),
        "diffusion_pytorch_model.safetensors",
        ("config.json",),
    ),
    "features": Kind(lambda folder: FeatureNet(1, 3, (8, 8, 8)).fold().save(folder), load_features, **NET),
    "judge": Kind(lambda folder: JudgeNet(["a", "b"], ["s"], (8, 8), 8).fold().save(folder), load_judge, **NET),
    "classifier": Kind(
        lambda folder: LatentClassifier(2, 3, {"name": "ddpm-linear"}, (8, 8)).save(folder), load_classifier, **NET
    ),
    "cache": Kind(write_cache, use_cache, "shard-00001.safetensors", ("manifest.json",)),
}


def split_header(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def packed(header: Any, body: bytes, length: int | None = None) -> bytes:
    """A safetensors file; header: JSON, or bytes as they are. length: what it says of the header, None for the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def lies(raw: bytes, scratch: Path) -> Iterator[tuple[str, bytes]]:
    """(what it is, bytes) of files that are not what a loader of `raw` wants."""
    header, body = split_header(raw)
    names = [name for name in header if name != "__metadata__"]
    start, end = header[names[0]]["data_offsets"]

    def changed(**entry: Any) -> bytes:
        return packed({**header, names[0]: {**header[names[0]], **entry}}, body)

    yield "empty", b""
    yield "no header", b"abc"
    yield "header beyond the file", packed(header, body, 10**6)
    yield "header of 100 MB", packed(header, body, 100_000_000)
    yield "header beyond the limit", packed(header, body, 100_000_001)
    yield "header of 2^64", packed(header, body, 2**64 - 1)
    yield "truncated", raw[:-5]
    yield "longer", raw + b"abc"
    yield "offsets beyond", changed(data_offsets=[start, end + 10**9])
    yield "offsets negative", changed(data_offsets=[-4, end])
    yield "offsets swapped", changed(data_offsets=[end, start])
    yield "offsets overlap", changed(data_offsets=[start, end + 2])
    yield "shape negative", changed(shape=[-1, 3])
    yield "shape beyond memory", changed(shape=[2**40, 2**40])
    yield "dtype unknown", changed(dtype="Q99")
    yield "dtype no word", changed(dtype={"a": 1})
    yield "not JSON", packed(b'{"a":', body)
    yield "a list", packed(b"[]", body)
    yield "nested", packed(DEEP.encode(), body)
    yield "not UTF-8", packed(b'{"\xff\xfe":1}', body)
    yield "no tensors", packed(b"{}", b"")
    yield "another name", packed({("../" + k if k == names[0] else k): v for k, v in header.items()}, body)
    yield "a pickle", b"\x80\x04\x95" + b"cos\nsystem\n(S'touch ran'\ntR." * 4
    file, metadata = scratch / "lie.safetensors", header.get("__metadata__")
    shapes = {name: header[name]["shape"] for name in names}
    for what, make in {
        "other shapes": lambda shape: torch.zeros(5),
        "scalars": lambda shape: torch.zeros([]),
        "complex numbers": lambda shape: torch.zeros(shape, dtype=torch.complex64),
        "truth values": lambda shape: torch.zeros(shape, dtype=torch.bool),
    }.items():
        save_file({name: make(shape) for name, shape in shapes.items()}, file, metadata)
        yield what, file.read_bytes()


def broken_json(text: str) -> Iterator[tuple[str, bytes]]:
    """(what it is, bytes) of files that are no JSON object."""
    for raw in ("", "{", "[]", "null", "5", '"x"', DEEP, '{"a":' * 50_000, '{"a":' + "9" * 5000 + "}"):
        yield raw[:10], raw.encode()
    yield "UTF-16", text.encode("utf-16")
    yield "not UTF-8", b"\xff\xfe\x00"


def places(tree: Any, depth: int, path: tuple = ()) -> Iterator[tuple]:
    """Paths of keys and indices to every value down to a depth."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items if depth else ():
        yield (*path, key)
        yield from places(value, depth - 1, (*path, key))


def with_value(tree: Any, path: tuple, value: Any) -> Any:
    """A copy of a JSON tree with another value at a path; KeyError as the value: without the key."""
    tree = copy.deepcopy(tree)
    node = tree
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return tree
