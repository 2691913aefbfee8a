"""The library's import order: a package imports only packages above it, and no module imports itself by way of others."""

import ast
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
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
    "discrete",
    "models",
    "data",
    "checkpoints",
    "single_file",
    "generation",
    "translation",
    "editing",
    "evaluation",
    "training",
    "fitting",
    "recipes",
    "web",
    "cli",
    "__main__",
]
ANYWHERE = {"pipelines"}  # looks latentdiff up only within a call, so it depends on nothing


def library_files() -> list[Path]:
    return sorted(p for p in (ROOT / "latentdiff").rglob("*.py") if p != ROOT / "latentdiff" / "__init__.py")


def top_name(path: Path, root: Path = ROOT / "latentdiff") -> str:
    return path.relative_to(root).parts[0].removesuffix(".py")


def imported_names(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of latentdiff, at the top or within a function. package: of the file, for dots."""
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


def wrong_imports(source: str, module: str, package: str = "latentdiff") -> list[str]:
    """Each import of what does not stand above `module` in ORDER, as text."""
    wrong = []
    for line, other in imported_names(ast.parse(source), package):
        if other == module or other in ANYWHERE:
            continue
        if other not in ORDER:
            wrong.append(f"line {line}: {other} is not in ORDER")
        elif ORDER.index(other) > ORDER.index(module):
            wrong.append(f"line {line}: {module} imports {other}, which is below it")
    return wrong


def test_every_file_stands_in_the_order():
    assert {top_name(path) for path in library_files()} <= set(ORDER)
    assert set(ORDER) == {top_name(path) for path in library_files()}


@pytest.mark.parametrize("path", library_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_modules_above_it(path):
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert wrong_imports(path.read_text(), top_name(path), package) == []


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines").glob("*.py")), ids=lambda p: p.name)
def test_a_pipeline_imports_nothing_of_the_library(path):
    """But another pipeline, which is put in front of it where it is saved into a checkpoint."""
    names = {name for _, name in imported_names(ast.parse(path.read_text()), "latentdiff.pipelines")}
    assert names <= ANYWHERE


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import latentdiff.training.run", "line 1: data imports training"),
        ("from latentdiff.cli import main", "line 1: data imports cli"),
        ("from latentdiff import errors, evaluation", "line 1: data imports evaluation"),
        ("def f():\n    from latentdiff.checkpoints import load", "line 2: data imports checkpoints"),
        ("if TYPE_CHECKING:\n    from ..training import info", "line 2: data imports training"),
        ("from .. import training", "line 1: data imports training"),
        ("import latentdiff.nowhere", "line 1: nowhere is not in ORDER"),
    ],
)
def test_the_checker_sees_imports_of_lower_modules(source, said):
    (found,) = wrong_imports(source, "data", "latentdiff.data")
    assert found.startswith(said)


def test_the_checker_lets_the_rest_pass():
    source = "from latentdiff.utils.random import randn\nfrom . import shuffling\nfrom .order import x\n"
    source += "import torch, latentdiff.pipelines.a"
    assert wrong_imports(source, "data", "latentdiff.data") == []


def module_of(path: Path, root: Path = ROOT) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_at_load(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is loaded, and those for type checkers alone; not those within functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_load(node)


def imported_modules(source: str, package: str, modules: set[str]) -> set[str]:
    """The modules of `modules` that a file imports at its top. package: of the file, for relative imports.

    `from package import name` is an import of package.name where that is a module, else of the package's __init__.
    """
    imported = set()
    for node in imports_at_load(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])])
        for alias in node.names:
            imported.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    return imported & modules


def import_cycle(sources: Mapping[str, tuple[str, str]]) -> list[str]:
    """A cycle of imports between modules {name: (package, source)}, the first module again at its end; [] for none."""
    graph = {name: imported_modules(source, package, set(sources)) for name, (package, source) in sources.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def library_sources() -> dict[str, tuple[str, str]]:
    files = (ROOT / "latentdiff").rglob("*.py")
    return {module_of(path): (".".join(path.relative_to(ROOT).parent.parts), path.read_text()) for path in files}


def test_no_module_imports_itself_by_way_of_others():
    assert import_cycle(library_sources()) == []


@pytest.mark.parametrize(
    "planted",
    [
        "from latentdiff.schedules.continuous import EDM",
        "if TYPE_CHECKING:\n    from latentdiff.schedules import discrete",
        "from . import continuous",
        "class A:\n    import latentdiff.schedules.continuous",
        "from latentdiff.samplers import sample",
    ],
)
def test_the_checker_finds_a_planted_cycle(planted):
    sources = library_sources()
    package, source = sources["latentdiff.schedules.base"]
    sources["latentdiff.schedules.base"] = package, f"{source}\n{planted}\n"
    assert "latentdiff.schedules.base" in import_cycle(sources)


def test_an_import_within_a_function_makes_no_cycle():
    sources = library_sources()
    package, source = sources["latentdiff.schedules.base"]
    late = "def late():\n    from latentdiff.schedules.continuous import EDM\n    return EDM"
    sources["latentdiff.schedules.base"] = package, f"{source}\n{late}\n"
    assert import_cycle(sources) == []
