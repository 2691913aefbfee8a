"""Finds the weights and configs that come with latentdiff."""

from __future__ import annotations

from pathlib import Path


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
