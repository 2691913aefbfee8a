"""A data set's features and their moments, kept by the hash of what they were made from: looked at once, used often."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from latentdiff.data.datasets import ImageDataset
from latentdiff.evaluation.feature_statistics import (
    FeatureStatistics,
    content_hash,
    feature_statistics,
    pixel_digests,
    read_batches,
)
from latentdiff.evaluation.frechet import Moments
from latentdiff.models.feature_net import FeatureSpace, extract
from latentdiff.utils import atomic, locks, processes
from latentdiff.utils.images import to_uint8

FORMAT, LOOKING = 2, "features of the reference"


def default_cache_folder(out: str | Path) -> Path | None:
    """The folder reference-cache beside an output folder, where that has a name of its own and its neighbourhood is ours."""
    path = Path(out)
    beside = path.absolute().parent / "reference-cache"
    writable = os.access(beside if beside.exists() else beside.parent, os.W_OK)
    return beside if path.name not in ("", "..") and (writable or not beside.parent.exists()) else None


def reference_statistics(
    net: FeatureSpace,
    images: ImageDataset,
    batch: int,
    folder: str | Path | None,
    log: Callable[[str], None],
    shared: bool = False,
) -> FeatureStatistics | None:
    """What net sees in images, features kept: read from folder where it is there, else looked at and written there.

    folder: None keeps nothing on disk. The file's name is the hash of data, preprocessing and network, so that nothing
    stands for anything else; one that is damaged is made again. shared: all processes of a launcher call this; they share
    the looking by whole batches, so that the numbers are those of one, and all but the first get None.
    """
    path, identity, found = None, dict[str, Any](), None
    shared = shared and processes.count() > 1
    if folder is not None and processes.rank() == 0:
        path, identity, found = _kept(net, images, folder, log)
    if processes.agree(found is not None) if shared else found is not None:
        return found
    seen = (
        _shared_look(net, images, batch) if shared else feature_statistics(net, read_batches(images, batch, LOOKING), keep=True)
    )
    if seen is not None and path is not None:
        _write(path, seen, identity)
    return seen


def _kept(
    net: FeatureSpace, images: ImageDataset, folder: str | Path, log: Callable[[str], None]
) -> tuple[Path, dict[str, Any], FeatureStatistics | None]:
    """The file of these images' features, what it is of, and what it holds if it is there and whole."""
    identity = {
        "format": FORMAT,
        "data": images.fingerprint(),
        "preprocessing": images.preprocess.describe(),
        "features": net.fingerprint(),
        "images": len(images),
        "dimensions": net.dim,
    }
    path = Path(folder) / f"reference-{_hash(identity)[:24]}.safetensors"
    if path.is_file():
        found = _read(path, identity)
        said = "is damaged and is made again" if found is None else "holds the features of the reference"
        log(f"evaluate: {path} {said}")
        return path, identity, found
    return path, identity, None


def _shared_look(net: FeatureSpace, images: ImageDataset, batch: int) -> FeatureStatistics | None:
    """`look` with its batches shared over processes; on the first process what one alone would see, on others None."""
    parts, shape = list[tuple[np.ndarray, np.ndarray]](), tuple[int, ...]()
    for x, _ in read_batches(images, batch, LOOKING, processes.share(len(images), batch)):
        pixels = to_uint8(x)
        shape = pixels.shape[1:]
        parts.append((extract(net, x)[0].float().numpy(), pixel_digests(pixels)))
    empty = [(np.empty((0, net.dim), np.float32), np.empty((0, 32), np.uint8))]
    columns = [np.concatenate(column) for column in zip(*(parts or empty), strict=True)]
    features, hashes = (processes.gather(column, len(images), batch) for column in columns)
    if features is None or hashes is None:
        return None
    kept, moments = torch.from_numpy(features), Moments(net.dim)
    for part in kept.split(batch):
        moments.update(part)
    labels = b"" if images.labels is None else images.labels.numpy().tobytes()
    found = (hashlib.sha256(each).hexdigest() for each in (hashes.tobytes(), labels))
    return FeatureStatistics(moments, None, content_hash(shape, *found), kept)


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _write(path: Path, seen: FeatureStatistics, identity: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"features": seen.kept.contiguous(), "mean": seen.moments.mean, "scatter": seen.moments.scatter}
    facts = {"identity": identity, "images_sha256": seen.sha256, "tensors_sha256": _content(tensors)}
    # Whoever is writing the same file writes the same content, so there is nothing to wait for
    with contextlib.suppress(locks.InUse), locks.locked(path, beside=True, alone=True):
        for leftover in path.parent.glob(f".{path.stem}.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        with atomic.new_file(path) as temporary:
            save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)})


def _read(path: Path, identity: dict[str, Any]) -> FeatureStatistics | None:
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
    return FeatureStatistics(moments, None, facts["images_sha256"], tensors["features"])


def _content(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
