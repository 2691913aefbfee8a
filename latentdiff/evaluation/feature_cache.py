"""A data set's features on disk, in a file named by the hash of what they were made from: computed once, used often."""

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

FORMAT = 2
PROGRESS = "features of the reference"


def default_cache_folder(out: str | Path) -> Path | None:
    """The folder reference-cache next to an output folder; None if `out` has no name or its parent is not writable."""
    path = Path(out)
    folder = path.absolute().parent / "reference-cache"
    writable = os.access(folder if folder.exists() else folder.parent, os.W_OK)
    return folder if path.name not in ("", "..") and (writable or not folder.parent.exists()) else None


def reference_statistics(
    net: FeatureSpace,
    images: ImageDataset,
    batch: int,
    folder: str | Path | None,
    log: Callable[[str], None],
    shared: bool = False,
) -> FeatureStatistics | None:
    """The statistics of a data set, with features: read from the cache if they are there, else computed and written to it.

    The file's name is the hash of data, preprocessing and network, so a file never stands for anything else. A damaged
    file is made again.

    Args:
        net: the feature network.
        images: the data set.
        batch: images in a batch of the network.
        folder: the cache; None writes nothing to disk.
        log: gets a line where a file is used.
        shared: all processes of a launcher call this. They share the work by whole batches, so that the numbers are
            those of one process. All but the first get None.
    """
    path, identity, cached = None, dict[str, Any](), None
    shared = shared and processes.count() > 1
    if folder is not None and processes.rank() == 0:
        identity = {
            "format": FORMAT,
            "data": images.fingerprint(),
            "preprocessing": images.preprocess.describe(),
            "features": net.fingerprint(),
            "images": len(images),
            "dimensions": net.dim,
        }
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
        path = Path(folder) / f"reference-{key}.safetensors"
        if path.is_file():
            cached = _read(path, identity)
            state = "is damaged and is made again" if cached is None else "holds the features of the reference"
            log(f"evaluate: {path} {state}")
    if processes.agree(cached is not None) if shared else cached is not None:
        return cached
    if shared:
        statistics = _shared_statistics(net, images, batch)
    else:
        statistics = feature_statistics(net, read_batches(images, batch, PROGRESS), keep_features=True)
    if statistics is not None and path is not None:
        _write(path, statistics, identity)
    return statistics


def _shared_statistics(net: FeatureSpace, images: ImageDataset, batch: int) -> FeatureStatistics | None:
    """`feature_statistics` with its batches shared over processes: on the first one the result of one process, else None."""
    features, hashes = [np.empty((0, net.dim), np.float32)], [np.empty((0, 32), np.uint8)]
    shape: tuple[int, ...] = ()
    for x, _ in read_batches(images, batch, PROGRESS, processes.share(len(images), batch)):
        pixels = to_uint8(x)
        shape = pixels.shape[1:]
        features.append(extract(net, x)[0].float().numpy())
        hashes.append(pixel_digests(pixels))
    all_features, all_hashes = (processes.gather(np.concatenate(parts), len(images), batch) for parts in (features, hashes))
    if all_features is None or all_hashes is None:
        return None
    kept, moments = torch.from_numpy(all_features), Moments(net.dim)
    for part in kept.split(batch):
        moments.update(part)
    labels = b"" if images.labels is None else images.labels.numpy().tobytes()
    sha256 = content_hash(shape, *(hashlib.sha256(each).hexdigest() for each in (all_hashes.tobytes(), labels)))
    return FeatureStatistics(moments, None, sha256, kept)


def _write(path: Path, statistics: FeatureStatistics, identity: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    moments = statistics.moments
    tensors = {"features": statistics.features.contiguous(), "mean": moments.mean, "scatter": moments.scatter}
    facts = {"identity": identity, "images_sha256": statistics.sha256, "tensors_sha256": _tensor_hash(tensors)}
    # Whoever holds the lock writes the same content, so there is nothing to wait for
    with contextlib.suppress(locks.InUse), locks.locked(path, beside=True, alone=True):
        for leftover in path.parent.glob(f".{path.stem}.*.tmp"):  # of a process that was killed
            leftover.unlink(missing_ok=True)
        with atomic.new_file(path) as temporary:
            save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)})


def _read(path: Path, identity: dict[str, Any]) -> FeatureStatistics | None:
    """The content of a file; None unless it is whole, has this identity, and its tensors have the recorded hash."""
    N, D = identity["images"], identity["dimensions"]
    expected = {"features": (N, D), "mean": (D,), "scatter": (D, D)}
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
        if facts["identity"] != identity or shapes != expected or not isinstance(facts["images_sha256"], str):
            return None
        tensors = load_file(path)
        if _tensor_hash(tensors) != facts["tensors_sha256"]:
            return None
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    moments = Moments.of(N, tensors["mean"], tensors["scatter"])
    return FeatureStatistics(moments, None, facts["images_sha256"], tensors["features"])


def _tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
