"""What is wrong with a config, said in one line, and the overrides of a command line."""

from __future__ import annotations

import difflib
import reprlib
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from latentdiff.errors import UserError
from latentdiff.utils.safe_yaml import read_yaml


def override(tree: dict[str, Any], item: str) -> None:
    """Set `section.key=value` in a tree, in place; the value is YAML. UserError where it is none, or the key leads nowhere."""
    key, eq, value = item.partition("=")
    if not eq or not key:
        raise UserError(f"override {item!r}: write it as key=value, for example train.steps=100")
    *parents, last = key.split(".")
    node = tree
    for name in parents:
        if node.get(name) is None:
            node[name] = {}
        node = node[name]
        if not isinstance(node, dict):
            raise UserError(f"override {item!r}: {name} is a value, not a section")
    try:
        node[last] = read_yaml(value)
    except yaml.YAMLError:
        raise UserError(f"override {item[:200]!r}: the value is not valid YAML") from None


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first mistake in one line, an unknown key with the nearest valid one. root: the config's own class."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"][1:]]  # the first part is the union's tag
    dotted = ".".join(path)
    if first["type"] == "extra_forbidden":
        valid = _keys_at(root, path[:-1])
        near = difflib.get_close_matches(path[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(valid)}"
        return f"{dotted}: unknown key; {hint}"
    if first["type"] == "missing":
        return f"{dotted}: this key is required"
    return f"{dotted}: {first['msg'][0].lower()}{first['msg'][1:]} (got {reprlib.repr(first['input'])})"


def _keys_at(root: type[BaseModel], path: list[str]) -> list[str]:
    node: Any = root
    for name in path:
        field = node.model_fields.get(name) if isinstance(node, type) and issubclass(node, BaseModel) else None
        if field is None:
            return []
        node = field.annotation
        if get_origin(node) is not None:
            node = next((arg for arg in get_args(node) if isinstance(arg, type) and issubclass(arg, BaseModel)), None)
    return list(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def similar_config(path: Path) -> str:
    """A hint at a config of nearly this name, or nothing."""
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""
