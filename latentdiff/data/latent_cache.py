"""The latent cache: posterior moments of a frozen autoencoder over a data set, on disk, read through memory maps.

The mean and standard deviation are kept, not draws: each epoch takes fresh latents mean + std * noise, so no noise is
frozen into the data. Mirrored images are encoded apart, because an encoder does not commute with mirroring. A cache that
was made of another autoencoder, preprocessing, data or copies is refused.

    manifest.json                written last: if it is there, all shards are; it has the sha256 of each
    shard-00000.safetensors      mean, std [n, c, h, w]; mirrored.mean, mirrored.std where flips were cached; labels [n]

A cache of condition images (`latentdiff.data.condition_images`) has means alone: their std is 0. A cache of codes, of an
autoencoder with a codebook, has code indices in their place: codes, mirrored.codes [n, L, h, w], int32.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from latentdiff.data.condition_images import ConditionImages
from latentdiff.data.copies import ONCE
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.tensor_shards import (
    Identity,
    building,
    check_content,
    make_shards,
    read_manifest,
    refuse_difference,
    shard_count,
    shard_path,
    shard_rows,
    stored_identity,
    stored_unreadable,
    sweep_if_free,
    tensor_shapes,
    write_manifest,
)
from latentdiff.errors import UserError
from latentdiff.utils import processes
from latentdiff.utils.random import Generators, randn

FORMAT = 2  # in 1 the decoder and the normaliser were part of the autoencoder's fingerprint
REMAKE = "run `latentdiff encode` again, which makes only this one anew"
Dataset = ImageDataset | ConditionImages  # what can be cached
DTYPES = {"float16": torch.float16, "float32": torch.float32, "int32": torch.int32}
_SAFETENSORS_DTYPES = ("F16", "F32", "I32")
BOTH = ("mean", "std")  # the moments in a shard, where its identity does not name them
CODES = ["codes"]  # what is in a shard of codes, as its identity names it
CODES_DTYPE = "int32"


class Codec(Protocol):
    """What the cache needs of an autoencoder; `latentdiff.models.codec.LatentCodec` has it."""

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def codes(self, images: Tensor) -> Tensor: ...

    def fingerprint(self, latents_only: bool = False) -> str: ...


@dataclass(frozen=True)
class LatentMoments:
    """Per-channel moments of the raw latents z = mean + std * noise, each float64 [c].

    mean = E[mean]; variance = Var[mean] + E[std^2] (law of total variance, so no draw is needed);
    posterior_share = E[std^2] / variance: the share of the variance that is noise.
    """

    mean: Tensor
    std: Tensor
    posterior_share: Tensor


class LatentCache:
    """An opened cache of N images. Shards are memory-mapped: memory in use is bounded by what a batch touches.

    Attributes: manifest, labels (int64 [N] | None), class_names, latent_shape (c, h, w; of codes L, h, w), has_flips,
    holds_codes.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        made_of: Identity = manifest["identity"]
        self.folder, self.manifest = folder, manifest
        self.class_names: list[str] = manifest["class_names"]
        self.latent_shape: tuple[int, ...] = tuple(manifest["latent_shape"])
        self.has_flips: bool = made_of["flips"]
        self._moments = made_of.get("moments", BOTH)
        self.holds_codes = self._moments == CODES
        self._count, self._shard_size = int(made_of["count"]), int(made_of["shard_size"])
        self._shards = []
        self._views: dict[tuple[int, str], Tensor] = {}
        for number in range(shard_count(made_of)):
            problem = _shard_problem(folder, made_of, number)
            if problem:
                raise UserError(f"{shard_path(folder, number)}: {problem}; run the encoding again to replace it")
            self._shards.append(safe_open(shard_path(folder, number), "pt"))
            self._check_shard(shard_path(folder, number))
        self.labels = torch.cat([s.get_tensor("labels") for s in self._shards]) if manifest["labelled"] else None
        if self.labels is not None and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise UserError(f"{folder}: labels outside the {len(self.class_names)} classes of manifest.json; encode again")

    def _check_shard(self, path: Path) -> None:
        """UserError where a whole shard is not what the manifest says."""
        shapes = tensor_shapes(path)
        shape = shapes[self._moments[0]][1][1:]
        if shape != self.latent_shape:
            content = f"latents {list(shape)}, where manifest.json says {list(self.latent_shape)}"
        elif self.manifest["labelled"] and "labels" not in shapes:
            content = "no labels, where manifest.json says there are"
        else:
            return
        raise UserError(f"{path}: holds {content}; delete the folder and encode again")

    def __len__(self) -> int:
        return self._count

    def batch(
        self, indices: Tensor | Sequence[int], generator: Generators = None, flips: Tensor | bool = False
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
        """(mean, std) of the posteriors, float32 [B, c, h, w] each. IndexError outside 0..N-1."""
        found = self._read(indices, flips)
        mean = found["mean"].float()
        return mean, found["std"].float() if "std" in found else torch.zeros_like(mean)

    def codes(self, indices: Tensor | Sequence[int], flips: Tensor | bool = False) -> Tensor:
        """Code indices of a cache of codes, int64 [B, L, h, w]. IndexError outside 0..N-1."""
        return self._read(indices, flips)["codes"].long()

    def _read(self, indices: Tensor | Sequence[int], flips: Tensor | bool) -> dict[str, Tensor]:
        """Rows of each tensor in the shards, [B, c, h, w], in the type on disk. Errors as in `moments`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        if len(index) and not (0 <= int(index.min()) and int(index.max()) < self._count):
            raise IndexError(f"latent index {int(index.min())}..{int(index.max())} outside 0..{self._count - 1}")
        mirrored = torch.as_tensor(flips).expand(len(index))
        if bool(mirrored.any()) and not self.has_flips:
            raise UserError(f"{self.folder}: this cache was built without flips; encode again with flips on")
        dtype = DTYPES[self.manifest["identity"]["dtype"]]
        found = {name: torch.zeros(len(index), *self.latent_shape, dtype=dtype) for name in self._moments}
        shard_of = index // self._shard_size
        for number in shard_of.unique().tolist():
            for side in mirrored[shard_of == number].unique().tolist():
                rows = (shard_of == number) & (mirrored == side)
                local = index[rows] - number * self._shard_size
                for name, values in found.items():
                    values[rows] = self._view(number, _tensor_name(name, side))[local]
        return found

    def _view(self, number: int, name: str) -> Tensor:
        """A tensor of a shard as a view into the mapped file: only the pages of the rows picked are read from disk."""
        if (number, name) not in self._views:
            self._views[number, name] = self._shards[number].get_tensor(name)
        return self._views[number, name]

    def _flat(self, shard: Any, name: str, mirrored: bool) -> Tensor:
        """One of the moments of a shard, float64 [c, n·h·w]."""
        if name not in self._moments:
            return torch.zeros_like(self._flat(shard, "mean", mirrored))
        return shard.get_tensor(_tensor_name(name, mirrored)).double().transpose(0, 1).flatten(1)

    def code_counts(self, num_codes: int) -> Tensor:
        """How often each code stands in a cache of codes, mirrored encodings included: int64 [L, num_codes]."""
        counts = torch.zeros(self.latent_shape[0], num_codes, dtype=torch.int64)
        for shard in self._shards:
            for side in (False, True) if self.has_flips else (False,):
                codes = shard.get_tensor(_tensor_name("codes", side)).transpose(0, 1).flatten(1)  # [L, n·h·w]
                counts += torch.stack([torch.bincount(level, minlength=num_codes) for level in codes])
        return counts

    def statistics(self) -> LatentMoments:
        """Exact per-channel moments over the whole cache in one streaming pass, mirrored encodings included."""
        count = 0
        mean, squares, noise = torch.zeros(3, self.latent_shape[0], 1, dtype=torch.float64)
        for shard in self._shards:
            for side in (False, True) if self.has_flips else (False,):
                values, stds = (self._flat(shard, name, side) for name in BOTH)
                n, centre = values.shape[1], values.mean(1, keepdim=True)
                # Chan's merge of two (count, mean, sum of squared deviations)
                squares = squares + (values - centre).square().sum(1, keepdim=True)
                squares = squares + (centre - mean).square() * (count * n / (count + n))
                mean = mean + (centre - mean) * (n / (count + n))
                noise = noise + stds.square().sum(1, keepdim=True)
                count += n
        variance = (squares + noise)[:, 0] / count
        return LatentMoments(mean[:, 0], variance.sqrt(), noise[:, 0] / count / variance)


def identity(codec: Codec, dataset: Dataset, codes: bool = False) -> Identity:
    """The parts of a cache's identity that decide its latents; give it to open_cache as `expect`.

    codes: of a cache of codes.
    """
    made_of = {
        "autoencoder": codec.fingerprint(latents_only=True),
        "preprocessing": dataset.preprocess.describe(),
        "data": dataset.latents_fingerprint(),
    }
    # Earlier versions wrote neither of these
    made_of |= {"split": dataset.split} if dataset.split else {}
    made_of |= {"moments": ["mean"]} if dataset.means_only else {"moments": CODES} if codes else {}
    return made_of | ({"copies": dataset.copies.describe()} if dataset.copies.count > 1 else {})


def _refuse_other(folder: Path, stored: Identity, expected: Identity) -> None:
    """UserError where a cache's identity differs from the expected one. One that says nothing of copies has none."""
    plain = {"copies": ONCE.describe(), "moments": list(BOTH)}
    refuse_difference(folder, plain | stored, (plain if "data" in expected else {}) | expected)


def open_cache(
    folder: str | Path, expect: Identity | None = None, check: str = "full", rank: int = 0, world: int = 1
) -> LatentCache:
    """Opens a finished cache, checks its shards, and refuses it where it differs from `expect`.

    expect: any part of what `identity` returns, and flips=True where mirrored encodings are needed.
    check: "full" compares every shard with its sha256, which takes about two seconds a gigabyte on a slow core; "size"
    looks at headers and lengths alone. Each of `world` processes checks its share. A cache of an earlier version has no
    hashes: a warning is printed, once. UserError: there is no finished cache, it is damaged, or it differs from `expect`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder}: no finished latent cache here (no manifest.json); build it with: latentdiff encode")
    expected = dict(expect or {})
    if expected.get("flips") is False:
        del expected["flips"]  # a cache that also has mirrored encodings is fine
    _refuse_other(folder, manifest["identity"], expected)
    cache = LatentCache(folder, manifest)
    if check == "full":
        _check_hashes(folder, manifest, rank, world)
    return cache


_warned: set[Path] = set()


def _check_hashes(folder: Path, manifest: dict[str, Any], rank: int, world: int) -> None:
    hashes = manifest.get("sha256")
    if hashes is None:
        if folder.absolute() not in _warned and processes.rank() == 0:
            _warned.add(folder.absolute())
            text = "has no hashes, as an earlier version wrote it; only lengths are checked"
            print(f"warning: {folder}: {text}", file=sys.stderr)
        return
    for number in range(rank, len(hashes), world):
        check_content(shard_path(folder, number), REMAKE, hashes[number])


def build_cache(
    codec: Codec,
    dataset: Dataset,
    folder: str | Path,
    flips: bool = False,
    batch: int = 64,
    dtype: str = "float16",
    shard_size: int = 4096,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world: int = 1,
    patience: float = 1800.0,
    check: str = "full",
    codes: bool = False,
) -> LatentCache:
    """Encodes the data set into `folder`, which may have finished shards already, and opens the result.

    flips: whether mirrored images are encoded too. batch: images encoded at a time. dtype: "float16" or "float32", of the
    moments on disk. shard_size: images in a shard. check: as in `open_cache`. codes: keep code indices in their place.

    Process `rank` of `world` builds shards rank, rank + world, … and needs no communication with the others: whichever sees
    that all are there writes the manifest. The others wait, and give up (UserError) when no shard appears for `patience`
    seconds. progress(done, total) counts this process's images, finished ones included, and is called only when there is
    something to encode. A signal ends the work after a shard, as `latentdiff.utils.signals` says.

    UserError: the folder has latents of another autoencoder, preprocessing or data (nothing is overwritten); another job
    encodes there; or latents are not finite. Any number of jobs may open a finished cache.
    """
    folder = Path(folder)
    made_of = _identity_here(codec, dataset, folder, flips, dtype, shard_size, codes)
    if not _is_finished(folder, made_of):
        with building(folder, rank, world):
            _build_shards(codec, dataset, folder, made_of, batch, progress, rank, world)
            _wait_for_shards(folder, made_of, patience)
            _finish(dataset, folder, made_of)
    else:
        sweep_if_free(folder)
    return open_cache(folder, made_of, check, rank, world)


def build_part(
    codec: Codec,
    dataset: Dataset,
    folder: str | Path,
    flips: bool = False,
    batch: int = 64,
    dtype: str = "float16",
    shard_size: int = 4096,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world: int = 1,
    codes: bool = False,
) -> list[int]:
    """Builds shards rank, rank + world, … of a cache without waiting for the others; returns the numbers of missing shards.

    For jobs that run at different times, or on machines that share the folder alone. A job that finds none missing marks
    the cache as finished. Arguments and errors as `build_cache`.
    """
    folder = Path(folder)
    made_of = _identity_here(codec, dataset, folder, flips, dtype, shard_size, codes)
    with building(folder, rank, world):
        _build_shards(codec, dataset, folder, made_of, batch, progress, rank, world)
        missing = _missing_shards(folder, made_of)
        if not missing:
            _finish(dataset, folder, made_of)
    return missing


def _identity_here(
    codec: Codec, dataset: Dataset, folder: Path, flips: bool, dtype: str, shard_size: int, codes: bool
) -> Identity:
    """The identity of the cache that a folder shall have; UserError where it has another one."""
    dtype = CODES_DTYPE if codes else dtype
    if dtype not in DTYPES:
        raise UserError(f"cache dtype '{dtype}': valid are {', '.join(DTYPES)}")
    expected = {"format": FORMAT, **identity(codec, dataset, codes), "count": len(dataset)}
    manifest = read_manifest(folder)
    if manifest is None:
        return {**expected, "flips": bool(flips), "dtype": dtype, "shard_size": shard_size}
    # A finished cache serves whatever its dtype and shard size; damaged shards of it are made again in its own way
    _refuse_other(folder, manifest["identity"], {**expected, "flips": True} if flips else expected)
    return manifest["identity"]


def _is_finished(folder: Path, made_of: Identity) -> bool:
    manifest = read_manifest(folder)
    return manifest is not None and None not in manifest.get("sha256", ()) and not _missing_shards(folder, made_of)


def _build_shards(
    codec: Codec,
    dataset: Dataset,
    folder: Path,
    made_of: Identity,
    batch: int,
    progress: Callable[[int, int], None] | None,
    rank: int,
    world: int,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _forget_hashes(folder, _missing_shards(folder, made_of))
    make_shards(
        folder,
        made_of,
        range(rank, shard_count(made_of), world),
        "latents",
        lambda number: _shard_problem(folder, made_of, number) is not None,
        lambda rows: _encode(codec, dataset, torch.arange(rows.start, rows.stop), made_of),
        batch,
        progress,
        dataset.source.bad,
    )


def _forget_hashes(folder: Path, missing: list[int]) -> None:
    """Removes from a finished cache's manifest the hashes of missing shards: those made again may have other bytes.

    `missing` is listed before the manifest is read. So where several processes do this at once, the last one to write also
    names the shards that the others name and have not made yet.
    """
    manifest = read_manifest(folder)
    if manifest is not None and "sha256" in manifest and any(manifest["sha256"][number] is not None for number in missing):
        for number in missing:
            manifest["sha256"][number] = None
        write_manifest(folder, manifest)


def _missing_shards(folder: Path, made_of: Identity) -> list[int]:
    """Numbers of the shards that are not there, or not whole."""
    return [n for n in range(shard_count(made_of)) if _shard_problem(folder, made_of, n)]


def _finish(dataset: Dataset, folder: Path, made_of: Identity) -> None:
    """Mark a cache whose shards are all there as finished, by its manifest: the same bytes from every process."""
    manifest = read_manifest(folder)
    if manifest is None:
        manifest = _manifest(folder, dataset, made_of)
    elif None not in manifest.get("sha256", ()):
        return
    hashes = manifest["sha256"]
    for number in range(len(hashes)):
        if hashes[number] is None:
            hashes[number] = check_content(shard_path(folder, number), REMAKE)
    write_manifest(folder, manifest)


def _encode(codec: Codec, dataset: Dataset, indices: Tensor, made_of: Identity) -> dict[str, Tensor]:
    """The rows of a shard for one batch of images, on the CPU."""
    rows: dict[str, Tensor] = {}
    dtype = DTYPES[made_of["dtype"]]
    for side in (False, True) if made_of["flips"] else (False,):
        images, labels = dataset.batch(indices, flips=side)
        names = made_of.get("moments", BOTH)
        found = {"codes": codec.codes(images)} if names == CODES else dict(zip(BOTH, codec.moments(images), strict=True))
        for name, value in found.items():
            if name not in names:
                continue
            rows[_tensor_name(name, side)] = value.to("cpu", dtype)
            if not torch.isfinite(rows[_tensor_name(name, side)]).all():
                raise UserError(
                    f"latents of images {int(indices[0])} to {int(indices[-1])} are not finite as {dtype}: "
                    "use dtype float32, or check the autoencoder"
                )
        if labels is not None:
            rows["labels"] = labels
    return rows


def _wait_for_shards(folder: Path, made_of: Identity, patience: float) -> None:
    """Returns when every shard is there, whichever process made it. UserError when none was made for `patience` seconds."""
    count, since = -1, time.monotonic()
    while missing := _missing_shards(folder, made_of):
        if len(missing) != count:
            count, since = len(missing), time.monotonic()
        elif time.monotonic() - since > patience:
            raise UserError(
                f"{folder}: waited {patience:g} s for other processes, and {shard_path(folder, missing[0]).name} and "
                f"{count - 1} more are not there; run the encoding again, it goes on from what is"
            )
        time.sleep(min(0.5, patience))


def _manifest(folder: Path, dataset: Dataset, made_of: Identity) -> dict[str, Any]:
    with safe_open(shard_path(folder, 0), "pt") as shard:
        latent_shape = list(shard.get_slice(made_of.get("moments", BOTH)[0]).get_shape()[1:])
    # Each process knows what it could not read itself
    bad = dict(dataset.source.bad)
    for number in range(shard_count(made_of)):
        bad |= stored_unreadable(shard_path(folder, number))
    return {
        "identity": made_of,
        "latent_shape": latent_shape,
        "labelled": dataset.labels is not None,
        "class_names": dataset.class_names,
        "source": dataset.source.name,
        "unreadable": dict(sorted(bad.items())),
        "sha256": [None] * shard_count(made_of),
    }


def _tensor_name(name: str, mirrored: bool) -> str:
    return f"mirrored.{name}" if mirrored else name


def _shard_problem(folder: Path, made_of: Identity, number: int) -> str | None:
    """Why a file is not the shard of latents that belongs there; None where it is."""
    path = shard_path(folder, number)
    if not path.is_file():
        return "missing"
    stored = stored_identity(path)
    if stored is None:
        return "truncated, or not a shard of latents"
    if stored != made_of:
        return "of another cache"
    shapes = tensor_shapes(path)
    sides = (False, True) if made_of["flips"] else (False,)
    moments = [shapes.get(_tensor_name(name, side)) for side in sides for name in made_of.get("moments", BOTH)]
    first = moments[0]
    if first is None or len(first[1]) != 4 or first[0] not in _SAFETENSORS_DTYPES or len(set(moments)) != 1:
        return f"without {' and '.join(made_of.get('moments', BOTH))} of one shape"
    count = len(shard_rows(made_of, number))
    if first[1][0] != count or shapes.get("labels", ("I64", (count,))) != ("I64", (count,)):
        return "of the wrong length"
    return None
