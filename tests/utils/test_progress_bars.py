"""Progress: a bar that is drawn over itself on a terminal, plain lines in a file."""

import io
import sys

import pytest

from latentdiff.utils import progress_bars


class Stream(io.StringIO):
    """A stderr that is a terminal or is none."""

    def __init__(self, is_terminal: bool):
        super().__init__()
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_file_gets_plain_lines(monkeypatch, is_terminal):
    stream = Stream(is_terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bars.bar(total=4, unit="image", desc="drawing", mininterval=0.0) as bar:
        for _ in range(4):
            bar.update()
            bar.refresh()
            bar.refresh()
    text = stream.getvalue()
    if is_terminal:
        assert "\r" in text and "|" in text
        return
    lines = text.splitlines()
    assert "\r" not in text and "|" not in text and text.endswith("\n")
    assert [line.split()[2] for line in lines if "/4" in line][-1] == "4/4" and len(lines) == len(set(lines))
    assert all(line.startswith("drawing: ") for line in lines)
