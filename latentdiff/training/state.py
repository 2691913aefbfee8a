"""Training states on disk: safetensors and JSON in <output>/state/step-N/, each whole or absent; the oldest are removed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.errors import UserError
from latentdiff.training.distributed import split
from latentdiff.utils import atomic, progress_bars
from latentdiff.utils.hashes import sha256_of


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state of each parameter: {"INDEX.NAME": tensor}, such as "0.exp_avg"; sharded where the parameter is.

    Learning rate and the like are not in it: they are the config's. `torch.distributed.checkpoint.state_dict` is not used,
    as it names parameters otherwise than existing states do, and fills in the moments of an optimizer that took no step.
    """
    states = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(v) for index, values in states.items() for name, v in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` gave, gathered to whole tensors. The parameter groups keep their settings of now."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        # Everything but the count of steps has the parameter's shape, and is sharded where that is
        states.setdefault(int(index), {})[name] = tensor if name == "step" else split(tensor, parameters[int(index)])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": states, "param_groups": groups})


def save_state(
    output: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int, best: bool = False
) -> Path:
    """Write a training state to <output>/state/step-N, and return that folder.

    It is written to a temporary folder, synced and renamed, so it is whole or absent. state.json has each file's length and
    hash. Afterwards the oldest states beyond `keep` are removed, except the best one and damaged ones.

    Args:
        output: the run's folder.
        step: how many steps are done.
        tensors: {NAME: tensors by name}; each becomes NAME.safetensors.
        meta: JSON values for state.json.
        keep: how many states stay.
        best: mark this one as the best.

    Raises:
        UserError: it cannot be written, as on a full disk. The states before it stay.
    """
    root = output / "state"
    try:
        final = _save(root, step, tensors, {**meta, "is_best": True} if best else meta)
        if best:
            mark_best(output, step)
    except (OSError, SafetensorError, UserError) as error:
        before = state_folders(output)
        last = f"the last one is {before[-1]}" if before else "there is none yet"
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{root / f'step-{step}'}: the training state cannot be written ({reason}); {last}") from error
    rotate(output, step, keep)
    return final


def save_snapshot(output: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> Path:
    """Write <output>/snapshots/step-N in the form of a training state, and return that folder. It is never removed.

    output, step, tensors, meta: as in `save_state`. UserError where it cannot be written, as on a full disk.
    """
    root = output / "snapshots"
    with atomic.naming(root / f"step-{step}"):
        return _save(root, step, tensors, meta)


def _save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> Path:
    final, temporary = root / f"step-{step}", root / f".step-{step}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _write(temporary, step, tensors, meta)
        if final.exists():
            _set_aside(final)
        os.replace(temporary, final)
        atomic.sync(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _write(folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    for name, group in tensors.items():
        contiguous = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in group.items()}
        save_file(contiguous, folder / f"{name}.safetensors")
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(folder.iterdir())}
    record = {"step": step, **meta, "files": files}
    text = json.dumps({**record, "sha256": _digest(record)}, indent=1)
    (folder / "state.json").write_text(text, encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        atomic.sync(path)


def _digest(record: dict[str, Any]) -> str:
    """Hash of state.json's content, so that a change in it is noticed too."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _set_aside(folder: Path) -> None:
    """Move an older state of the same step away: a whole one is removed, a damaged one gets another name."""
    if damage(folder) is None:
        atomic.remove_folder(folder)
        return
    number = 1
    while (new_name := folder.with_name(f"damaged-{folder.name}-{number}")).exists():
        number += 1
    os.replace(folder, new_name)


def mark_best(output: Path, step: int) -> None:
    """Write best.json: the state of this step is the best one."""
    atomic.write_text(output / "state" / "best.json", json.dumps({"step": step}))


def rotate(output: Path, step: int, keep: int) -> None:
    """Remove the oldest states, so that `keep` stay. Later ones than `step` do not count: the run went back before them."""
    earlier = [folder for folder in state_folders(output) if int(folder.name.removeprefix("step-")) <= step]
    whole = [folder for folder in earlier if damage(folder, quick=True) is None]
    best = best_step(output)
    for old in whole[:-keep]:
        if old.name != f"step-{best}" and damage(old) is None:
            atomic.remove_folder(old)


def best_step(output: Path) -> int | None:
    """The step of the state that is marked as the best, or None."""
    try:
        return int(json.loads((output / "state" / "best.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def state_folders(output: Path) -> list[Path]:
    """The folders of states with a state.json, oldest first (by step). They may be damaged; see `damage`."""
    return [folder for folder in step_folders(output) if (folder / "state.json").is_file()]


def newest_step(output: Path) -> int | None:
    """The step of the newest state whose files have the right lengths, or None."""
    whole = [folder for folder in state_folders(output) if damage(folder, quick=True) is None]
    return int(whole[-1].name.removeprefix("step-")) if whole else None


def seconds_used(output: Path) -> float:
    """Seconds that the run in a folder had used, over all its parts, at its newest state; 0 where there is none.

    States of versions that kept no times count as 0.
    """
    step = newest_step(output)
    if step is None:
        return 0.0
    meta = json.loads((output / "state" / f"step-{step}" / "state.json").read_text(encoding="utf-8"))
    return float(meta.get("clock", {}).get("seconds", 0.0))


def step_folders(output: Path, kind: str = "state") -> list[Path]:
    """All folders of states, or with kind="snapshots" of snapshots, whole or not, oldest first."""
    folders = [p for p in (output / kind).glob("step-*") if p.name.removeprefix("step-").isdecimal()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))


def damage(folder: Path, quick: bool = False) -> str | None:
    """What is wrong with a state's folder, or None where it is whole. quick: look at its files' lengths, not their hashes."""
    try:
        meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
            return "state.json: states no step"
        if meta["step"] != int(folder.name.removeprefix("step-")):
            return f"state.json: is of step {meta['step']}"
        if "sha256" in meta and meta["sha256"] != _digest({key: value for key, value in meta.items() if key != "sha256"}):
            return "state.json: its content has changed"
        for name, recorded in meta.get("files", {}).items():
            path = folder / name
            if Path(name).name != name:
                return f"state.json: names {name!r}, which is no file of it"
            if path.stat().st_size != recorded["bytes"]:
                return f"{name}: {path.stat().st_size} bytes instead of {recorded['bytes']}"
            if not quick and sha256_of(path) != recorded["sha256"]:
                return f"{name}: its content has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return " ".join(str(error).split())[:120]
    return None


def load_state(output: Path, warn: bool = True) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """({NAME: tensors by name}, meta) of the newest whole state in a run's folder.

    A damaged one is left where it is, and the one before it is taken. warn: name it on stderr. UserError where there is no
    state, or none that is whole.
    """
    folders = step_folders(output)
    if not folders:
        raise UserError(f"{output / 'state'}: no training state to resume from; leave --resume out to start afresh")
    problems = []
    for folder in reversed(folders):
        problem = damage(folder)
        if problem is None:
            try:
                tensors, meta = load_folder(folder)
                for earlier in problems if warn else ():
                    progress_bars.print_line(f"warning: {earlier}; it is left as it is, and {folder.name} is taken")
                return tensors, meta
            except (SafetensorError, OSError, ValueError) as error:
                problem = " ".join(str(error).split())[:120]
        problems.append(f"{folder}: damaged training state ({problem})")
    raise UserError(f"{problems[0]}; no state before it is whole; set output= elsewhere to start afresh")


def load_folder(folder: Path, only: str | None = None) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """({NAME: tensors by name}, meta) of the folder of a state or a snapshot in which `damage` found nothing.

    only: the one NAME whose tensors are read; None reads all.
    """
    meta = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    tensors = {path.stem: load_file(path) for path in sorted(folder.glob(f"{only or '*'}.safetensors"))}
    return tensors, {key: value for key, value in meta.items() if key not in ("files", "sha256")}


def load_into(module: nn.Module, tensors: dict[str, Tensor], what: str, only: Collection[str] | None = None) -> None:
    """Load whole weights into a module, which may be sharded. UserError, with the first key, where the keys differ.

    what: begins the message. only: the names of the weights that are loaded, while the others stay; None: all of them.
    """
    own = {key: value for key, value in module.state_dict().items() if only is None or key in only}
    shards = {key: split(tensor, own[key]) if key in own else tensor for key, tensor in tensors.items()}
    different = sorted(own.keys() ^ shards.keys())
    if different:
        raise UserError(f"{what}: the saved state is of another model (first differing key: {different[0]})")
    module.load_state_dict(shards, strict=False)
