"""Training state on disk: safetensors and JSON in <output>/state/step-N/, written atomically, oldest rotated out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentdiff.errors import UserError


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's per-parameter state, flat: "{parameter index}.{name}" -> tensor. Hyper-parameters are the config's."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": torch.as_tensor(v) for index, slots in state.items() for name, v in slots.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put tensors of optimizer_tensors back; the parameter groups keep their present hyper-parameters."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def save_state(output: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int) -> Path:
    """Write one state folder: each entry of `tensors` as NAME.safetensors, `meta` with the step as state.json.

    Everything is written to a temporary folder, synced and renamed, so a state folder is whole or absent. Older ones
    beyond `keep` are removed afterwards.
    """
    root = output / "state"
    root.mkdir(parents=True, exist_ok=True)
    final, temporary = root / f"step-{step}", root / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for name, group in tensors.items():
        contiguous = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in group.items()}
        save_file(contiguous, temporary / f"{name}.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, **meta}, indent=1))
    for path in [*temporary.iterdir(), temporary]:
        _sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync(root)
    for old in state_folders(output)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def state_folders(output: Path) -> list[Path]:
    """The complete states under an output folder, oldest first (by step)."""
    found = [p for p in (output / "state").glob("step-*") if (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def load_state(output: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The newest state: ({NAME: tensors}, meta). UserError if there is none or a file of it cannot be read."""
    folders = state_folders(output)
    if not folders:
        raise UserError(f"{output / 'state'}: no training state to resume from; leave --resume out to start afresh")
    folder = folders[-1]
    try:
        meta = json.loads((folder / "state.json").read_text())
        tensors = {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    except Exception as error:  # safetensors raises its own class, json another; the folder is what the user can act on
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{folder}: damaged training state ({reason}); remove it to use the one before") from None
    return tensors, meta


def load_into(module: nn.Module, tensors: dict[str, Tensor], what: str) -> None:
    """Load weights exactly; UserError naming the first key that differs."""
    missing, unexpected = module.load_state_dict(tensors, strict=False)
    if missing or unexpected:
        raise UserError(f"{what}: the saved state is of another model (first differing key: {[*missing, *unexpected][0]})")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
