"""The latent cache's files: shards and a manifest, written whole or not at all, each saying what it was made of.

A cache's identity is a dict: format, autoencoder (hash of weights and config), preprocessing (its settings), data
(hash), count, flips, dtype, shard_size. It lies in the manifest and in every shard's header.
"""

import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import UserError

Identity = dict[str, Any]
_SPOKEN = {"autoencoder": "autoencoder weights", "count": "number of images", "shard_size": "shard size"}


def tensor_name(name: str, mirrored: bool) -> str:
    return f"mirrored.{name}" if mirrored else name


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def shard_count(made_of: Identity) -> int:
    return -(-made_of["count"] // made_of["shard_size"])


def shard_rows(made_of: Identity, number: int) -> range:
    """Which images of the data set lie in a shard."""
    size = made_of["shard_size"]
    return range(number * size, min(made_of["count"], (number + 1) * size))


def write_shard(path: Path, tensors: dict[str, Tensor], made_of: Identity) -> None:
    temporary = path.with_suffix(f".{uuid4().hex}.tmp")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # a channels-last network gives others
    save_file(tensors, temporary, {"identity": json.dumps(made_of, sort_keys=True)})
    _replace(temporary, path)


def stored_identity(path: Path) -> Identity | None:
    """What a shard was made of; None where there is no whole shard (opening checks the length: truncation shows)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as shard:
            return json.loads((shard.metadata() or {})["identity"])
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def shard_problem(folder: Path, made_of: Identity, number: int) -> str | None:
    """Why a file is not the shard wanted; None when it is."""
    path = shard_path(folder, number)
    if not path.is_file():
        return "missing"
    stored = stored_identity(path)
    if stored is None:
        return "truncated, or not a shard of latents"
    if stored != made_of:
        return "of another cache"
    with safe_open(path, "pt") as shard:
        rows = shard.get_slice("mean").get_shape()[0]
    return None if rows == len(shard_rows(made_of, number)) else "of the wrong length"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished cache; None where there is none. UserError where it is not a manifest."""
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text())
        missing = {"identity", "latent_shape", "labelled", "class_names"} - set(manifest)
        if missing:
            raise ValueError(f"no {sorted(missing)[0]}")
        return manifest
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not the manifest of a latent cache ({error}); delete the folder and encode again") from error


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f"manifest.{uuid4().hex}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    _replace(temporary, folder / "manifest.json")


def refuse_difference(where: Path, found: Identity, wanted: Identity) -> None:
    """Raises UserError that names each part in which a cache differs from what is wanted."""
    said = []
    for part in (part for part in wanted if found.get(part) != wanted[part]):
        old, new = found.get(part), wanted[part]
        if isinstance(old, dict) and isinstance(new, dict):
            details = ", ".join(f"{k} {old.get(k)}, now {new[k]}" for k in new if old.get(k) != new[k])
        else:
            details = f"{str(old)[:12]}, now {str(new)[:12]}"
        said.append(f"{_SPOKEN.get(part, part)} ({details})")
    if said:
        raise UserError(
            f"{where}: these latents were made with other {' and other '.join(said)}; "
            "use another cache folder, or delete this one"
        )


def _replace(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
