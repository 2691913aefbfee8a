"""The tab Generate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gradio as gr

if TYPE_CHECKING:
    from latentdiff.web.context import Context


def build(context: Context) -> None:
    """Fill the tab."""
    gr.Markdown("To come")
