"""A data set's features and their moments, kept by the hash of what they were made from: looked at once, used often."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latentdiff.data.preprocess import ImageDataset
from latentdiff.evaluation.features import FeatureSpace
from latentdiff.evaluation.scores import Seen, look, read_batches
from latentdiff.evaluation.statistics import Moments

FORMAT = 1


def cache_beside(out: str | Path) -> Path | None:
    """The folder reference-cache beside an output folder, where that has a name of its own and its neighbourhood is ours."""
    path = Path(out)
    beside = path.absolute().parent / "reference-cache"
    writable = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    return beside if path.name not in ("", "..") and (writable or not beside.parent.exists()) else None


def see_reference(
    net: FeatureSpace, images: ImageDataset, batch: int, folder: str | Path | None, log: Callable[[str], None]
) -> Seen:
    """What net sees in images, features kept: read from folder where it is there, else looked at and written there.

    folder: None keeps nothing on disk. The file's name is the hash of data, preprocessing and network, so that nothing
    stands for anything else; one that is damaged is made again.
    """
    if folder is None:
        return look(net, read_batches(images, batch), keep=True)
    identity = {
        "format": FORMAT, "data": images.fingerprint(), "preprocessing": images.preprocess.describe(),
        "features": net.fingerprint(), "images": len(images), "dimensions": net.dim,
    }  # fmt: skip
    path = Path(folder) / f"reference-{_hash(identity)[:24]}.safetensors"
    if path.is_file():
        found = _read(path, identity)
        if found is not None:
            log(f"evaluate: reference features from {path}")
            return found
        log(f"evaluate: {path} is damaged and is made again")
    seen = look(net, read_batches(images, batch), keep=True)
    _write(path, seen, identity)
    return seen


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _write(path: Path, seen: Seen, identity: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"features": seen.kept.contiguous(), "mean": seen.moments.mean, "scatter": seen.moments.scatter}
    facts = {"identity": identity, "images_sha256": seen.sha256, "tensors_sha256": _content(tensors)}
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}.tmp")
    try:
        save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, identity: dict[str, Any]) -> Seen | None:
    """What the file holds; None unless it is whole, of this identity, and hashes to what it says."""
    N, D = identity["images"], identity["dimensions"]
    shapes = {"features": (N, D), "mean": (D,), "scatter": (D, D)}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if facts["identity"] != identity or found != shapes or not isinstance(facts["images_sha256"], str):
            return None
        tensors = load_file(path)
        if _content(tensors) != facts["tensors_sha256"]:
            return None
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    moments = Moments.of(N, tensors["mean"], tensors["scatter"])
    return Seen(moments, None, facts["images_sha256"], tensors["features"])


def _content(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
