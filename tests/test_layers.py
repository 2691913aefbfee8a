"""The library's order: a room imports only from rooms above it, so that any file can be read knowing what is beneath."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors",
    "_moved",
    "utils",
    "config",
    "schedules",
    "prediction",
    "denoiser",
    "noise_levels",
    "objective",
    "guidance",
    "samplers",
    "likelihood",
    "models",
    "data",
    "checkpoints",
    "single_file",
    "generation",
    "evaluation",
    "training",
    "recipes",
    "cli",
    "__main__",
]
ANYWHERE = {"pipelines"}  # looks latentdiff up only within a call, so it stands on none of the rooms


def library_files() -> list[Path]:
    return sorted(p for p in (ROOT / "latentdiff").rglob("*.py") if p != ROOT / "latentdiff" / "__init__.py")


def room_of(path: Path, root: Path = ROOT / "latentdiff") -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, room) of every import of latentdiff, at the top or within a function. package: of the file, for dots."""
    for node in ast.walk(tree):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "latentdiff" else [base]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "latentdiff" and len(parts) > 1:
                yield node.lineno, parts[1]


def wrong_imports(source: str, room: str, package: str = "latentdiff") -> list[str]:
    """Each import of a room that does not stand above `room` in ORDER, as text."""
    wrong = []
    for line, other in imported_rooms(ast.parse(source), package):
        if other == room or other in ANYWHERE:
            continue
        if other not in ORDER:
            wrong.append(f"line {line}: {other} is not a room of ORDER")
        elif ORDER.index(other) > ORDER.index(room):
            wrong.append(f"line {line}: {room} imports {other}, which is below it")
    return wrong


def test_every_file_stands_in_the_order():
    assert {room_of(path) for path in library_files()} <= set(ORDER)
    assert {room for room in ORDER} == {room_of(path) for path in library_files()}


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_room_imports_only_rooms_above_it(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert wrong_imports(path.read_text(), room_of(path), package) == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda p: p.name)
def test_a_pipeline_imports_nothing_of_the_library(path):
    assert list(imported_rooms(ast.parse(path.read_text()), "latentdiff.pipelines")) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import latentdiff.training.run", "line 1: data imports training"),
        ("from latentdiff.cli import main", "line 1: data imports cli"),
        ("from latentdiff import errors, evaluation", "line 1: data imports evaluation"),
        ("def f():\n    from latentdiff.checkpoints import load", "line 2: data imports checkpoints"),
        ("if TYPE_CHECKING:\n    from ..training import info", "line 2: data imports training"),
        ("from .. import training", "line 1: data imports training"),
        ("import latentdiff.nowhere", "line 1: nowhere is not a room"),
    ],
)
def test_the_checker_sees_imports_of_lower_rooms(source, said):
    (found,) = wrong_imports(source, "data", "latentdiff.data")
    assert found.startswith(said)


def test_the_checker_lets_the_rest_pass():
    source = "from latentdiff.utils.random import randn\nfrom . import shuffling\nfrom .order import x\n"
    source += "import torch, latentdiff.pipelines.a"
    assert wrong_imports(source, "data", "latentdiff.data") == []
