"""The latent cache: posterior moments of a frozen autoencoder over a data set, on disk, read through memory maps.

Moments are kept, not draws: each epoch takes fresh latents mean + std * noise, so no noise is frozen into the data.
Mirrored images are encoded apart, because an encoder does not commute with mirroring. Every shard and the manifest
carry the identity of what made them (autoencoder weights, preprocessing, data), and a cache that does not match is
refused.

    manifest.json                written last: its presence says that all shards are there
    shard-00000.safetensors      mean, std [n, c, h, w]; mirrored.mean, mirrored.std where flips were cached; labels [n]
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.data.preprocess import ImageDataset
from latentdiff.errors import UserError
from latentdiff.rng import randn

FORMAT = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}
_NAMES = {
    "autoencoder": "autoencoder weights",
    "preprocessing": "preprocessing",
    "data": "data",
    "count": "number of images",
    "flips": "flips",
    "dtype": "dtype",
    "shard_size": "shard size",
    "format": "cache format",
}


class Codec(Protocol):
    """What the cache needs of a first stage; latentdiff.autoencoders.codec.LatentCodec has it."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class LatentStatistics:
    """Per-channel moments of the raw latents z = mean + std * noise, each float64 [c].

    mean = E[mean]; variance = Var[mean] + E[std^2] (law of total variance, so no draw is needed);
    posterior_share = E[std^2] / variance: the share that is noise, and the floor it sets under any denoiser.
    """

    mean: Tensor
    std: Tensor
    posterior_share: Tensor


class LatentCache:
    """An opened cache of N images. Shards are memory-mapped: memory in use is bounded by what a batch touches.

    Attributes: manifest, labels (int64 [N] | None), class_names, latent_shape (c, h, w), has_flips.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder, self.manifest = folder, manifest
        self.class_names: list[str] = manifest["class_names"]
        self.latent_shape: tuple[int, int, int] = tuple(manifest["latent_shape"])
        self.has_flips: bool = manifest["identity"]["flips"]
        self._shard_size: int = manifest["identity"]["shard_size"]
        self._count: int = manifest["identity"]["count"]
        self._shards = []
        for number in range(_shard_count(self._count, self._shard_size)):
            path = folder / _shard_name(number)
            problem = _shard_problem(path, manifest["identity"], number)
            if problem:
                raise UserError(f"{path}: {problem}; run the encoding again to replace it")
            self._shards.append(safe_open(path, "pt"))
        self.labels = torch.cat([s.get_tensor("labels") for s in self._shards]) if manifest["labelled"] else None

    def __len__(self) -> int:
        return self._count

    def batch(
        self,
        indices: Tensor | Sequence[int],
        generator: torch.Generator | list[torch.Generator] | None = None,
        flips: Tensor | bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """(z float32 [B, c, h, w], labels int64 [B] | None): raw latents, not normalised.

        generator: one, or one for each sample, to draw z = mean + std * noise; None gives the posterior mean.
        flips: bool or [B]; True takes the encoding of the mirrored image (a UserError where none was cached).
        """
        index = torch.as_tensor(indices, dtype=torch.int64)
        mean, std = self.moments(index, flips)
        z = mean if generator is None else mean + std * randn(mean.shape, generator, mean.device, mean.dtype)
        return z, None if self.labels is None else self.labels[index]

    def moments(self, indices: Tensor | Sequence[int], flips: Tensor | bool = False) -> tuple[Tensor, Tensor]:
        """(mean, std) of the posteriors, float32 [B, c, h, w] each."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < self._count):
            raise IndexError(f"latent index {int(index.min())}..{int(index.max())} outside 0..{self._count - 1}")
        mirrored = torch.as_tensor(flips).expand(len(index))
        if bool(mirrored.any()) and not self.has_flips:
            raise UserError(f"{self.folder}: this cache was built without flips; encode again with flips on")
        mean, std = torch.empty(len(index), *self.latent_shape), torch.empty(len(index), *self.latent_shape)
        shard_of = index // self._shard_size
        for number in shard_of.unique().tolist():
            for side in mirrored[shard_of == number].unique().tolist():
                rows = (shard_of == number) & (mirrored == side)
                local = index[rows] - number * self._shard_size
                # get_tensor is a view into the mapped file: only the rows picked are read from disk
                for name, out in (("mean", mean), ("std", std)):
                    out[rows] = self._shards[number].get_tensor(_key(name, side))[local].float()
        return mean, std

    def statistics(self) -> LatentStatistics:
        """Exact per-channel moments over the whole cache in one streaming pass, mirrored encodings included where cached."""
        count, mean, squares, noise = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())  # float64 [c] once started
        for shard in self._shards:
            for side in (False, True) if self.has_flips else (False,):
                values = shard.get_tensor(_key("mean", side)).double().transpose(0, 1).flatten(1)  # [c, n·h·w]
                stds = shard.get_tensor(_key("std", side)).double().transpose(0, 1).flatten(1)
                # Chan's merge of (count, mean, sum of squared deviations)
                n, total = values.shape[1], count + values.shape[1]
                delta = values.mean(1) - mean
                squares = (
                    squares
                    + (values - values.mean(1, keepdim=True)).square().sum(1)
                    + delta.square() * count * n / total
                )
                mean, noise, count = mean + delta * n / total, noise + stds.square().sum(1), total
        variance = (squares + noise) / count
        return LatentStatistics(mean, variance.sqrt(), noise / count / variance)


