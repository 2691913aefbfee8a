"""The latent cache's files: shards and a manifest, written whole or not at all, each saying what it was made of.

A cache's identity is a dict: format, autoencoder (hash of weights and config), preprocessing (its settings), data
(hash), count, flips, dtype, shard_size. It lies in the manifest and in every shard's header.

A shard's header also has the sha256 of its tensors, written with it; the manifest repeats that of every shard. They show
damage in copying and on disk. They are no protection from somebody who changes both.
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
from latentdiff.utils import atomic, locks

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
_IN_USE = "wait for it to end, or use another folder"


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
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # a channels-last network gives others
    facts = {"identity": made_of, "sha256": content_sha256(tensors), "unreadable": dict(unreadable or {})}
    with atomic.new_file(path) as temporary:
        # One entry, as safetensors writes several in an order that differs from process to process
        save_file(tensors, temporary, {"facts": json.dumps(facts, sort_keys=True)})


def content_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The hex sha256 of tensors on the CPU: their names, types, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_content(path: Path, way_out: str, recorded: str | None = None) -> str:
    """Read a shard once, about two seconds a gigabyte on a slow core, and return the sha256 of its tensors.

    recorded: what the manifest says it is; None: what the shard's own header says, if anything (earlier versions wrote none).
    UserError where it is another: the line names the shard and ends with `way_out`.
    """
    with safe_open(path, "pt") as shard:
        recorded = recorded or _facts(shard).get("sha256")
        current = content_sha256({name: shard.get_tensor(name) for name in shard.keys()})
    if recorded not in (None, current):
        raise UserError(
            f"{path}: its content has sha256 {current[:12]}, and was written with {recorded[:12]}: damaged, or changed since; "
            f"delete this file, and {way_out}"
        )
    return current


@contextlib.contextmanager
def building(folder: Path, rank: int = 0, world: int = 1) -> Iterator[None]:
    """Hold a folder of shards while they are made, and remove what killed jobs left there.

    A job of its own has the folder to itself. Part `rank` of `world` has it beside the other parts, which may be processes
    of one launch or jobs that never meet. UserError where another job has the folder, or has this part of it.
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
    # A part cannot tell what another part is writing from what a killed one left. Whoever is alone can
    if folder.is_dir() and any(path.name.startswith(".") or path.suffix == ".tmp" for path in folder.iterdir()):
        with contextlib.suppress(UserError), locks.locked(folder, alone=True):
            _sweep(folder)


def _sweep(folder: Path) -> None:
    atomic.sweep(folder)
    for pattern in ("shard-*.tmp", "manifest.*.tmp"):  # names that earlier versions gave to temporary files
        for leftover in folder.glob(pattern):
            leftover.unlink(missing_ok=True)


def _facts(shard: Any) -> dict[str, Any]:
    """What an open shard's header says: identity, sha256 and unreadable. Earlier versions wrote the first and last apart.

    ValueError, KeyError or RecursionError where it says nothing of the kind.
    """
    header = shard.metadata() or {}
    if "facts" not in header:
        return {"identity": json.loads(header["identity"]), "unreadable": json.loads(header.get("unreadable", "{}"))}
    facts = json.loads(header["facts"])
    if not isinstance(facts, dict) or not isinstance(facts["sha256"], str):
        raise ValueError("facts must be a mapping with a text sha256")
    return facts


def stored_unreadable(path: Path) -> dict[str, str]:
    """{file: reason} of what whoever wrote a shard could not read."""
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
            found = _facts(shard)["identity"]
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
