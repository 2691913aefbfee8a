"""Importing gradio without its type stubs.

Each time gradio is imported it reads the source of all its components, to write stubs for editors beside its own files. That is
half of the time of its import, and a server has no use for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODULE = "gradio.component_meta"
WRITER = "create_or_modify_pyi"  # its function; a gradio without it is imported as it is


class _Finder(MetaPathFinder):
    """Finds gradio's module as Python does, and takes its function out when it is there."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec of the module; None for all others, which the next finder looks for."""
        if fullname != MODULE:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if hasattr(module, WRITER):
                setattr(module, WRITER, _nothing)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _nothing(*_: Any) -> None:
    """Write no stub."""


@contextmanager
def without_stubs() -> Iterator[None]:
    """Within the block an import of gradio writes no stubs."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


@contextmanager
def no_writer() -> Iterator[None]:
    """Within the block a class of a component writes no stub; gradio is imported already, in whatever way."""
    module: Any = sys.modules[MODULE]
    writer = getattr(module, WRITER, None)
    if writer is not None:
        setattr(module, WRITER, _nothing)
    try:
        yield
    finally:
        if writer is not None:
            setattr(module, WRITER, writer)
