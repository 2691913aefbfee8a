"""Small networks of latentdiff's own in a folder: config.json, model.safetensors and hashes.json."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.errors import UserError
from latentdiff.utils import atomic
from latentdiff.utils.hashes import check_hashes, write_hashes

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class SavedNetwork(nn.Module):
    """A network that can be saved to a folder and loaded from it.

    Attributes:
        kind: what messages call it, such as "feature network".
        arguments: names of the constructor arguments that config.json holds, each also an attribute of the network.
    """

    kind: ClassVar[str]
    arguments: ClassVar[tuple[str, ...]]

    def saved_arguments(self) -> dict[str, Any]:
        """The constructor arguments that config.json holds, as JSON values."""
        return {name: getattr(self, name) for name in self.arguments}

    def save(self, folder: str | Path) -> None:
        """Write config.json, the weights (float32) and their hash into folder; they appear together or not at all.

        Other files in the folder stay.
        """
        config = {"_class_name": type(self).__name__, **self.saved_arguments()}
        weights = {key: value.detach().float().cpu().contiguous() for key, value in self.state_dict().items()}
        with atomic.new_folder(Path(folder), keep=True) as new:
            save_file(weights, new / WEIGHTS_FILE, metadata={"format": "pt"})
            (new / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            write_hashes(new)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """The network in a folder: frozen, in eval mode, on device.

        The weights' names, shapes and hash are checked before the network takes any memory.

        Raises:
            UserError: a file is missing, damaged, or not of such a network; the message names the file.
        """
        config_path, weights_path = Path(folder, CONFIG_FILE), Path(folder, WEIGHTS_FILE)
        for path in (config_path, weights_path):
            if not path.is_file():
                raise UserError(f"{path}: not found; a {cls.kind}'s folder holds {CONFIG_FILE} and {WEIGHTS_FILE}")
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
            arguments = {name: config[name] for name in cls.arguments}
            with torch.device("meta"):  # sizes that are wrong or hostile take no memory
                shapes = {key: value.shape for key, value in cls(**arguments).state_dict().items()}
        except UserError as error:
            raise UserError(f"{config_path}: {error}") from None
        except (ValueError, LookupError, TypeError, RuntimeError, AttributeError, ArithmeticError, MemoryError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"{config_path}: not the config of a {cls.kind} ({reason})") from None
        check_hashes([weights_path])
        try:
            weights = load_file(weights_path)
            if not all(weight.is_floating_point() for weight in weights.values()):
                raise RuntimeError("weights must be floating-point numbers")
            wrong = [key for key in sorted({*shapes, *weights}) if key not in weights or shapes.get(key) != weights[key].shape]
            if wrong:
                raise RuntimeError(f"{wrong[0]} is missing, unknown or of another shape")
            if name := first_non_finite(weights.items()):
                raise RuntimeError(f"{name} is not finite")
            network = cls(**arguments)
            network.load_state_dict(weights)
        except (SafetensorError, RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{weights_path}: damaged, or not the weights of its {CONFIG_FILE} ({reason})") from None
        return network.eval().requires_grad_(False).to(device)


def fingerprint(network: nn.Module, structure: tuple[Any, ...]) -> str:
    """Hex sha256 over structure and weights (float32): equal for networks that compute the same, whatever their names."""
    digest = hashlib.sha256(repr(structure).encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def first_non_finite(weights: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of the (name, tensor) pairs that holds NaN or infinity; None where all are finite."""
    for name, value in weights:
        # The sum is cheap. It is not finite where an entry is not; it can also overflow, so then each entry is looked at
        if not value.is_floating_point() or bool(value.detach().sum(dtype=torch.float32).isfinite()):
            continue
        if not bool(value.isfinite().all()):
            return name
    return None
