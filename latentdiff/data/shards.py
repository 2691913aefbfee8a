"""The latent cache's files: shards and a manifest, written whole or not at all, each saying what it was made of.

A cache's identity is a dict: format, autoencoder (hash of weights and config), preprocessing (its settings), data
(hash), count, flips, dtype, shard_size. It lies in the manifest and in every shard's header.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentdiff.errors import UserError

Identity = dict[str, Any]
# How a refusal speaks of the parts of an identity, and of where else the files may lie, by what the files hold
_MOMENT_DTYPES = ("F16", "F32")
_SPOKEN = {
    "latents": {
        "autoencoder": "autoencoder weights",
        "count": "number of images",
        "shard_size": "shard size",
        "split": "way of choosing held-out images, data.held_out_rule",
    },
    "caption states": {"length": "condition.text.max_length", "count": "number of captions", "shard_size": "shard size"},
}
_ELSEWHERE = {"latents": "cache folder", "caption states": "condition.text.folder"}


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


def write_shard(path: Path, tensors: dict[str, Tensor], made_of: Identity, unreadable: Mapping[str, str] | None = None) -> None:
    """unreadable: {file: reason} of the images that this process found to be so by now."""
    temporary = path.with_suffix(f".{uuid4().hex}.tmp")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # a channels-last network gives others
    said = {"unreadable": json.dumps(dict(unreadable), sort_keys=True)} if unreadable else {}
    save_file(tensors, temporary, {"identity": json.dumps(made_of, sort_keys=True), **said})
    _replace(temporary, path)


def stored_unreadable(path: Path) -> dict[str, str]:
    """{file: reason} of what whoever wrote a shard could not read."""
    with safe_open(path, "pt") as shard:
        text = (shard.metadata() or {}).get("unreadable", "{}")
    try:
        return {str(file): str(reason) for file, reason in json.loads(text).items()}
    except (ValueError, AttributeError, RecursionError):
        return {}


def stored_identity(path: Path) -> Identity | None:
    """What a shard was made of; None where there is no whole shard (opening checks the length: truncation shows)."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as shard:
            found = json.loads((shard.metadata() or {})["identity"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def tensor_shapes(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{name: (safetensors' dtype, shape)} of a shard, from its header."""
    with safe_open(path, "pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.keys()}
        return {name: (each.get_dtype(), tuple(each.get_shape())) for name, each in slices.items()}


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
    held = tensor_shapes(path)
    sides = (False, True) if made_of["flips"] else (False,)
    moments = [held.get(tensor_name(name, side)) for side in sides for name in ("mean", "std")]
    if moments[0] is None or len(moments[0][1]) != 4 or moments[0][0] not in _MOMENT_DTYPES or len(set(moments)) != 1:
        return "without mean and std of one shape"
    rows = {moments[0][1][0]} | ({held["labels"][1]} if "labels" in held else set())
    rows = {row[0] if isinstance(row, tuple) and len(row) == 1 else row for row in rows}
    if rows != {len(shard_rows(made_of, number))} or held.get("labels", ("I64",))[0] != "I64":
        return "of the wrong length"
    return None


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
    temporary = folder / f"manifest.{uuid4().hex}.tmp"
    temporary.write_text(json.dumps(manifest, indent=1))
    _replace(temporary, folder / "manifest.json")


def refuse_difference(where: Path, found: Identity, wanted: Identity, held: str = "latents") -> None:
    """Raises UserError that names each part in which a cache differs from what is wanted. held: what lies in it."""
    said = []
    for part in (part for part in wanted if found.get(part) != wanted[part]):
        old, new = found.get(part), wanted[part]
        if isinstance(old, dict) and isinstance(new, dict):
            details = ", ".join(f"{k} {old.get(k)}, now {new[k]}" for k in new if old.get(k) != new[k])
        else:
            details = f"{str(old)[:12]}, now {str(new)[:12]}"
        said.append(f"{_SPOKEN[held].get(part, part)} ({details})")
    if said:
        raise UserError(
            f"{where}: these {held} were made with other {' and other '.join(said)}; "
            f"use another {_ELSEWHERE[held]}, or delete this one"
        )


def _replace(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as stream:
        os.fsync(stream.fileno())
    os.replace(temporary, path)
