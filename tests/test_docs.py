"""The documentation is true to the code: links lead somewhere, commands parse, flags and keys are the ones there are."""

import ast
import contextlib
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import latentdiff
from latentdiff import _moved, samplers, schedules
from latentdiff.cli import main
from latentdiff.config import STAGES, load_config

ROOT = Path(__file__).parent.parent
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CARDS = sorted((ROOT / "weights").glob("*/README.md"))
PAGES = [*GUIDES, ROOT / "CHANGELOG.md", ROOT / "tests" / "benchmarks" / "README.md", *CARDS]
COMMANDS = (
    "agreement",
    "card",
    "compare",
    "edit",
    "encode",
    "evaluate",
    "fit",
    "gallery",
    "generate",
    "import",
    "info",
    "judge",
    "likelihood",
    "prepare",
    "publish",
    "reconstruct",
    "serve",
    "train",
    "tune",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`(latentdiff [^`]+)`")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
MENTIONED = {"card": {"--out"}}  # flags of other commands that a help text speaks of
# A word in capitals stands for something of the reader's
PLACEHOLDER = re.compile(r"[A-Z][A-Z_/]*")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    return [code for language, code in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def command_lines(page: Path) -> Iterator[str]:
    """Every shell line that runs latentdiff: of a fenced block, or within a sentence."""
    text = page.read_text(encoding="utf-8")
    for code in blocks(page, "bash", ""):
        for line in code.replace("\\\n", " ").splitlines():
            if re.search(r"(^|\s)latentdiff ", line) and not line.lstrip().startswith("#"):
                yield line
    yield from (" ".join(span.split()) for span in SPAN.findall(FENCE.sub("", text)))


def calls(line: str) -> Iterator[list[str]]:
    """The arguments of every call of latentdiff in a shell line."""
    for part in re.split(r"&&|;|\|(?!\w)| & *$", line):
        words = shlex.split(part, comments=True)
        for i, word in enumerate(words):
            if word == "latentdiff" and (i == 0 or words[i - 1] in ("-m", "do") or "=" in words[i - 1]):
                yield words[i + 1 :]


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the headings of a page."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def flags_of() -> dict[str, set[str]]:
    """The flags that the help of each command names."""
    flags = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "400")  # so that no flag is broken over two lines
        for command in COMMANDS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
                main([command, "--help"])
            flags[command] = set(FLAG.findall(out.getvalue())) - {"--help", "--version"} - MENTIONED.get(command, set())
            assert flags[command], out.getvalue()
    return flags


def config_keys() -> set[str]:
    """Every key of a config of any stage, with its section: train.steps."""
    keys: set[str] = set()

    def collect(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            kinds = [field.annotation, *get_args(field.annotation)]
            section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
            if section is None or {"name", "params"} == set(section.model_fields):
                keys.add(prefix + name)
            else:
                collect(section, f"{prefix}{name}.")

    for stage in STAGES.values():
        collect(stage, "")
    return keys


# README


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


@pytest.mark.parametrize("mark", ["generate", "test"])
def test_the_readme_has_what_ci_runs(mark):
    """.ci/run takes the first fenced block after the mark."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count(f"<!-- ci:{mark} -->") == 1
    after = text.split(f"<!-- ci:{mark} -->\n", 1)[1]
    assert after.startswith("```bash\n")
    assert "pip install -e " in after.split("```")[1]