def identity(codec: Codec, dataset: ImageDataset) -> dict[str, Any]:
    """What a cache of these latents must have been made of; give it to open_cache as `expect`."""
    return {
        "autoencoder": codec.fingerprint(),
        "preprocessing": dataset.preprocess.describe(),
        "data": dataset.fingerprint(),
    }


def open_cache(folder: str | Path, expect: dict[str, Any] | None = None) -> LatentCache:
    """Opens a finished cache, checks every shard's header, and refuses it where it differs from `expect`.

    expect: any part of what `identity` gives, and flips=True where mirrored encodings are needed.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no finished latent cache here (no manifest.json); build it with: latentdiff encode")
    wanted = dict(expect or {})
    if wanted.get("flips") is False:
        del wanted["flips"]  # a cache that has more than was asked for is fine
    _refuse_difference(folder, manifest["identity"], wanted)
    return LatentCache(folder, manifest)


def build_cache(
    codec: Codec,
    dataset: ImageDataset,
    folder: str | Path,
    flips: bool = False,
    batch: int = 64,
    dtype: str = "float16",
    shard_size: int = 4096,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world: int = 1,
    patience: float = 1800.0,
) -> LatentCache:
    """Encodes the data set into `folder`, going on from whatever finished shards are there, and opens the result.

    Processes 0..world-1 build shards rank, rank + world, … each and need no communication: whichever sees that all
    are there writes the manifest, and the others wait for it, giving up (UserError) when no shard appears for
    `patience` seconds. progress(done, total) counts this process's images, finished ones included. A folder with
    latents of another autoencoder, preprocessing or data is refused, never overwritten.
    """
    if dtype not in DTYPES:
        raise UserError(f"cache dtype '{dtype}': valid are {', '.join(DTYPES)}")
    folder = Path(folder)
    made_of = {
        "format": FORMAT,
        **identity(codec, dataset),
        "count": len(dataset),
        "flips": bool(flips),
        "dtype": dtype,
        "shard_size": shard_size,
    }
    found = _read_manifest(folder)
    _refuse_difference(folder, {} if found is None else found["identity"], made_of)
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(rank, _shard_count(len(dataset), shard_size), world)
    total = sum(len(_shard_rows(len(dataset), shard_size, number)) for number in mine)
    done = 0
    for number in mine:
        path, rows = folder / _shard_name(number), _shard_rows(len(dataset), shard_size, number)
        stored = _stored_identity(path)
        _refuse_difference(path, stored or {}, made_of)
        if _shard_problem(path, made_of, number):
            _write_shard(
                path,
                _encode(
                    codec,
                    dataset,
                    rows,
                    flips,
                    batch,
                    DTYPES[dtype],
                    lambda n, before=done: progress(before + n, total) if progress else None,
                ),
                made_of,
            )
        done += len(rows)
        if progress:
            progress(done, total)
    _finish(folder, dataset, made_of, patience)
    return open_cache(folder, made_of)


def _encode(
    codec: Codec,
    dataset: ImageDataset,
    rows: range,
    flips: bool,
    batch: int,
    dtype: torch.dtype,
    progress: Callable[[int], None],
) -> dict[str, Tensor]:
    pieces: dict[str, list[Tensor]] = {}
    for start in range(rows.start, rows.stop, batch):
        indices = torch.arange(start, min(start + batch, rows.stop))
        for side in (False, True) if flips else (False,):
            images, labels = dataset.batch(indices, flips=side)
            for name, value in zip(("mean", "std"), codec.moments(images), strict=True):
                stored = value.to("cpu", dtype)
                if not torch.isfinite(stored).all():
                    raise UserError(
                        f"latents of images {start}..{int(indices[-1])} are not finite in {dtype}: "
                        "use dtype float32, or check the autoencoder"
                    )
                pieces.setdefault(_key(name, side), []).append(stored)
        if labels is not None:
            pieces.setdefault("labels", []).append(labels)
        progress(int(indices[-1]) + 1 - rows.start)
    return {name: torch.cat(parts) for name, parts in pieces.items()}


def _write_shard(path: Path, tensors: dict[str, Tensor], made_of: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(tensors, temporary, {"identity": json.dumps(made_of, sort_keys=True)})
    _replace(temporary, path)


def _finish(folder: Path, dataset: ImageDataset, made_of: dict[str, Any], patience: float) -> None:
    """Waits until every shard is there, then writes the manifest: the same bytes whichever process does."""
    numbers = range(_shard_count(made_of["count"], made_of["shard_size"]))
    missing, since = None, time.monotonic()
    while True:
        still = [n for n in numbers if _shard_problem(folder / _shard_name(n), made_of, n)]
        if not still:
            break
        if still != missing:
            missing, since = still, time.monotonic()
        elif time.monotonic() - since > patience:
            raise UserError(
                f"{folder}: waited {patience:g} s for {_shard_name(still[0])} (and {len(still) - 1} more) from the other "
                "processes; run the encoding again, it goes on from what is there"
            )
        time.sleep(min(0.5, patience))
    for leftover in folder.glob("shard-*.tmp"):  # of a process that was killed
        leftover.unlink(missing_ok=True)
    with safe_open(folder / _shard_name(0), "pt") as shard:
        latent_shape = list(shard.get_slice("mean").get_shape()[1:])
    manifest = {
        "identity": made_of,
        "identity_sha256": hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest(),
        "shards": len(numbers),
        "latent_shape": latent_shape,
        "labelled": dataset.labels is not None,
        "class_names": dataset.class_names,
        "data": dataset.source.name,
        "unreadable": dataset.source.bad,
    }
    temporary = folder / f"manifest.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    _replace(temporary, folder / "manifest.json")


def _replace(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        manifest["identity"]["count"], manifest["latent_shape"], manifest["labelled"], manifest["class_names"]
        return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not a latent cache's manifest ({error}); delete the folder and encode again"
        ) from error


def _stored_identity(path: Path) -> dict[str, Any] | None:
    """The identity a shard was written with; None where there is no whole shard."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as shard:
            return json.loads((shard.metadata() or {})["identity"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _shard_problem(path: Path, made_of: dict[str, Any], number: int) -> str | None:
    """Why this file is not the shard wanted; None when it is. Opening checks the length, so truncation shows."""
    if not path.is_file():
        return "missing"
    if _stored_identity(path) is None:
        return "truncated or not a shard"
    if _stored_identity(path) != made_of:
        return "of another cache"
    with safe_open(path, "pt") as shard:
        rows = shard.get_slice("mean").get_shape()[0]
    return None if rows == len(_shard_rows(made_of["count"], made_of["shard_size"], number)) else "of the wrong length"


def _refuse_difference(where: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises UserError naming each part in which a cache differs from what is wanted; {} stands for no cache."""
    differing = [key for key in wanted if found and found.get(key) != wanted[key]]
    if not differing:
        return
    said = []
    for key in differing:
        old, new = found.get(key), wanted[key]
        if isinstance(old, dict) and isinstance(new, dict):
            details = ", ".join(f"{k}: {old.get(k)}, now {new.get(k)}" for k in new if old.get(k) != new.get(k))
        else:
            details = f"{str(old)[:12]}, now {str(new)[:12]}"
        said.append(f"{_NAMES.get(key, key)} ({details})")
    raise UserError(
        f"{where}: these latents were made of other {' and other '.join(said)}; use another cache folder or delete it"
    )


def _key(name: str, mirrored: bool) -> str:
    return f"mirrored.{name}" if mirrored else name


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shard_count(count: int, shard_size: int) -> int:
    return -(-count // shard_size)


def _shard_rows(count: int, shard_size: int, number: int) -> range:
    return range(number * shard_size, min(count, (number + 1) * shard_size))
