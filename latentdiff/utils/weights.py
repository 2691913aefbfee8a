"""A small network of our own on disk: a folder with config.json and model.safetensors."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.errors import UserError
from latentdiff.utils import atomic
from latentdiff.utils.hashes import check_hashes, write_hashes

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
Network = TypeVar("Network", bound=nn.Module)


def save_network(network: nn.Module, config: Mapping[str, Any], folder: str | Path) -> None:
    """Write config, the weights (float32) and their hash into folder; the folder appears whole or not at all.

    Other files that lie in it stay.
    """
    state = {key: value.detach().float().cpu().contiguous() for key, value in network.state_dict().items()}
    with atomic.new_folder(Path(folder), keep=True) as new:
        save_file(state, new / WEIGHTS_FILE, metadata={"format": "pt"})
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_hashes(new)


def fingerprint(network: nn.Module, structure: tuple[Any, ...]) -> str:
    """Hex sha256 over structure and weights (float32): equal for equal functions, whatever they are called."""
    digest = hashlib.sha256(repr(structure).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def load_network(
    folder: str | Path, build: Callable[[dict[str, Any]], Network], what: str, device: str | torch.device = "cpu"
) -> Network:
    """build(config) with the weights of the folder: frozen, in eval mode, on device.

    UserError where a file is missing, damaged, or not of `what` (such as "feature network"); it names the file.
    """
    config_path, weights_path = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
    for path in (config_path, weights_path):
        if not path.is_file():
            raise UserError(f"{path}: not found; a {what}'s folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
        with torch.device("meta"):  # a config that lies takes no memory
            shapes = {key: value.shape for key, value in build(config).state_dict().items()}
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from None
    except (ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError, MemoryError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{config_path}: not the config of a {what} ({reason})") from None
    check_hashes([weights_path])
    try:
        weights = load_file(weights_path)
        if not all(weight.is_floating_point() for weight in weights.values()):
            raise RuntimeError("weights must be floating-point numbers")
        odd = [key for key in sorted({*shapes, *weights}) if key not in weights or shapes.get(key) != weights[key].shape]
        if odd:
            raise RuntimeError(f"{odd[0]} is missing, unknown or of another shape")
        if wrong := first_non_finite(weights.items()):
            raise RuntimeError(f"{wrong} is not finite")
        network = build(config)
        network.load_state_dict(weights)
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights_path}: damaged, or not the weights of its {CONFIG_FILE} ({reason})") from None
    return network.eval().requires_grad_(False).to(device)


def first_non_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of named tensors that holds NaN or infinity; None where all are finite.

    A sum is not finite where an entry is not, and is much cheaper than a look at each entry; it can overflow besides.
    """
    for name, value in weights:
        if not value.is_floating_point() or bool(value.detach().sum(dtype=torch.float32).isfinite()):
            continue
        if not bool(value.isfinite().all()):
            return name
    return None
