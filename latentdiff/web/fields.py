"""Fields whose values reach what runs as they are: gradio's own checks are left out.

gradio checks a number against the range of its field, and a choice against the choices of the first model. Its messages do not
name the field, and each is printed with a traceback. `latentdiff.web.jobs` checks all values, for the model that is asked for.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from latentdiff.web.stubs import no_writer


def _as_sent(_: gr.components.Component, payload: Any) -> Any:
    """The value as it was sent."""
    return payload


with no_writer():  # gradio would write a stub of these classes beside this file

    class Number(gr.Number):
        """gr.Number without its checks and its rounding."""

        preprocess = _as_sent

    class Slider(gr.Slider):
        """gr.Slider without its checks and its rounding."""

        preprocess = _as_sent

    class Radio(gr.Radio):
        """gr.Radio without its checks."""

        preprocess = _as_sent

    class Dropdown(gr.Dropdown):
        """gr.Dropdown without its checks."""

        preprocess = _as_sent
