"""Shards of tensors on disk, and the manifest of a latent cache: each file written whole, and saying what it was made of.

Latents (`latentdiff.data.latent_cache`) and the states of captions (`latentdiff.data.captions`) lie in such shards. What a
folder of shards was made of is its identity, a dict. That of a latent cache has format, autoencoder (hash of weights and
config), preprocessing (its settings), data (hash), count, flips, dtype and shard_size. It lies in the manifest and in the
header of every shard.

A shard's header also has the sha256 of its tensors, and the manifest repeats that of every shard. They show damage by
copying and on disk. They do not protect from somebody who changes both.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import UserError
from latentdiff.utils import atomic, locks, signals

Identity = dict[str, Any]
# What messages call the parts of an identity, and the setting that names another folder, by what shards hold
_PART_NAMES = {
    "latents": {
        "autoencoder": "autoencoder weights",
        "count": "number of images",
        "shard_size": "shard size",
        "split": "way of choosing held-out images, data.held_out_rule",
        "copies": "data.copies, data.shift or data.zoom",
        "moments": "content",
    },
    "caption states": {"length": "condition.text.max_length", "count": "number of captions", "shard_size": "shard size"},
}
_FOLDER_NAMES = {"latents": "cache folder", "caption states": "condition.text.folder"}
_IN_USE = "wait for it to end, or use another folder"


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_count(made_of: Identity) -> int:
    return -(-made_of["count"] // made_of["shard_size"])


def shard_rows(made_of: Identity, number: int) -> range:
    """Which rows (images, or captions) lie in a shard."""
    size = made_of["shard_size"]
    return range(number * size, min(made_of["count"], (number + 1) * size))


def write_shard(path: Path, tensors: dict[str, Tensor], made_of: Identity, unreadable: Mapping[str, str] | None = None) -> None:
    """Write one shard, whole or not at all. unreadable: {file: reason} of the images that this process could not read."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # those of a channels-last network are not
    facts = {"identity": made_of, "sha256": content_sha256(tensors), "unreadable": dict(unreadable or {})}
    with atomic.new_file(path) as temporary:
        # One entry, as safetensors writes several in an order that differs from process to process
        save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)})