# Links


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for target in LINK.findall(text):
        if re.match(r"[a-z]+://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            wrong.append(target)
    assert wrong == []


def test_every_page_is_in_the_index():
    linked = {target.partition("#")[0] for target in LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= linked


PATH = re.compile(r"`((?:latentdiff|tests|configs|weights|pipelines|docs|\.ci)/[\w./-]*)`")


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_named_files_exist(page):
    named = PATH.findall(page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


# Commands


@pytest.mark.parametrize("page", [*GUIDES, *CARDS, ROOT / "tests" / "benchmarks" / "README.md"], ids=name_of)
def test_commands_and_flags_exist(page, flags_of):
    wrong = []
    for line in command_lines(page):
        for words in calls(line):
            command = words[0] if words else ""
            if PLACEHOLDER.fullmatch(command) or command.startswith("-") or command in ("COMMAND", "..."):
                continue
            if command not in COMMANDS:
                wrong.append(f"{command}: no such command, in {line}")
                continue
            named = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)} - {"--help"}
            wrong += [f"{command} has no {flag}, in {line}" for flag in sorted(named - flags_of[command])]
    assert wrong == []


@pytest.mark.parametrize("page", [*GUIDES, *CARDS, ROOT / "tests" / "benchmarks" / "README.md"], ids=name_of)
def test_configs_and_keys_exist(page):
    keys, wrong = config_keys(), []
    for line in command_lines(page):
        for words in calls(line):
            if not words or words[0] not in ("train", "encode", "info"):
                continue
            overrides = [word for word in words[1:] if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
            wrong += [f"{key}, in {line}" for key in (item.partition("=")[0] for item in overrides) if not known(key, keys)]
            config = words[1] if len(words) > 1 else ""
            if config.endswith(".yaml") and "$" not in line:
                assert (ROOT / config).is_file(), line
                load_config(ROOT / config, overrides)
    assert wrong == []


def known(key: str, keys: set[str]) -> bool:
    """Whether a key exists; what is below model and the params of a name depends on the class that they are given to."""
    if key in ("key", "section.key"):
        return True  # in a line that shows the form alone
    free = r"(model|sample\.scheduler_config)(\.|$)|(schedule|noise_levels)\."
    return key in keys or bool(re.match(free, key))


def test_every_command_and_flag_is_documented(flags_of):
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(COMMANDS)
    missing = {}
    for command, flags in flags_of.items():
        # A switch's opposite, and the empty form of a list, need no line of their own
        ours = {
            flag for flag in flags if not flag.startswith("--empty-") and flag.replace("--no-", "--", 1) not in flags - {flag}
        }
        missing[command] = ours - set(FLAG.findall(sections[command]))
    assert {command: flags for command, flags in missing.items() if flags} == {}


# Configuration


def test_every_key_of_a_config_is_documented():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9.]+)`", text))
    missing = {key for key in config_keys() if key not in named}
    assert {key for key in missing if key not in ("stage", "model")} == set()
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    stated = {key for row in rows for key in re.findall(r"`([a-z_0-9.]+)`", row)}
    assert {key for key in stated if key not in STAGES and not known(key, config_keys())} == set()


# Names of the library


def first_column(text: str) -> list[str]:
    """The names in the first column of the tables in a text, in their order."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def section(page: str, heading: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


def test_every_sampler_and_schedule_is_documented():
    assert sorted(first_column(section("docs/sampling.md", "Samplers"))) == sorted(samplers.names())
    for page, heading in (("docs/python.md", "Schedules"), ("docs/training.md", "Stage 2: the diffusion model")):
        assert [name for name in schedules.names() if f"`{name}`" not in section(page, heading)] == []


def test_the_changelog_is_right_about_what_moved():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| `latentdiff\.([\w.]+)` \| `latentdiff\.([\w.]+)` \|$", text, re.MULTILINE))
    assert len(stated) > 50
    moved = _moved.MODULES
    assert {old: new for old, new in stated.items() if moved.get(old) != new} == {}


# Python


def imported(tree: ast.AST) -> dict[str, str]:
    """{name: module} of what is imported from latentdiff."""
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "latentdiff"
        for alias in node.names
    }


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_python_takes_public_names_and_their_arguments(page):
    names: dict[str, str] = {}
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        names |= imported(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names):
                continue
            if any(isinstance(argument, ast.Starred) for argument in node.args):
                continue
            function = getattr(latentdiff, node.func.id)
            keywords = {keyword.arg: None for keyword in node.keywords if keyword.arg}
            inspect.signature(function).bind(*[None] * len(node.args), **keywords)
    assert set(names) <= set(latentdiff.__all__)
    assert set(names.values()) <= {"latentdiff"}


# The checks themselves find what is wrong


@pytest.mark.parametrize(
    ("text", "check"),
    [
        ("[data](nowhere.md)", test_links_lead_to_files_and_headings),
        ("# Here\n[data](#there)", test_links_lead_to_files_and_headings),
        ("```bash\nlatentdiff train configs/folder/autoencoder.yaml train.stpes=3\n```", test_configs_and_keys_exist),
        ("say `latentdiff encode CONFIG data.souce=x`", test_configs_and_keys_exist),
        ("```python\nfrom latentdiff import nothing\n```", test_python_takes_public_names_and_their_arguments),
    ],
)
def test_a_mistake_is_found(text, check, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises((AssertionError, latentdiff.UserError)):
        check(page)


@pytest.mark.parametrize("line", ["latentdiff generat --seed 1", "x && accelerate launch -m latentdiff generate --sed 1"])
def test_a_wrong_command_is_found(line, flags_of, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"```bash\n{line}\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        test_commands_and_flags_exist(page, flags_of)
