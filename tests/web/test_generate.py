"""The tab Generate: the bytes of the command, cancel, the limits, one line for a mistake."""

import shlex
import threading
import time
from pathlib import Path

import gradio as gr
import pytest

import latentdiff
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.web.generate import Settings, as_flags, as_python, call, draw
from latentdiff.web.work import Cancelled, Job

FASHION = Settings("fashion-mnist", ["Sneaker", "Bag"], num_images=2, steps=3, seed=5)
EMOJI = Settings("emoji", prompt="a red apple\n a cat ", negative="blue", num_images=1, steps=2, guidance=3, seed=-1)
BY_SAMPLER = Settings("fashion-mnist", ["Bag"], num_images=3, steps=4, sampler="heun", guidance=1.5, low=0, high=1)


@pytest.fixture
def context(site):
    return site.context


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("settings", [FASHION, EMOJI, BY_SAMPLER], ids=["classes", "prompts", "sampler"])
def test_the_files_are_those_of_the_command_and_of_the_python(context, tmp_path, monkeypatch, settings):
    drawn = draw(context, settings, tmp_path, Job())
    assert all(file.parent == tmp_path / "images" for file in drawn.files)
    facts = context.models.facts(settings.model)
    expected = contents(tmp_path / "images")
    assert len(expected) == len(drawn.captions) == settings.num_images * len(call(context, settings)["what"])
    monkeypatch.chdir(tmp_path.parent)
    root = Path(latentdiff.__file__).parent.parent
    for folder, run in (
        ("by-command", lambda: main(shlex.split(as_flags(facts, drawn.arguments))[1:])),
        ("by-python", lambda: exec(as_python(facts, drawn.arguments), {})),
    ):
        (tmp_path / folder / "weights").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        (tmp_path / folder / "weights" / "emoji").symlink_to(root / "weights" / "emoji")
        run()
        assert contents(tmp_path / folder / "images") == expected