def make_shards(
    folder: Path,
    made_of: Identity,
    numbers: range,
    content: str,
    is_missing: Callable[[int], bool],
    encode: Callable[[range], dict[str, Tensor]],
    batch: int,
    progress: Callable[[int, int], None] | None,
    unreadable: Mapping[str, str],
) -> None:
    """Make those of these shards that are missing. A signal ends the work after a shard.

    content: "latents" or "caption states", for messages. encode: the tensors of some rows, `batch` of them at most.
    progress(done, total) counts the rows of all these shards, and is called only when there is something to encode.
    unreadable: as `write_shard` takes it, filled while rows are encoded. UserError where a shard is of another identity.
    """
    total, done, worked = sum(len(shard_rows(made_of, number)) for number in numbers), 0, False
    with signals.watched() as watch, watch.deferred():
        for number in numbers:
            path, rows = shard_path(folder, number), shard_rows(made_of, number)
            stored = stored_identity(path)
            if stored is not None:
                refuse_difference(path, stored, made_of, content)
            if is_missing(number):
                pieces, worked = [], True
                for start in range(rows.start, rows.stop, batch):
                    part = range(start, min(start + batch, rows.stop))
                    pieces.append(encode(part))
                    if progress:
                        progress(done + part.stop - rows.start, total)
                # Of pieces of two types the wider one is kept
                tensors = {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
                write_shard(path, tensors, made_of, unreadable)
                if watch:
                    watch.stop()
            done += len(rows)
            if progress and worked:
                progress(done, total)


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hex sha256 of tensors on the CPU: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_content(path: Path, advice: str, recorded: str | None = None) -> str:
    """Read a shard once, about two seconds a gigabyte on a slow core, and return the sha256 of its tensors.

    recorded: the sha256 in the manifest; None: the one in the shard's own header, if any (earlier versions wrote none).
    UserError where the tensors have another: the line names the shard and ends with `advice`.
    """
    with safe_open(path, "pt") as shard:
        recorded = recorded or _facts(shard).get("sha256")
        current = content_sha256({name: shard.get_tensor(name) for name in shard.keys()})
    if recorded not in (None, current):
        raise UserError(
            f"{path}: its content has sha256 {current[:12]}, and was written with {recorded[:12]}: damaged, or changed since; "
            f"delete this file, and {advice}"
        )
    return current


@contextlib.contextmanager
def building(folder: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Hold a folder of shards while they are made, and remove what killed jobs left there.

    A job that makes all shards has the folder to itself. Part `rank` of `world` shares it with the other parts, which may be
    processes of one launch, or jobs that never meet. UserError where another job has the folder, or has this part of it.
    """
    if world == 1:
        with locks.locked(folder, _IN_USE, alone=True):
            _sweep(folder)
            yield
        return
    part = folder / f"part-{rank + 1}-of-{world}"
    sweep_if_free(folder)
    with (
        locks.locked(folder, _IN_USE, shared=True, alone=True),
        locks.locked(part, _IN_USE, beside=True, alone=True),
    ):
        yield
    sweep_if_free(folder)


def sweep_if_free(folder: Path) -> None:
    """Remove what killed jobs left in a folder of shards, unless a job is at work there or nothing may be written."""
    # A part cannot tell what another part is writing from what a killed one left. A job that is alone can
    if folder.is_dir() and any(path.name.startswith(".") or path.suffix == ".tmp" for path in folder.iterdir()):
        with contextlib.suppress(UserError), locks.locked(folder, alone=True):
            _sweep(folder)


def _sweep(folder: Path) -> None:
    atomic.sweep(folder)
    for pattern in ("shard-*.tmp", "manifest.*.tmp"):  # names that earlier versions gave to temporary files
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _facts(shard: Any) -> dict[str, Any]:
    """What an open shard's header has: identity, sha256 and unreadable. Earlier versions had two entries and no sha256.

    ValueError, KeyError or RecursionError where it has nothing of the kind.
    """
    header = shard.metadata() or {}
    if "facts" not in header:
        return {"identity": json.loads(header["identity"]), "unreadable": json.loads(header.get("unreadable", "{}"))}
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict) or not isinstance(facts["sha256"], str):
        raise ValueError("facts must be a mapping with a text sha256")
    return facts


def stored_unreadable(path: Path) -> dict[str, str]:
    """{file: reason} of the images that the process which wrote a shard could not read."""
    try:
        with safe_open(path, "pt") as shard:
            return {str(file): str(reason) for file, reason in _facts(shard)["unreadable"].items()}
    except (ValueError, KeyError, AttributeError, RecursionError):
        return {}


def stored_identity(path: Path) -> Identity | None:
    """What a shard was made of; None where there is no whole shard (opening checks the length: truncation shows)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as shard:
            identity = _facts(shard)["identity"]
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return None
    return identity if isinstance(identity, dict) else None


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (dtype as safetensors spells it, shape)} of a shard, from its header."""
    with safe_open(path, "pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished cache; None where there is none. UserError where it is not a manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not isinstance(manifest, dict):
            raise ValueError(f"a {type(manifest).__name__}")
        made_of = manifest.get("identity")
        made_of = made_of if isinstance(made_of, dict) else {}
        right = {
            "identity": all(_counts(made_of.get(key)) for key in ("count", "shard_size"))
            and isinstance(made_of.get("flips"), bool),
            "latent_shape": _list_of(manifest.get("latent_shape"), _counts) and len(manifest["latent_shape"]) == 3,
            "labelled": isinstance(manifest.get("labelled"), bool),
            "class_names": _list_of(manifest.get("class_names"), lambda name: isinstance(name, str)),
        }
        hashes = manifest.get("sha256")  # None: of an earlier version, which wrote none
        if right["identity"] and hashes is not None:
            # null: a shard that is being made again
            texts = _list_of(hashes, lambda value: value is None or isinstance(value, str))
            right["sha256"] = texts and len(hashes) == shard_count(made_of)
        wrong = [key for key, good in right.items() if not good]
        if wrong:
            raise ValueError(f"no {wrong[0]}" if wrong[0] not in manifest else f"{wrong[0]} is wrong")
        return manifest
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not the manifest of a latent cache ({error}); delete the folder and encode again") from error


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _list_of(values: Any, good: Callable[[Any], bool]) -> bool:
    return isinstance(values, list) and all(good(value) for value in values)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    atomic.write_json(folder / "manifest.json", manifest)


def refuse_difference(where: Path, stored: Identity, expected: Identity, content: str = "latents") -> None:
    """UserError that names each part in which the stored identity differs from the expected one. content: as `make_shards`."""
    differences = []
    for part, new in expected.items():
        old = stored.get(part)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            details = ", ".join(f"{k} {old.get(k)}, now {new[k]}" for k in new if old.get(k) != new[k])
        else:
            details = f"{str(old)[:12]}, now {str(new)[:12]}"
        differences.append(f"{_PART_NAMES[content].get(part, part)} ({details})")
    if differences:
        raise UserError(
            f"{where}: these {content} were made with other {' and other '.join(differences)}; "
            f"use another {_FOLDER_NAMES[content]}, or delete this one"
        )
