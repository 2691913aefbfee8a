"""Finds models and configs by name: paths, and those that come with latentdiff."""

from __future__ import annotations

from pathlib import Path

from latentdiff.errors import UserError
from latentdiff.utils import atomic

INDEX = "model_index.json"  # of a checkpoint
META = "latentdiff.json"  # how a checkpoint was made
IN_REPOSITORY = ("emoji", "emoji-judge")  # weights that are too large for a wheel


def shipped_folder(kind: str) -> Path | None:
    """The folder of "weights" or "configs" that comes with latentdiff; None where the installation has none.

    It lies inside the package in a wheel, and beside the package in an editable install or a clone.
    """
    package = Path(__file__).parent.parent
    for parent in (package, package.parent):
        if (parent / kind).is_dir() and (parent is package or (parent / "pyproject.toml").is_file()):
            return parent / kind
    return None


def shipped_weights(name: str | Path) -> Path | None:
    """The folder of weights that come with latentdiff, by "weights/NAME" or "NAME"; None where none has that name."""
    parts, folder = Path(name).parts, shipped_folder("weights")
    inner = parts[1:] if parts[:1] == ("weights",) else parts
    found = folder is not None and len(inner) == 1 and bool(inner[0]) and (folder / inner[0]).is_dir()
    return folder / inner[0] if folder is not None and found else None


def resolve_model(name: str | Path, kind: str = "model", holds: str = INDEX) -> Path:
    """The folder of a checkpoint: a path that exists, or weights that come with latentdiff, as "weights/NAME" or "NAME".

    Args:
        name: the path or name.
        kind: what an error message calls it.
        holds: the file that such a folder must have to be listed in an error message.

    Raises:
        UserError: there is no such folder; the message names the weights that come with latentdiff.
    """
    path = Path(name)
    atomic.put_back(path)  # a process may have been killed between the two renames that publish a folder
    if path.exists():
        return path
    shipped = shipped_folder("weights")
    models = sorted(p.parent.name for p in shipped.glob(f"*/{holds}")) if shipped else []
    inner = path.parts[1:] if path.parts[:1] == ("weights",) else path.parts
    found = shipped_weights(path)  # a checkpoint, an autoencoder or a feature network
    if found is not None:
        return found
    if len(inner) == 1 and inner[0] in IN_REPOSITORY:
        raise UserError(
            f"{kind} {str(name)!r}: does not come with an installed package; clone latentdiff's repository, "
            f"and give the path of its weights/{inner[0]} or run the command there"
        )
    choice = f"or one that ships: {', '.join(f'weights/{m}' for m in models)}" if models else f"with {holds}"
    raise UserError(f"{kind} {str(name)!r}: no such folder; give the path of one {choice}")


def resolve_config(name: str | Path) -> Path:
    """The path of a training config: the file itself, or one that comes with latentdiff, as "configs/SET/NAME.yaml"."""
    path = Path(name)
    shipped = shipped_folder("configs")
    if not path.exists() and shipped and path.parts[:1] == ("configs",):
        inside = shipped.joinpath(*path.parts[1:])
        return inside if inside.is_file() else path
    return path
